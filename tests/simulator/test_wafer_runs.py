"""Runs on the wafer: their own masks beside what was measured, those that begin dense, and those that are broken."""

import json

import numpy as np
import pytest

from vspdf.plan.cs2 import _layer_of_run, scale_by_request
from vspdf.runs.folder import Run
from vspdf.shapes import Shape
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate.model import matrices

CS2 = machines.load("cs2")
TINY = Shape(n_layer=2, d_model=64, n_head=4, d_ff=256, vocab_size=500, sequence_length=128)


def masks(density):
    random = np.random.default_rng(0)
    return {f"layer{i}.{j}": random.random(sides) < density for i, sides in enumerate(matrices(TINY)) for j in range(2)}


def write_run(folder, patterns, **changes):
    folder.mkdir()
    sizes = ("n_layer", "d_model", "n_head", "d_ff", "vocab_size", "sequence_length")
    config = {"model": {key: getattr(TINY, key) for key in sizes}, "phases": [{"sparsity": 0.9, "steps": 10}]}
    (folder / "config.yaml").write_text(json.dumps(config))
    phase = {
        "name": "sparse", "sparsity": 0.9, "steps": 10, "tokens": 10 * 8 * 128,
        "speedup": {"median": 2.0, "low": 1.9, "high": 2.1},
        "flops": {"dense": 100, "useful": 25, "executed": 30},
    }  # fmt: skip
    last = {**phase, "name": "dense", "sparsity": 0.0}
    last.pop("speedup")
    model = {**{key: getattr(TINY, key) for key in Shape.__dataclass_fields__}, "parameters": TINY.parameters}
    (folder / "summary.json").write_text(json.dumps({"model": model, "phases": [phase, last]} | changes))
    arrays = {}
    for name, mask in patterns.items():
        arrays[name] = np.packbits(mask.reshape(-1), bitorder="little")
        arrays[f"{name}.shape"] = np.array(mask.shape)
    np.savez(folder / "patterns.npz", **arrays)
    return folder


def test_a_runs_masks_and_measured_times_side_by_side(vspdf, tmp_path):
    patterns = masks(0.1)
    folder = write_run(tmp_path / "run", patterns)
    run = Run(folder)
    assert run.shape == TINY and run.masks(0).keys() == patterns.keys()
    assert all(np.array_equal(run.masks(0)[name], mask) for name, mask in patterns.items())
    status, out, err = vspdf("simulate", "step", "--run", folder, "--json")
    assert status == 0, err
    result = json.loads(out)
    (row,) = result["comparison"]
    assert row["cpu"]["median"] == 2.0 and row["ideal"] == 4 and row["executed"] == pytest.approx(100 / 30)
    assert row["cs2"] == {key: result["speedup"][key] for key in ("low", "central", "high")}
    assert result["mask"] == row["mask"] == "real" and result["batch"] == 8
    status, out, _ = vspdf("simulate", "step", "--run", folder)
    assert status == 0 and "CPU, measured" in out and "2.00x" in out
    status, out, _ = vspdf("simulate", "layer", "--run", folder, "--layer", "layer0.1", "--json")
    layer_result = json.loads(out)
    assert layer_result["mask"] == "real" and layer_result["tokens"] == 8 * 128
    assert layer_result["sparsity"] == pytest.approx(1 - patterns["layer0.1"].mean())


def phase_of(name, *amounts):
    stages = [{"start": 5 * i, "steps": 5, "sparsity": s} for i, s in enumerate(amounts)]
    steps, flops = 5 * len(stages), {"dense": 100, "useful": 50, "executed": 60}
    return {
        "name": name, "sparsity": amounts[0], "stages": stages, "steps": steps, "tokens": 128 * steps, "flops": flops
    }  # fmt: skip


LATE = {
    "masks that move from dense": ([phase_of("gmp", 0.0, 0.9)], "patterns-end.npz", "phase 'gmp' as it ends", "gmp"),
    "a dense phase first": (
        [phase_of("dense", 0.0), phase_of("set", 0.9)], "patterns-2.npz", "phase 'set' as it begins", "set"
    ),
}  # fmt: skip


