"""Rows of a GPU, made on the CPU: what is wrong is marked and never tuned, and what fails costs no other row."""

import pytest
import torch

from vspdf.bench import linear_gpu
from vspdf.cli import bench_tables
from vspdf.kernels import tuning


@pytest.fixture
def kept(monkeypatch):
    found = []
    monkeypatch.setattr(tuning, "keep", lambda key, timing, device: found.append(timing))
    return found


def measured(monkeypatch, error, bounds=None):
    """Rows of a layer whose path "triton" is dense with an error in its gradient of the input."""

    def paths(layer, product):
        dense = layer._path("dense", product)
        off = error if product == "grad_input" else 0.0
        plain = lambda found: found[0] if isinstance(found, tuple) else found  # noqa: E731
        return {"dense": dense, "triton": lambda: plain(dense()) * (1 + off)}

    monkeypatch.setattr(linear_gpu.Layer, "paths", paths)
    if bounds:
        monkeypatch.setattr(linear_gpu.Layer, "bounds", bounds)
    device = torch.device("cpu")
    layer = linear_gpu.Layer(8, 16, 16, 0.5, "fp32", device)
    return layer, linear_gpu.measure(layer, 2, linear_gpu.Stopwatch(device), peers=False, tune=True)


@pytest.mark.parametrize("error, correct", [(0.0, True), (0.1, False), (float("nan"), False)])
def test_a_wrong_path_is_marked_and_not_tuned(monkeypatch, kept, error, correct):
    _, rows = measured(monkeypatch, error)
    found = {(row["candidate"], row["product"]): row for row in rows}
    assert {key for key, row in found.items() if not row["correct"]} == (
        set() if correct else {("triton", "grad_input")}
    )
    assert (("triton", "layer") in found) is correct and ("auto", "layer") in found
    assert ["triton" in timing.seconds for timing in kept] == [True, correct, True]
    lines, shown = [], []
    monkeypatch.setattr(bench_tables, "tell", lines.append)
    monkeypatch.setattr(bench_tables, "show", shown.append)
    bench_tables.print_linear_gpu({"rows": rows, "missing": {}, "hardware": {"gpu": "none"}})
    cells = [str(cell) for cell in shown[0].columns[5].cells]
    assert cells.count("wrong") == len(lines) == (0 if correct else 1)


def test_a_base_that_fails_is_missing(monkeypatch, kept):
    bounds = linear_gpu.Layer.bounds

    def failing(layer, product):
        def cublas():
            raise RuntimeError("out of memory")

        return bounds(layer, product) | ({"cublas": cublas} if product == "forward" else {})

    layer, rows = measured(monkeypatch, 0.0, failing)
    assert layer.missing["cublas forward"] == "out of memory"
    assert {row["product"] for row in rows} == {"grad_input", "grad_values"} and len(kept) == 2


def test_seconds_are_for_the_cpu(refused):
    for seconds in (0, 10):
        refused("--seconds is for the CPU", "bench", "linear", "--device", "cuda", "--seconds", seconds)
