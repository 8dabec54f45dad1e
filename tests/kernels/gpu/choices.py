"""Which path runs on a GPU that is not here, and `benchmarks/gpu.py`, which measures it on one that is.

In the interpreter, as `interpreted.py` is run.
"""

import csv
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from vspdf.kernels import dispatch, ops, tuning
from vspdf.kernels.gpu import launch
from vspdf.pattern import Pattern

# -- which path runs, on a GPU that is not here -----------------------------------------------------------------------


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """Dispatch as on an H200, with an empty user cache; returns the choice for a layer."""
    monkeypatch.setenv("VSPDF_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(tuning, "GPUS", {})
    monkeypatch.setattr(tuning, "_pinned", {})
    monkeypatch.setattr(dispatch, "_told", set())

    def choice(pattern, product="forward", tokens=16384, dtype=torch.bfloat16):
        return dispatch._choose_gpu(product, pattern, tokens, dtype, torch.device("cpu"))

    return choice


def test_the_model_is_conservative(h200):
    for sparsity, dtype, path in [
        (0.5, torch.bfloat16, "dense"), (0.993, torch.bfloat16, "dense"), (0.998, torch.bfloat16, "triton"),
        (0.5, torch.float32, "dense"), (0.98, torch.float32, "triton"),
    ]:  # fmt: skip
        choice = h200(Pattern.random((4096, 1024), sparsity), dtype=dtype)
        assert choice.path == path and "modelled, not measured" in choice.reason
    assert h200(Pattern.random((64, 64), 0.9), dtype=torch.float64) == (
        "dense",
        launch.refusal(torch.float64, torch.device("cpu")),
    )


def test_an_unknown_device_runs_dense_until_it_is_tuned(h200, monkeypatch):
    monkeypatch.setattr(launch, "device_name", lambda device=None: "Unheard-of 9000")
    choice = h200(Pattern.random((4096, 1024), 0.999))
    assert choice.path == "dense" and "vspdf bench linear --device cuda --tune" in choice.reason


def test_the_log_tells_each_choice_once(h200, caplog):
    caplog.set_level("INFO", "vspdf")
    pattern = Pattern.random((4096, 1024), 0.95)
    for _ in range(3):
        h200(pattern)
    (line,) = caplog.messages
    assert line.startswith("forward T=16384 in=1024 out=4096 sparsity=0.950 bf16: dense: modelled, not measured")


def keep(key, rounds):
    tuning.keep(key, tuning.timing(rounds), torch.device("cpu"))


def test_a_tuned_24_is_not_taken_for_other_masks(h200):
    pattern = Pattern.random((4096, 1024), 0.75)
    keep(tuning.gpu_key("forward", pattern, 16384, torch.bfloat16), {"dense": [1.0], "2:4": [0.5]})
    assert h200(pattern).path == "dense"


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L40S"])
def test_no_gather_below_994_on_data_centre_cards_in_16_bit(h200, monkeypatch, name):
    monkeypatch.setattr(launch, "device_name", lambda device=None: name)
    for product in ("forward", "grad_input", "grad_values"):
        assert h200(Pattern.random((8192, 2048), 0.9935), product).path == "dense"


def test_machines_have_gpus_of_different_kinds(h200, monkeypatch):
    pattern = Pattern.random((4096, 1024), 0.95)
    key = tuning.gpu_key("forward", pattern, 16384, torch.bfloat16)
    keep(key, {"dense": [1.0], "triton": [0.5]})
    assert h200(pattern).path == "triton"
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    assert h200(pattern).path == "dense"


@pytest.mark.parametrize(
    "triton, path",
    [([0.5, 0.5, 0.6], "triton"), ([0.5, 0.5, 0.98], "dense"), ([0.97, 0.97, 0.97], "triton"), ([2, 2, 2], "dense")],
    ids=["faster", "one round is not", "just", "slower"],
)
def test_tuned_paths_must_win_every_round(h200, triton, path):
    pattern = Pattern.random((4096, 1024), 0.95)
    key = tuning.gpu_key("forward", pattern, 16384, torch.bfloat16)
    keep(key, {"dense": [1.2, 1.2, 1.2], "cublas": [1.0, 1.0, 1.0], "triton": triton, "2:4": [1.1, 0.9, 1.0]})
    assert h200(pattern).path == path and h200(pattern).reason.startswith("tuned here: triton")
    assert h200(pattern, tokens=16000).path == path  # the same bucket
    assert h200(pattern, tokens=100).reason.startswith("modelled")


def test_the_cache_survives_and_overrules_the_shipped_table(h200, monkeypatch):
    pattern = Pattern.random((4096, 1024), 0.95)
    key = tuning.gpu_key("forward", pattern, 16384, torch.bfloat16)
    shipped = {"NVIDIA H200": {key: [{"dense": 1.0, "triton": 0.8}, {"triton": 0.85}]}}
    monkeypatch.setattr(tuning, "shipped", lambda: shipped)
    assert h200(pattern) == ("triton", "shipped table: triton 1.25x (worst round 1.18x) against dense")
    keep(key, {"dense": [1.0], "triton": [2.0]})
    monkeypatch.setattr(tuning, "GPUS", {})
    assert h200(pattern).path == "dense"
    stored = tuning.choices()
    assert stored[key] == [{"dense": 1.0, "triton": 2.0}, {"triton": 2.0}, 0]
    tuning.pin({key: [{"dense": 1.0, "triton": 0.5}, {"triton": 0.5}]})
    assert h200(pattern).path == "triton"
    monkeypatch.setattr(launch, "device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    assert h200(pattern).path == "triton", "a resumed run goes on as it began, whatever it runs on"


def test_the_shipped_table_can_be_read():
    assert isinstance(tuning.shipped(), dict)
    for table in tuning.shipped().values():
        for columns in table.values():
            assert tuning.GpuTiming(*columns).choice("shipped table").path in ops.PATHS


# -- benchmarks/gpu.py ------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch, tmp_path):
    """benchmarks/gpu.py on tiny layers: status of `main` with further arguments."""
    spec = spec_from_file_location("gpu_benchmark", Path(__file__).parents[3] / "benchmarks" / "gpu.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ORDER", ("bf16", "fp32"))
    monkeypatch.setattr(module, "ODD", [(7, 20, 33, 0.8)])
    monkeypatch.setattr(module, "SMOKE", [module.Cell("tiny", 8, 20, 33, 0.9)])

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path), *arguments])
        return module.main()

    main.module = module
    return main


