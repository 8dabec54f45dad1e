"""Decoding measured: rows for every model, bytes that follow from the sparsity, and a pruned folder as it is."""

import json

import pytest
import torch

from vspdf.bench.decode import bench_decode, read_bytes
from vspdf.interop import hugging_face
from vspdf.model import GPT
from vspdf.shapes import Shape
from vspdf.sparsity.surgery import sparsify

SHAPE = Shape(2, 64, 4, 128, 97, 32, n_kv_head=2, norm="rms", position="rope", mlp="swiglu", bias=False)


def test_a_row_for_every_model():
    found = bench_decode(GPT(SHAPE), (0.5, 0.9), ("bfloat16",), (1, 3), context=4, tokens=2, threads=1, rounds=2)
    rows = {(row["sparsity"], row["dtype"], row["batch_size"]): row for row in found["rows"]}
    assert list(rows) == [(s, d, b) for b in (1, 3) for s in (0, 0.5, 0.9) for d in ("float32", "bfloat16")]
    for key, row in rows.items():
        assert row["tokens_per_second"] > 0 and row["rounds"] == 2, key
        if key[:2] == (0, "float32"):
            assert row["ratio_to_dense"] == 1
    assert rows[0, "bfloat16", 1]["ratio_to_bfloat16"] == 1


def test_bytes_are_values_mask_and_head():
    model = GPT(SHAPE)
    head, linear = 97 * 64 * 4, SHAPE.linear
    assert read_bytes(model) == head + 4 * linear
    sparsify(model, 0.5)
    assert read_bytes(model) == head + 2 * linear + linear // 8
    model.to(torch.bfloat16)
    assert read_bytes(model) == head // 2 + linear + linear // 8


def test_a_folder_with_zeros(tmp_path, vspdf):
    """What another tool has pruned: its zeros are the mask."""
    model = GPT(SHAPE, init_std=0.1)
    with torch.no_grad():
        for name, (out, into) in SHAPE.block.items():
            for layer in model.h:
                layer.get_submodule(name).weight.mul_(torch.rand(out, into) < 0.3)
    hugging_face.write_hugging_face(model, None, tmp_path / "pruned")
    status, out, err = vspdf("bench", "decode", "--model", tmp_path / "pruned", "--sparsity", "zeros", "--rounds", 1,
                             "--tokens", 2, "--context", 4, "--threads", 1, "--json")  # fmt: skip
    rows = json.loads(out)["rows"]
    assert status == 0 and [row["dtype"] for row in rows] == ["float32", "bfloat16"] * 2, err
    assert rows[2]["sparsity"] == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--model", "llama-tiny", "--sparsity", "zeros"], "is for a checkpoint that was pruned"),
     (["--model", "lama-tiny"], "'lama-tiny' not found"), (["--dtype", "fp32"], "--dtype = 'fp32' is not known")],
    ids=["zeros of a name", "no model", "dtype"],
)  # fmt: skip
def test_bad_input(vspdf, arguments, message):
    status, _, err = vspdf("bench", "decode", *arguments)
    assert status == 2 and message in err
