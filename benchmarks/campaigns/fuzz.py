"""Files of every format that is read, bent at random or made to do harm, given to the verbs that read them."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from campaigns.jobs import Bench
from campaigns.trial import EQUAL, REFUSED, WRONG, Result, died, refused, run

# What a value may turn into. Big numbers are so big that nobody can mean them.
NASTY: list[Any] = [
    None, True, "", "x", "0", "nan", -1, 0, 1, 0.5, 3, 10**9, 2**63, -(2**70), 1e308, float("inf"), float("nan"), [], {},
    [[]], [None], {"": 1}, "\x00", "é\udcff".encode(errors="ignore").decode(), "a" * 5000, "../../x", "/dev/null", "!!x",
]  # fmt: skip
HANG = 20.0


@dataclass
class Format:
    """A file of a format, and the command that reads it from ``fuzz/NAME``."""

    file: str
    body: bytes
    command: list[Any]
    tree: Callable[[bytes], Any] | None = None
    write: Callable[[Any], bytes] | None = None
    beside: Path | None = None  # a folder to copy first


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


def _yaml(body: Any) -> bytes:
    return yaml.safe_dump(body).encode()


def _lines(body: Any) -> bytes:
    return b"".join(_json(row) + b"\n" for row in body)


def _rows(body: bytes) -> Any:
    return [json.loads(line) for line in body.splitlines()]


def _pt(body: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(body, stream)
    return stream.getvalue()


DART = [{"tripleset": [["a", "COLOUR", "blue"], ["a", "AGE", "old"]], "subtree_was_extended": False,
         "annotations": [{"source": "x", "text": "a is blue and old"}]}] * 2  # fmt: skip
WEBNLG = {"entries": [{"1": {"category": "x", "lexicalisations": [{"comment": "good", "lex": "a is blue", "lid": "1"}],
                             "modifiedtripleset": [{"subject": "a", "property": "colour", "object": "blue"}]}}]}  # fmt: skip
XML = """<benchmark><entries><entry category="x" eid="Id1" size="1">
<originaltripleset><otriple>a | colour | blue</otriple></originaltripleset>
<modifiedtripleset><mtriple>a | colour | blue</mtriple></modifiedtripleset>
<lex comment="good" lid="Id1">a is blue</lex></entry></entries></benchmark>"""
RATE = [{"scheduler": "Linear", "initial_learning_rate": 0.0, "end_learning_rate": 3e-4, "total_iters": 1},
        {"scheduler": "Linear", "initial_learning_rate": 3e-4, "end_learning_rate": 1e-5, "total_iters": 1}]  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "filter_size": 64, "max_position_embeddings": 16,
         "vocab_size": 257, "position_embedding_type": "learned", "share_embedding_weights": True, "dropout_rate": 0.0,
         "use_projection_bias_in_attention": True, "use_ffn_bias_in_attention": True, "use_ffn_bias": True,
         "nonlinearity": "gelu", "layer_norm_epsilon": 1e-5, "use_bias_in_output": False}  # fmt: skip
SPARSE = {"algorithm": "static", "sparsity": 0.9, "init_method": "random", "param_filter": ["*linear_layer.weight"]}
OLDER = {
    "train_input": {"data_processor": "GptHDF5MapDataProcessor", "data_dir": "./pile", "batch_size": 4},
    "model": SIZES, "sparsity": {**SPARSE, "type": "static"} | {"algorithm": "static"},
    "optimizer": {"optimizer_type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-9, "max_gradient_norm": 1.0,
                  "learning_rate": RATE, "weight_decay": 0.1},
    "runconfig": {"max_steps": 2, "checkpoint_steps": 1000, "log_steps": 1},
}  # fmt: skip
CURRENT = {"trainer": {
    "init": {
        "backend": {"backend_type": "CSX"}, "model": {"name": "gpt3", **SIZES}, "sparsity": SPARSE,
        "optimizer": {"AdamW": {"betas": [0.9, 0.95], "eps": 1e-9, "weight_decay": 0.1}},
        "schedulers": [{"SequentialLR": {"schedulers": [
            {"LinearLR": {key: value for key, value in rate.items() if key != "scheduler"}} for rate in RATE]}}],
        "precision": {"max_gradient_norm": 1.0}, "loop": {"max_steps": 2}, "checkpoint": {"steps": 1000},
        "logging": {"log_steps": 1}},
    "fit": {"train_dataloader": {"data_processor": "GptHDF5MapDataProcessor", "data_dir": ["./pile"],
                                 "batch_size": 4}}}}  # fmt: skip


def formats(bench: Bench) -> dict[str, Format]:
    """What is read, each with a valid file."""
    run_dir, inputs = bench.done / "run", bench.folder / "formats"
    inputs.mkdir(exist_ok=True)
    hf = inputs / "hf"
    if not hf.exists():
        run(["convert", run_dir, hf], bench.folder)
    train = ["train", "FILE", "run_dir=run", "data.corpus=../text.txt", "data.tokenizer=bytes", "train.threads=1"]
    answer = ["generate", run_dir, "--input", "FILE", "--tokens", "1", "--beams", "1", "--limit", "2",
              "--overlong", "cut", "--output", "answers.txt"]  # fmt: skip
    tensors = {"linear.weight": torch.ones(4, 4), "linear.weight_mask": torch.eye(4), "linear.bias": torch.zeros(4)}
    save_file(tensors, inputs / "t.safetensors")
    config = yaml.safe_load((bench.folder / "tiny.yaml").read_text()) | {"phases": [{"sparsity": 0.5, "steps": 1}]}
    index = {"metadata": {}, "weight_map": {"wte.weight": "model.safetensors"}}
    run_file = lambda name: (run_dir / name).read_bytes()  # noqa: E731
    found = {
        "config": Format("c.yaml", _yaml(config), train[:3] + train[5:], yaml.safe_load, _yaml),
        "cerebras-older": Format("c.yaml", _yaml(OLDER), train, yaml.safe_load, _yaml),
        "cerebras-current": Format("c.yaml", _yaml(CURRENT), train, yaml.safe_load, _yaml),
        "plan": Format("c.yaml", _yaml(config), ["plan", "--model", "FILE", "--sparsity", "0.5"], yaml.safe_load, _yaml),
        "dart": Format("d.json", _json(DART), answer, json.loads, _json),
        "webnlg": Format("w.json", _json(WEBNLG), answer, json.loads, _json),
        "xml": Format("d.xml", XML.encode(), answer),
        "e2e-csv": Format("e.csv", b'mr,ref\n"name[a], area[b]","a is in b"\n', answer),
        "e2e-lines": Format("e.txt", b"name : a | area : b||a is in b\n", answer),
        "jsonl": Format("p.jsonl", _lines([{"context": "a : b : c", "completion": ["x", "y"]}] * 3), answer, _rows, _lines),
        "text": Format("t.txt", (bench.folder / "sample.txt").read_bytes(), ["eval", run_dir, "--text", "FILE"]),
        "bleu": Format("h.txt", b"a b c d\ne f g h\n", ["bleu", "FILE", bench.folder / "sample.txt"]),
        "tokenizer": Format("tokenizer.json", run_file("tokenizer.json"),
                            ["train", "../tiny.yaml", "data.tokenizer=FILE", "phases=[{sparsity: 0.5, steps: 1}]"],
                            json.loads, _json),
        "safetensors": Format("m.safetensors", (inputs / "t.safetensors").read_bytes(), ["convert", "FILE", "out.safetensors"]),
        "pickle": Format("m.pt", _pt(tensors), ["convert", "FILE", "out.pt"]),
        "hf-config": Format("hf/config.json", (hf / "config.json").read_bytes(),
                            ["generate", "FOLDER", "--prompt", "a", "--tokens", "1"], json.loads, _json, hf),
        "hf-tokenizer": Format("hf/tokenizer.json", (hf / "tokenizer.json").read_bytes(),
                               ["generate", "FOLDER", "--prompt", "a", "--tokens", "1"], json.loads, _json, hf),
        "hf-index": Format("hf/model.safetensors.index.json", _json(index), ["convert", "FOLDER", "out"],
                           json.loads, _json, hf),
        "machine": Format("m.yaml", _yaml({"base": "cs2", "width": 100}),
                          ["simulate", "step", "--model", "../tiny.yaml", "--machine", "FILE"], yaml.safe_load, _yaml),
        "run-summary": Format("run/summary.json", run_file("summary.json"), ["report", "FOLDER"], json.loads, _json, run_dir),
        "run-metrics": Format("run/metrics.jsonl", run_file("metrics.jsonl"), ["report", "FOLDER"], _rows, _lines, run_dir),
        "run-simulate": Format("run/summary.json", run_file("summary.json"), ["simulate", "step", "--run", "FOLDER"],
                               json.loads, _json, run_dir),
    }  # fmt: skip
    return found


# -- bending ----------------------------------------------------------------------------------------------------------


def bend(format: Format, chance: random.Random) -> bytes:
    """One to three changes: of a value anywhere in the tree, where the format has one, or of bytes."""
    if format.tree and format.write and chance.random() < 0.75:
        tree = json.loads(json.dumps(format.tree(format.body)))
        for _ in range(chance.randint(1, 3)):
            tree = _bend_tree(tree, chance)
        try:
            return format.write(tree)
        except (ValueError, TypeError):  # no such value in this format
            pass
    body = bytearray(format.body)
    for _ in range(chance.randint(1, 3)):
        _bend_bytes(body, chance)
    return bytes(body)


def _bend_tree(tree: Any, chance: random.Random) -> Any:
    places = list(_places(tree))
    if not places or chance.random() < 0.03:
        return chance.choice(NASTY)
    holder, key = chance.choice(places)
    how = chance.choice(("value", "value", "value", "drop", "rename", "nest"))
    if how == "value":
        holder[key] = chance.choice(NASTY)
    elif how == "nest":
        holder[key] = chance.choice(([holder[key]], {"x": holder[key]}))
    elif how == "rename" and isinstance(holder, dict):
        holder[str(key) + chance.choice(("x", " ", "\x00"))] = holder.pop(key)
    else:
        del holder[key]
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _bend_bytes(body: bytearray, chance: random.Random) -> None:
    where, size = chance.randrange(len(body) + 1), chance.randint(1, 16)
    how = chance.choice(("flip", "drop", "twice", "put", "cut"))
    if how == "flip" and where < len(body):
        body[where] ^= 1 << chance.randrange(8)
    elif how == "drop":
        del body[where : where + size]
    elif how == "twice":
        body[where:where] = body[where : where + size * 4]
    elif how == "put":
        body[where:where] = chance.choice(
            (b"\x00", b"\xff\xfe", b"\r", b"\n", b'"', b"[" * 50, b"{", b"||", b"]]>", b"&x;")
        )
    elif how == "cut":
        del body[where:]


def _read(bench: Bench, format: Format, body: bytes, id: str, canary: Path | None = None) -> Result:
    folder = bench.room()
    if format.beside:
        shutil.copytree(format.beside, folder / Path(format.file).parent)
    path = folder / format.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body)
    words = [str(word).replace("FILE", str(path)).replace("FOLDER", str(path.parent)) for word in format.command]
    end = run(words, folder, hang=HANG)
    under_way = end.status is None and "step 1/" in end.err  # a long training that was asked for
    verdict = EQUAL if end.status == 0 or under_way else REFUSED if refused(end) else WRONG
    result = Result(id, verdict, died(end) if verdict == WRONG else "")
    if canary is not None and canary.exists():
        result = Result(id, WRONG, "what the file said was run")
    bench.clear(folder)
    return result


def fuzz(bench: Bench, among: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """`count` bent files of every format: read, or refused in one line. Here "equal" is: taken."""
    for name, format in formats(bench).items():
        if among and name not in among:
            continue
        for number in range(count or 200):
            id = f"{name}/{number}"
            yield id, lambda f=format, id=id: _read(bench, f, bend(f, random.Random(f"{seed} {id}")), id)


# -- made to do harm --------------------------------------------------------------------------------------------------


class _Runs:
    """Unpickled, touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _shared_lists(depth: int) -> Any:
    tree: Any = [torch.zeros(1)]
    for _ in range(depth):
        tree = [tree, tree]
    return {"model": tree}


