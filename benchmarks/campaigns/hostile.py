"""Small files that would run code, leave their folder or eat the machine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from campaigns.formats import OLDER, SPARSE, XML, Format, formats, to_json, to_pickle, to_yaml
from campaigns.fuzz import places, read
from campaigns.jobs import Bench
from campaigns.trial import Result

_DEEP = b"[" * 100_000


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


Case = tuple[str, str, bytes]  # its name, its format, what the file holds


def _of_tensors(known: dict[str, Format], canary: Path) -> list[Case]:
    """Pickles, safetensors and Hugging Face folders."""
    hf = json.loads(known["hf-config"].body)
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return [
        ("pickle/code", "pickle", to_pickle({"model": _Runs(canary)})),
        ("pickle/bare", "pickle", pickle.dumps(_Runs(canary))),
        ("pickle/shared", "pickle", to_pickle(_shared_lists(40))),
        ("pickle/expanded", "pickle", to_pickle({"w.weight": torch.zeros(1).expand(60_000, 60_000)})),
        ("safetensors/length", "safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("safetensors/shape", "safetensors", _header({"w": {**one, "shape": [2**40]}})),
        ("safetensors/overlap", "safetensors", _header({"a": one, "b": one})),
        *((f"hf/{key}", "hf-config", to_json({**hf, key: 10**9})) for key in
          ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size", "n_inner")),
        ("hf/outside", "hf-index", to_json({"weight_map": {"wte.weight": "../../run/model.safetensors"}})),
        ("hf/deep", "hf-config", _DEEP),
    ]  # fmt: skip


def _of_text(known: dict[str, Format], canary: Path) -> list[Case]:
    """YAML, JSON, CSV, XML."""
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]"
    anchors = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    regular = to_yaml({**OLDER, "sparsity": {**SPARSE, "param_name_patterns": ["(a+)+$"]}})
    named = [f"&e{i};" * 10 for i in range(12)]
    entities = (
        '<!DOCTYPE x [<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{i} "{it}">' for i, it in enumerate(named, 1)) + "]>"
    )
    outside = f'<!DOCTYPE x [<!ENTITY out SYSTEM "file://{canary.with_name("tiny.yaml")}">]>'
    return [
        ("config/tag", "config", tag.encode()),
        ("config/anchors", "config", anchors.encode()),
        ("config/deep", "config", b"[" * 20_000),
        ("config/interpolation", "config", known["config"].body.replace(b"tiny", b"'${oc.env:HOME}'")),
        ("config/itself", "config", b"name: ${name}\n" + known["config"].body.replace(b"name: tiny\n", b"")),
        *((f"config/{key}", "config", _huge(known["config"].body, key)) for key in
          ("n_layer", "d_model", "n_head", "sequence_length", "batch_size")),
        *((f"plan/{key}", "plan", _huge(known["plan"].body, key)) for key in ("n_layer", "d_model")),
        ("cerebras/layers", "cerebras-older", _huge(known["cerebras-older"].body, "num_hidden_layers")),
        ("cerebras/patterns", "cerebras-older", regular),
        ("machine/tag", "machine", tag.encode()),
        ("e2e/brackets", "e2e-csv", b'mr,ref\n"' + b"a" * 100_000 + b'",x\n'),
        ("e2e/open", "e2e-csv", b'mr,ref\n"' + b"a[" * 50_000 + b'",x\n'),
        ("e2e/field", "e2e-csv", b'mr,ref\n"' + b"name[a], " * 50_000 + b'",x\n'),
        ("dart/deep", "dart", _DEEP),
        ("jsonl/deep", "jsonl", b'{"context": ' + _DEEP + b"\n"),
        ("jsonl/number", "jsonl", b'{"context": ' + b"9" * 100_000 + b"}\n"),
        ("xml/entities", "xml", (entities + XML.replace("a is blue", "&e12;")).encode()),
        ("xml/external", "xml", (outside + XML.replace("a is blue", "&out;")).encode()),
        ("xml/deep", "xml", b"<a>" * 100_000),
        ("tokenizer/deep", "tokenizer", _DEEP),
        ("summary/deep", "run-summary", _DEEP),
        ("metrics/deep", "run-metrics", _DEEP),
        ("text/binary", "text", bytes(range(256)) * 16),
    ]  # fmt: skip


def hostile(bench: Bench, among: list[str], count: int, seed: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Small files that run code, leave their folder or eat the machine: each is refused in one line, soon."""
    canary = bench.folder / "canary"
    known = formats(bench)
    for id, name, body in _of_tensors(known, canary) + _of_text(known, canary):
        if not among or name in among or id.partition("/")[0] in among:
            yield id, lambda f=known[name], body=body, id=id: read(bench, f, body, id, canary)


def _huge(body: bytes, key: str) -> bytes:
    tree = yaml.safe_load(body)
    for holder, name in places(tree):
        if name == key:
            holder[name] = 10**9
    return to_yaml(tree)


def _header(tensors: dict[str, Any]) -> bytes:
    text = to_json(tensors)
    return len(text).to_bytes(8, "little") + text + bytes(4)