def test_the_benchmark_writes_what_it_found(script, tmp_path, capsys):
    assert script("--smoke") == 0
    rows = list(csv.DictReader((tmp_path / "gpu.csv").open()))
    assert {row["product"] for row in rows} == {"forward", "grad_input", "grad_values", "layer"}
    assert {row["candidate"] for row in rows} == {
        "dense", "triton", "cublas", "expand alone", "sample alone", "cusparse", "auto",
    }  # fmt: skip
    (table,) = json.loads((tmp_path / "gpu_tuning.json").read_text()).values()
    assert len(table) == 6 and all(tuning.GpuTiming(*columns).choice() for columns in table.values())
    checked = [row for row in rows if row["product"] != "layer" and row["candidate"] in ("triton", "dense", "auto")]
    assert checked and all(float(row["error"]) < 1e-2 for row in checked)
    assert all(row["torch"] == torch.__version__ and row["device"] for row in rows)
    assert (tmp_path / "gpu.png").stat().st_size > 5000
    assert "the figures mean nothing" in capsys.readouterr().out


def test_the_benchmark_finds_wrong_results(script, monkeypatch, capsys):
    monkeypatch.setattr(script.module, "ORDER", ("bf16",))
    right = ops.PATHS["triton"]["forward"]
    monkeypatch.setitem(ops.PATHS["triton"], "forward", lambda *a: (right(*a)[0] + 1, 0))
    assert script("--smoke") == 1
    assert "WRONG: triton forward bf16" in capsys.readouterr().out


def test_the_bars_are_what_the_page_promises(script):
    row = {"cell": "c", "precision": "bf16", "product": "layer", "candidate": "dense", "ratio_to_dense": 0.975}
    row |= {"bytes_sparse": 1040, "bytes_promised": 1000}
    assert script.module.bars([row]) == []
    slow, large = row | {"ratio_to_dense": 0.96}, row | {"bytes_sparse": 1060}
    assert script.module.bars([slow]) == ["c: dense takes 1.042 times as long as cuBLAS"]
    assert script.module.bars([large]) == ["c: a state of 1,060 bytes, promised 1,000"]
    assert script.module.bars([slow | {"precision": "fp32"}, slow | {"candidate": "triton"}]) == []


def test_the_benchmark_times_float32_as_it_is_told(script):
    """Whichever of torch's two settings the user has written, and puts it back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with script.module.precision("fp32"):
            assert not launch.tf32()
        assert launch.tf32()
    finally:
        matmul.fp32_precision = before


def test_the_benchmark_keeps_to_its_time(script, capsys):
    assert script("--smoke", "--seconds", "0") == 0
    assert "skipped for lack of time: tiny bf16" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_benchmark_needs_a_gpu(script, capsys):
    assert script() == 2
    assert (
        capsys.readouterr().err == "benchmarks/gpu.py: error: torch sees no CUDA device here; GPU timings need one.\n"
    )