def _deep(body: bytes, depth: int = 100_000) -> bytes:
    return body * depth


def _bomb(name: str, size: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, bytes(size))
    return stream.getvalue()


def hostile(bench: Bench, among: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Small files that run code, leave their folder or eat the machine: each is refused in one line, soon."""
    canary = bench.folder / "canary"
    known = formats(bench)
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]"
    hf = json.loads(known["hf-config"].body)
    anchors = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join('*' + a for _ in range(8))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    entities = "<!DOCTYPE x [" + '<!ENTITY e0 "ha">' + "".join(
        f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(12)
    )  # fmt: skip
    entity_file = XML.replace("a is blue", "&out;")
    cases: list[tuple[str, str, bytes]] = [
        ("pickle/code", "pickle", _pt({"model": _Runs(canary)})),
        ("pickle/bare", "pickle", pickle.dumps(_Runs(canary))),
        ("pickle/shared", "pickle", _pt(_shared_lists(40))),
        ("pickle/expanded", "pickle", _pt({"w.weight": torch.zeros(1).expand(60_000, 60_000)})),
        ("pickle/zip", "pickle", _bomb("archive/data.pkl", 1 << 31)),
        ("safetensors/length", "safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("safetensors/shape", "safetensors", _header({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}})),
        ("safetensors/overlap", "safetensors", _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                                                        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})),
        *((f"hf/{key}", "hf-config", _json({**hf, key: 10**9})) for key in
          ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "n_inner")),
        ("hf/outside", "hf-index", _json({"weight_map": {"wte.weight": "../../run/model.safetensors"}})),
        ("hf/deep", "hf-config", _deep(b"[")),
        ("config/tag", "config", tag.encode()),
        ("config/anchors", "config", anchors.encode()),
        ("config/deep", "config", _deep(b"[", 20_000)),
        ("config/interpolation", "config", known["config"].body.replace(b"tiny", b"'${oc.env:HOME}'")),
        ("config/itself", "config", b"name: ${name}\n" + known["config"].body.replace(b"name: tiny\n", b"")),
        *((f"config/{key}", "config", _huge(known["config"].body, key)) for key in
          ("n_layer", "d_model", "n_head", "sequence_length", "batch_size")),
        *((f"plan/{key}", "plan", _huge(known["plan"].body, key)) for key in ("n_layer", "d_model")),
        ("cerebras/layers", "cerebras-older", _huge(known["cerebras-older"].body, "num_hidden_layers")),
        ("cerebras/patterns", "cerebras-older", _yaml({**OLDER, "sparsity": {**SPARSE, "param_name_patterns": ["(a+)+$"]}})),
        ("machine/tag", "machine", tag.encode()),
        ("e2e/brackets", "e2e-csv", b'mr,ref\n"' + b"a" * 100_000 + b'",x\n'),
        ("e2e/open", "e2e-csv", b'mr,ref\n"' + b"a[" * 50_000 + b'",x\n'),
        ("e2e/field", "e2e-csv", b'mr,ref\n"' + b"name[a], " * 50_000 + b'",x\n'),
        ("dart/deep", "dart", _deep(b"[")),
        ("jsonl/deep", "jsonl", b'{"context": ' + _deep(b"[") + b"\n"),
        ("jsonl/number", "jsonl", b'{"context": ' + b"9" * 100_000 + b"}\n"),
        ("xml/entities", "xml", (entities + "]>" + XML.replace("a is blue", "&e12;")).encode()),
        ("xml/external", "xml", (f'<!DOCTYPE x [<!ENTITY out SYSTEM "file://{bench.folder}/tiny.yaml">]>' + entity_file).encode()),
        ("xml/deep", "xml", _deep(b"<a>")),
        ("tokenizer/deep", "tokenizer", _deep(b"[")),
        ("summary/deep", "run-summary", _deep(b"[")),
        ("metrics/deep", "run-metrics", _deep(b"[")),
        ("text/binary", "text", bytes(range(256)) * 16),
    ]  # fmt: skip
    for id, name, body in cases:
        if not among or name in among or id.partition("/")[0] in among:
            yield id, lambda f=known[name], body=body, id=id: _read(bench, f, body, id, canary)


def _huge(body: bytes, key: str) -> bytes:
    tree = yaml.safe_load(body)
    for holder, name in _places(tree):
        if name == key:
            holder[name] = 10**9
    return _yaml(tree)


def _header(tensors: dict[str, Any]) -> bytes:
    text = _json(tensors)
    return len(text).to_bytes(8, "little") + text + bytes(4)