@pytest.mark.parametrize("phases, file, said, later", LATE.values(), ids=LATE)
def test_a_run_that_begins_dense_and_is_sparse_later(vspdf, tmp_path, phases, file, said, later):
    patterns = masks(0.1)
    folder = write_run(tmp_path / "run", patterns, phases=phases)
    (folder / "patterns.npz").rename(folder / file)
    assert "which of layer0.0" in vspdf("simulate", "layer", "--run", folder)[2]
    weights, tokens, which = _layer_of_run(folder, "layer0.1")
    assert (1 - weights.density, tokens) == (pytest.approx(0.9, abs=0.01), 128)
    assert which == f"The mask is that of {said}."
    note = f"The run is simulated as it begins, dense; phase '{later}' has a sparsity of up to 0.9."
    one = {"run": folder, "systems": [1], "batch": 8}
    assert scale_by_request(CS2, **one)["note"] == note
    assert scale_by_request(CS2, **one, sparsity=0.0)["note"] == ""


def test_a_run_that_kept_no_masks_is_as_sparse_as_it_says(tmp_path):
    folder = write_run(tmp_path / "run", masks(0.1))
    (folder / "patterns.npz").unlink()
    result = scale_by_request(CS2, run=folder, systems=[1])
    assert (result["sparsity"], result["note"]) == (pytest.approx(0.9), "")


def test_train_compares_what_it_measured_with_the_wafer(vspdf, tiny, tmp_path):
    status, out, err = vspdf("train", tiny, "train.measure_dense=1")
    assert status == 0, err
    assert "CPU, measured" in out and "cs2 estimated" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    sparse, half = summary["comparison"]
    assert (sparse["mask"], half["mask"]) == ("real", "real")
    assert sparse["cpu"] == summary["phases"][0]["speedup"]
    assert sparse["ideal"] > half["ideal"] > 1 and sparse["cs2"]["central"] >= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "CS-2, simulated, these masks" in page and "CS-2, simulated, masks by chance" not in page
    assert f"{sparse['cs2']['central']:.2f}x" in page
    first, second = (Run(tmp_path / "run").masks(phase) for phase in (0, 1))
    assert first.keys() == second.keys()
    for name, mask in second.items():
        assert mask.mean() == pytest.approx(1 - half["sparsity"], abs=0.01)
        assert (mask >= first[name]).all()  # weights are only ever added
    (tmp_path / "run" / "patterns-2.npz").unlink()  # as runs of before this file was kept
    _, out, _ = vspdf("simulate", "step", "--run", tmp_path / "run", "--json")
    assert [row["mask"] for row in json.loads(out)["comparison"]] == ["real", "binomial"]


def test_broken_runs_are_one_clear_line(vspdf, tmp_path):
    folder = write_run(tmp_path / "run", masks(0.1))
    assert "Did you mean 'layer0.1'" in vspdf("simulate", "layer", "--run", folder, "--layer", "layer0.l")[2]
    assert "leave --in away" in vspdf("simulate", "layer", "--run", folder, "--in", 3)[2]
    status, out, err = vspdf("simulate", "layer", "--run", folder, "--layer", "layer0.1", "--tokens", 0)
    assert (status, out) == (2, "") and "--tokens must be a whole number of at least 1, not 0" in err
    assert "which of layer0.0" in vspdf("simulate", "layer", "--run", folder)[2]
    assert "holds no run" in vspdf("simulate", "step", "--run", tmp_path)[2]
    (folder / "patterns.npz").write_bytes(b"PK nonsense")
    assert "is damaged" in vspdf("simulate", "step", "--run", folder)[2]
    (folder / "summary.json").write_text("{}")
    assert "cannot be read" in vspdf("simulate", "step", "--run", folder)[2]
    (folder / "summary.json").unlink()
    assert "not finished" in vspdf("simulate", "step", "--run", folder)[2]
