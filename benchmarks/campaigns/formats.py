"""A valid file of every format that is read, with the command that reads it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from campaigns.jobs import Bench
from campaigns.trial import run

Tree = tuple[Callable[[bytes], Any], Callable[[Any], bytes]]  # reads and writes what a text nests


@dataclass
class Format:
    """A file of a format, and the command that reads it from ``fuzz/NAME``."""

    file: str
    body: bytes
    command: list[Any]
    tree: Tree | None = None
    beside: Path | None = None  # a folder to copy first


def to_json(body: Any) -> bytes:
    return json.dumps(body).encode()


def to_yaml(body: Any) -> bytes:
    return yaml.safe_dump(body).encode()


def to_lines(body: Any) -> bytes:
    return b"".join(to_json(row) + b"\n" for row in body)


def from_lines(body: bytes) -> Any:
    return [json.loads(line) for line in body.splitlines()]


def to_pickle(body: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(body, stream)
    return stream.getvalue()


JSON: Tree = (json.loads, to_json)
YAML: Tree = (yaml.safe_load, to_yaml)
LINES: Tree = (from_lines, to_lines)

MACHINE = {key: {"value": 700, "unit": "PEs", "grade": "M", "source": "?"} for key in ("width", "height")}
DART = [{"tripleset": [["a", "COLOUR", "blue"], ["a", "AGE", "old"]], "subtree_was_extended": False,
         "annotations": [{"source": "x", "text": "a is blue and old"}]}] * 2  # fmt: skip
TRIPLE = {"subject": "a", "property": "colour", "object": "blue"}
WEBNLG = {"entries": [{"1": {"category": "x", "lexicalisations": [{"comment": "good", "lex": "a is blue"}],
                             "modifiedtripleset": [TRIPLE]}}]}  # fmt: skip
XML = """<benchmark><entries><entry category="x" eid="Id1" size="1">
<originaltripleset><otriple>a | colour | blue</otriple></originaltripleset>
<modifiedtripleset><mtriple>a | colour | blue</mtriple></modifiedtripleset>
<lex comment="good" lid="Id1">a is blue</lex></entry></entries></benchmark>"""
# fmt: off
RATE = [{"scheduler": "Linear", "initial_learning_rate": 0.0, "end_learning_rate": 3e-4, "total_iters": 1},
        {"scheduler": "Linear", "initial_learning_rate": 3e-4, "end_learning_rate": 1e-5, "total_iters": 1}]
# fmt: on
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "filter_size": 64,
    "max_position_embeddings": 16,
    "vocab_size": 257,
    "position_embedding_type": "learned",
    "share_embedding_weights": True,
    "dropout_rate": 0.0,
    "use_projection_bias_in_attention": True,
    "use_ffn_bias_in_attention": True,
    "use_ffn_bias": True,
    "nonlinearity": "gelu",
    "layer_norm_epsilon": 1e-5,
    "use_bias_in_output": False,
}  # fmt: skip
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
    (inputs / "reference.txt").write_text("a b c d e\ne f g h\n")
    hf = inputs / "hf"
    if not hf.exists():
        run(["convert", run_dir, hf], bench.folder)
    train = ["train", "FILE", "run_dir=run", "data.corpus=../text.txt", "data.tokenizer=bytes", "train.threads=1"]
    answer = ["generate", run_dir, "--input", "FILE", "--tokens", "1", "--beams", "1", "--limit", "2",
              "--overlong", "cut", "--output", "answers.txt"]  # fmt: skip
    older = inputs / "older"  # a run of before files had digests: their form alone can tell that they are bent
    if not older.exists():
        shutil.copytree(run_dir, older, ignore=shutil.ignore_patterns("*digest*", "checkpoints"))
    going = inputs / "going"  # and one that is not at its end
    if not going.exists():
        shutil.copytree(older, going, ignore=shutil.ignore_patterns("summary.json"))
    tensors = {"linear.weight": torch.ones(4, 4), "linear.weight_mask": torch.eye(4), "linear.bias": torch.zeros(4)}
    save_file(tensors, inputs / "t.safetensors")
    config = yaml.safe_load((bench.folder / "tiny.yaml").read_text()) | {"phases": [{"sparsity": 0.5, "steps": 1}]}
    index = {"metadata": {}, "weight_map": {"wte.weight": "model.safetensors"}}
    run_file = lambda name: (run_dir / name).read_bytes()  # noqa: E731
    found = {
        "config": Format("c.yaml", to_yaml(config), train[:3] + train[5:], YAML),
        "cerebras-older": Format("c.yaml", to_yaml(OLDER), train, YAML),
        "cerebras-current": Format("c.yaml", to_yaml(CURRENT), train, YAML),
        "plan": Format("c.yaml", to_yaml(config), ["plan", "--model", "FILE", "--sparsity", "0.5"], YAML),
        "dart": Format("d.json", to_json(DART), answer, JSON),
        "webnlg": Format("w.json", to_json(WEBNLG), answer, JSON),
        "xml": Format("d.xml", XML.encode(), answer),
        "e2e-csv": Format("e.csv", b'mr,ref\n"name[a], area[b]","a is in b"\n', answer),
        "e2e-lines": Format("e.txt", b"name : a | area : b||a is in b\n", answer),
        "jsonl": Format("p.jsonl", to_lines([{"context": "a : b : c", "completion": ["x", "y"]}] * 3), answer, LINES),
        "text": Format("t.txt", (bench.folder / "sample.txt").read_bytes(), ["eval", run_dir, "--text", "FILE"]),
        "bleu": Format("h.txt", b"a b c d\ne f g h\n", ["bleu", "FILE", inputs / "reference.txt"]),
        "tokenizer": Format("tokenizer.json", run_file("tokenizer.json"),
                            ["train", "../tiny.yaml", "data.tokenizer=FILE", "phases=[{sparsity: 0.5, steps: 1}]"],
                            JSON),
        "safetensors": Format("m.safetensors", (inputs / "t.safetensors").read_bytes(),
                              ["convert", "FILE", "out.safetensors"]),
        "pickle": Format("m.pt", to_pickle(tensors), ["convert", "FILE", "out.pt"]),
        "hf-config": Format("hf/config.json", (hf / "config.json").read_bytes(),
                            ["generate", "FOLDER", "--prompt", "a", "--tokens", "1"], JSON, hf),
        "hf-tokenizer": Format("hf/tokenizer.json", (hf / "tokenizer.json").read_bytes(),
                               ["generate", "FOLDER", "--prompt", "a", "--tokens", "1"], JSON, hf),
        "hf-index": Format("hf/model.safetensors.index.json", to_json(index), ["convert", "FOLDER", "out"],
                           JSON, hf),
        "machine": Format("m.yaml", to_yaml(MACHINE),
                          ["simulate", "step", "--model", "../tiny.yaml", "--machine", "FILE"], YAML),
        "run-summary": Format("run/summary.json", run_file("summary.json"), ["report", "FOLDER"], JSON, older),
        "run-manifest": Format("run/manifest.json", run_file("manifest.json"), ["report", "FOLDER"], JSON, older),
        "run-metrics": Format("run/metrics.jsonl", run_file("metrics.jsonl"), ["report", "FOLDER"], LINES, older),
        "run-unfinished": Format("run/metrics.jsonl", run_file("metrics.jsonl"), ["report", "FOLDER"], LINES, going),
        "run-simulate": Format("run/summary.json", run_file("summary.json"), ["simulate", "step", "--run", "FOLDER"],
                               JSON, older),
    }  # fmt: skip
    return found
