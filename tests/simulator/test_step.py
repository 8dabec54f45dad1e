"""A training step on the wafer: its sums, its mapping, its parameters, and real masks."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from vspdf.errors import UserError
from vspdf.ledger import flops_per_token
from vspdf.plan import outlook
from vspdf.plan.cs2 import step_by_request
from vspdf.plan.wafer_models import transformer
from vspdf.shapes import MODELS, Shape, named_shape
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate import band, estimates, step
from vspdf.simulator.aggregate.model import MASKED, Model, Transformer, matrices

CS2 = machines.load("cs2")
CLOCK = CS2.clocks["0.85GHz"]
TINY = Shape(n_layer=2, d_model=64, n_head=4, d_ff=256, vocab_size=500, sequence_length=128)


def simulate(name="gpt3-xl", batch=121, sparsity=0.0, systems=1, machine=CS2, **how):
    shape = MODELS[name] if isinstance(name, str) else name
    model = Model.uniform(shape, batch, sparsity, systems)
    return estimates.simulate_step(machine, model, **({"sensitivity": False, "samples": 24} | how))


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_flops_are_the_ledgers(sparsity):
    model = Model.uniform(named_shape("gpt3-xl"), 10, sparsity)
    expected = 10 * 2048 * flops_per_token(model.shape, sparsity, "spdf")
    assert model.flops() == pytest.approx(expected)
    estimate = step.search(CS2, CLOCK, model)
    assert 2 * estimate.total.macs == pytest.approx(expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_runs_below_the_peak_and_above_a_tenth_of_it(name):
    shape = MODELS[name]
    shape = replace(shape, sequence_length=min(shape.sequence_length, 8192))  # of more, one does not fit the wafer
    model = Model.uniform(shape, 256, 0.75)
    dense, sparse = (step.search(CS2, CLOCK, m) for m in (model.dense, model))
    peak = CS2.width * CS2.height * 8 * CLOCK
    assert 0.1 < model.flops(dense=True) / (dense.seconds - CS2.step_overhead) / peak < 0.6
    assert 1 < dense.seconds / sparse.seconds < model.flops(dense=True) / model.flops()


def test_parts_add_up():
    result = simulate(sparsity=0.9)
    for kind, total in (("dense", result["cycles"]["dense"]), ("sparse", result["cycles"]["sparse"]["central"])):
        assert sum(part[kind]["cycles"] for part in result["breakdown"].values()) == pytest.approx(total, rel=1e-6)
        products = sum(product[kind]["cycles"] for product in result["products"].values())
        assert products == pytest.approx(result["breakdown"]["linear layers"][kind]["cycles"], rel=1e-6)
        for part in result["breakdown"].values():
            assert sum(part[kind]["parts"].values()) == pytest.approx(part[kind]["cycles"], abs=10)
    seconds = result["seconds"]["0.85GHz"]["dense"]
    assert result["samples_per_second"]["dense"] == pytest.approx(121 / seconds)
    assert result["tokens_per_second"]["dense"] == pytest.approx(121 * 2048 / seconds)
    joules = result["energy"]["dense"]["joules_per_step"]
    assert joules == pytest.approx([15e3 * seconds, 23e3 * seconds])


def test_speedup_is_monotone_and_never_beyond_the_ideal():
    results = [simulate(sparsity=s)["speedup"] for s in (0.0, 0.25, 0.5, 0.75, 0.9, 0.98)]
    for key in ("low", "median", "central", "high"):
        values = [r[key] for r in results]
        assert values == sorted(values), (key, values)
    assert all(r["high"] <= r["ideal"] * (1 + 1e-9) for r in results)
    assert results[0]["low"] == results[0]["high"] == 1


def test_no_placement_beats_the_one_found():
    model = Model.uniform(named_shape("gpt2-small"), 480, 0.9)
    found = step.search(CS2, CLOCK, model)
    for place in step.placements(CS2, model):
        other = step.estimate(CS2, CLOCK, model, place)
        assert found.total.cycles <= other.total.cycles + 1e-6


def test_two_systems_halve_the_work_of_each():
    one, two = simulate(batch=120), simulate(batch=240, systems=2)
    seconds = [r["seconds"]["0.85GHz"]["dense"] for r in (one, two)]
    assert seconds[0] < seconds[1] == pytest.approx(seconds[0], rel=1e-3)  # gradients meet
    assert two["samples_per_second"]["dense"] == pytest.approx(2 * one["samples_per_second"]["dense"], rel=1e-3)
    joules = [r["energy"]["dense"]["joules_per_token"] for r in (one, two)]
    assert joules[1] == pytest.approx(joules[0], rel=1e-3)
    with pytest.raises(UserError, match="3 systems share a batch of 2"):
        simulate(batch=2, systems=3)


def test_a_small_batch_waits_for_weights():
    model = Model.uniform(named_shape("cerebras-gpt-13b"), 1)
    found = step.search(CS2, CLOCK, model)
    assert found.parts["linear layers"].io > 0.2 * found.total.cycles
    slow = CS2.override({"host_bandwidth": 2e10})
    assert step.search(slow, CLOCK, model).total.bound_by == "I/O"


def test_what_does_not_fit_is_said():
    with pytest.raises(
        UserError, match=r"does not fit cs2 with activation_share=0.0001: the activations of one sequence"
    ):
        simulate(machine=CS2.override({"activation_share": 1e-4}))


# ---- for people who decide -------------------------------------------------------------------------------------------


def test_the_band_holds_and_says_what_it_is_made_of():
    result = simulate("cerebras-gpt-1.3b", 132, 0.75, samples=48, sensitivity=True)
    s = result["speedup"]
    assert s["low"] <= s["interval50"][0] <= s["median"] <= s["interval50"][1] <= s["high"] <= s["ideal"]
    assert s["low"] <= s["central"] <= s["high"] and s["high"] > 1.1 * s["low"]
    assert sum(result["parts"].values()) == pytest.approx(1) and "together" in result["parts"]
    assert {row["parameter"] for row in result["tornado"]} == set(band.unknown(CS2))
    again = simulate("cerebras-gpt-1.3b", 132, 0.75, samples=48, sensitivity=True)
    assert again["speedup"] == s and again["parts"] == result["parts"]  # seeded
    known = machines.Machine({k: replace(p, range=None) for k, p in CS2.parameters.items()})
    certain = simulate("cerebras-gpt-1.3b", 132, 0.75, machine=known)["speedup"]
    assert certain["low"] == certain["high"] == pytest.approx(s["central"])


def test_what_is_set_is_known():
    names = band.unknown(CS2.override({"trigger_cycles": 50}))
    assert "trigger_cycles" not in names and len(names) == len(band.unknown(CS2)) - 1


def test_half_of_the_samples_lie_below_the_stated_value():
    assert [band.at(CS2, "trigger_cycles", q) for q in (0, 0.5, 1)] == [0, 5, 21]
    _, quantiles = band.draws(CS2, 40, 0)
    assert ((np.sort(quantiles, axis=0) * 40).astype(int) == np.arange(40)[:, None]).all()  # a Latin hypercube


def test_a_batch_that_just_does_not_fit_is_advised_against():
    worse = step_by_request(CS2, model="cerebras-gpt-13b", batch=66)
    better = worse["better_batch"]
    assert better["gain"] >= 0.02 and abs(better["batch"] - 66) <= 17
    rate = step_by_request(CS2, model="cerebras-gpt-13b", batch=better["batch"])["tokens_per_second"]["dense"]
    assert rate == pytest.approx(better["tokens_per_second"], rel=0.02) and rate > worse["tokens_per_second"]["dense"]


def test_a_whole_training_in_time_and_energy(vspdf, tmp_path):
    picture = tmp_path / "sweep.png"
    arguments = ("--model", "gpt2-small", "--batch", 64, "--sparsity", 0.75, "--tokens", "2.5e9")
    sweep = ("--sweep", "sparsity=0,0.9", "--plot", picture)
    status, out, err = vspdf("simulate", "step", *arguments, *sweep, "--json")
    assert status == 0, err
    result = json.loads(out)
    seconds = 2.5e9 / result["tokens_per_second"]["dense"]
    assert result["training_seconds"]["dense"] == pytest.approx(seconds)
    assert result["energy_kwh"]["dense"] == pytest.approx(19 * seconds / 3600)
    assert result["energy_kwh"]["sparse"]["central"] < result["energy_kwh"]["dense"]
    assert [row["sparsity"] for row in result["rows"]] == [0, 0.9] and picture.stat().st_size > 5_000
    speedups = [row["speedup"]["central"] for row in result["rows"]]
    assert speedups[0] == 1 and speedups == sorted(speedups)
    assert result["beside"]["gpu"]["tokens_per_second"] > 100 * result["beside"]["cpu"]["tokens_per_second"] > 0
    picture.unlink()
    status, out, err = vspdf("simulate", "step", *arguments, "--plot", picture)
    assert status == 0 and picture.stat().st_size > 5_000, err
    assert "kWh" in out and "A100" in out


LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "vocab_size": 1000,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def test_any_hugging_face_folder_llamas_included(vspdf, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shape, batch = transformer(str(tmp_path))
    assert batch is None and shape.gated and shape.d_kv == 64 and shape.d_attention == 256
    assert shape.linear == 3 * (256 * (256 + 2 * 64) + 256 * 256 + 3 * 256 * 688)
    assert shape.parameters == shape.linear + 2 * 1000 * 256 + 7 * 256
    status, out, err = vspdf("simulate", "step", "--model", tmp_path, "--batch", 32, "--sparsity", 0.9, "--json")
    assert status == 0, err
    assert json.loads(out)["speedup"]["central"] > 1
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_key_value_heads": 3}))
    status, _, err = vspdf("simulate", "step", "--model", tmp_path, "--batch", 32)
    assert status == 2 and "n_kv_head = 3 does not divide model.n_head = 8" in err
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mamba"}))
    assert "model_type 'mamba' is not known" in vspdf("simulate", "step", "--model", tmp_path, "--batch", 32)[2]


def test_grouped_heads_and_a_gate_cost_what_their_matrices_do():
    plain = Transformer(4, 512, 8, 2048, 1000, 256)
    grouped, gated = replace(plain, n_kv_head=2), replace(plain, mlp="swiglu")
    seconds = [step.search(CS2, CLOCK, Model.uniform(s, 2048)).seconds for s in (grouped, plain, gated)]
    assert seconds == sorted(seconds) and seconds[0] < seconds[2]
    masked = step.search(CS2, CLOCK, Model.uniform(replace(plain, vocab_size=60_000, predicted=MASKED), 2048))
    whole = step.search(CS2, CLOCK, Model.uniform(replace(plain, vocab_size=60_000), 2048))
    assert masked.parts["vocabulary"].cycles < 0.6 * whole.parts["vocabulary"].cycles


# ---- real masks ------------------------------------------------------------------------------------------------------


def masks(shape, density, seed=0):
    random = np.random.default_rng(seed)
    return {
        f"layer{i}.{j}": random.random(sides) < density
        for i, sides in enumerate(matrices(shape))
        for j in range(shape.n_layer)
    }


def test_random_masks_cost_what_chance_expects():
    shape = Shape(4, 512, 8, 2048, 257, 256)
    chance = estimates.simulate_step(CS2, Model.uniform(shape, 512, 0.9), sensitivity=False, samples=24)
    real = estimates.simulate_step(CS2, Model.of_patterns(shape, masks(shape, 0.1), 512), sensitivity=False, samples=24)
    assert real["mask"] == "real"
    for key in ("low", "central", "high", "ideal"):
        assert real["speedup"][key] == pytest.approx(chance["speedup"][key], rel=0.05)


def test_a_sweep_of_batches_keeps_the_masks():
    model = Model.of_patterns(TINY, masks(TINY, 0.1), 8)
    rows = outlook.sweep(CS2, model, "batch", [4, 8])
    assert [row["batch"] for row in rows] == [4, 8] and all(row["speedup"]["ideal"] > 1.5 for row in rows)


def test_a_lopsided_mask_gains_less():
    shape = Shape(4, 512, 8, 2048, 257, 256)
    even = masks(shape, 0.25)
    lopsided = {}
    for name, mask in even.items():
        lopsided[name] = np.zeros_like(mask)
        lopsided[name][:, : mask.shape[1] // 4] = True
    models = [Model.of_patterns(shape, p, 512) for p in (even, lopsided)]
    whole, *seconds = (step.search(CS2, CLOCK, m).seconds - CS2.step_overhead for m in (models[0].dense, *models))
    assert whole > 1.05 * seconds[1] > 1.1 * seconds[0]


def test_matrices_without_a_mask_are_dense():
    some = dict(list(masks(TINY, 0.1).items())[:3])
    model = Model.of_patterns(TINY, some, 8)
    assert sum(w.numel * n for w, n in model.layers) == TINY.linear
    kept = sum(m.sum() for m in some.values()) + TINY.linear - sum(m.size for m in some.values())
    assert model.kept * TINY.linear == pytest.approx(kept)


# ---- parameters, command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [
        ("elementwise_passes", 100),
        ("exchange_latency", 1.0),
        ("swarm_fanout", 2),
        ("memory_bandwidth", 1e11),
        ("update_bytes", 1e5),
        ("system_jitter", 0.1),
        ("step_overhead", 0.2),
        ("sum_bytes", 4),
        ("edge_links", 10),
        ("sums_held", 8),
        ("command_cycles", 30),
        ("gradient_wait", 1.0),
        ("activation_share", 0.2),
        ("reduce_startup", 60),
        ("trigger_cycles", 9),
        ("host_bandwidth", 1e9),
        ("dense_weight_bytes", 8),
        ("sparse_weight_bytes", 32),
        ("gradient_bytes", 8),
        ("clock_hot_chips", 2.0),
    ],
)
def test_every_parameter_is_live(key, value):
    assert moved(CS2) != moved(CS2.override({key: value}))


def moved(machine):
    model = Model.uniform(named_shape("gpt2-small"), 256, 0.9, systems=3)
    return [step.search(machine, clock, m).seconds for clock in machine.clocks.values() for m in (model, model.dense)]


@pytest.mark.parametrize("key, place", [("power_low", 0), ("power_high", 1)])
def test_power_is_live(key, place):
    before, after = (simulate(TINY, 8, 0.9, machine=m)["energy"] for m in (CS2, CS2.override({key: 1e6})))
    for kind in ("dense", "sparse"):
        a, b = (energy[kind]["joules_per_token"] for energy in (before, after))
        assert b[place] > a[place] and b[1 - place] == a[1 - place]


def test_step_on_the_command_line(vspdf):
    arguments = ("step", "--model", "gpt2-small", "--batch", 64, "--sequence", 512, "--sparsity", 0.75)
    status, out, err = vspdf("simulate", *arguments, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["sequence_length"] == 512 and result["batch"] == 64
    assert {"cycles", "speedup", "samples_per_second", "tokens_per_second", "bound_by"} <= result.keys()
    assert result["bound_by"] in ("compute", "reduction", "broadcast", "I/O", "latency", "fixed")
    assert result["parts"] and sum(result["parts"].values()) == pytest.approx(1)
    status, out, _ = vspdf("simulate", *arguments)
    assert status == 0 and "samples/s" in out and "what moves the speed-up most" in out and out.count("\n") < 40
    status, out, _ = vspdf("simulate", *arguments, "--details")
    assert status == 0 and "J a token" in out and "grad_values" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "expected --model NAME or --run RUN"),
        (("--model", "gpt3-xxl", "--batch", 1), "Did you mean 'gpt3-xl'"),
        (("--model", "gpt3-xl"), "how many sequences"),
        (("--model", "gpt3-xl", "--batch", 0), "--batch must be a whole number of at least 1"),
        (("--model", "gpt3-xl", "--batch", 1, "--sparsity", 1), "sparsity must lie in"),
        (("--model", "gpt3-xl", "--batch", 1, "--level", "event"), "at the aggregate level only"),
        (("--model", "gpt3-xl", "--batch", 1, "--systems", 2), "2 systems share a batch of 1"),
        (("--model", "gpt3-xl", "--batch", 1, "--sequence", 4096), "positions for 2048 tokens"),
        (("--model", "gpt3-xl", "--batch", 1, "--sparsity", 75), "Did you mean 0.75?"),
        (("--model", "gpt3-xl", "--batch", 1, "--sweep", "sparsity"), "expected NAME=VALUES"),
        (("--model", "gpt3-xl", "--batch", 1, "--sweep", "sparsty=0"), "Did you mean 'sparsity'?"),
        (("--model", "gpt3-xl", "--batch", 1, "--sweep", "batch=1,x"), "expected numbers with commas"),
        (("--model", "gpt3-xl", "--batch", 1, "--sweep", "systems=0"), "whole numbers of at least 1"),
        (("--model", "gpt3-xl", "--batch", 1, "--plot", "x.png"), "give a --sparsity or a --sweep"),
        (("--model", "gpt3-xl", "--batch", 1, "--plot", "x.txt"), "expected a name that ends in"),
        (("--model", "gpt3-xl", "--batch", 1, "--tokens", 0), "--tokens must be at least 1"),
    ],
)
def test_errors_are_one_line(vspdf, arguments, message):
    status, _, err = vspdf("simulate", "step", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def test_the_same_from_python():
    import vspdf

    result = vspdf.simulate("step", model="gpt2-small", batch=8, sparsity=0.9, machine="cs2")
    assert result["speedup"] == simulate("gpt2-small", 8, 0.9, samples=band.SAMPLES)["speedup"]
    layer_result = vspdf.simulate("layer", tokens=1024, in_features=512, out_features=512, sparsity=0.5)
    assert layer_result["speedup"]["ideal"] == 2
    with pytest.raises(UserError, match="unexpected keyword argument 'token'"):
        vspdf.simulate("layer", token=3)


def test_the_simulator_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['vspdf._C'] = None\n"
        "from vspdf.simulator import machine\nfrom vspdf.simulator.aggregate import estimates\n"
        "from vspdf.simulator.aggregate.model import Model\nfrom vspdf.shapes import MODELS\n"
        "model = Model.uniform(MODELS['gpt2-small'], 64, 0.9)\n"
        "assert estimates.simulate_step(machine.load(), model, sensitivity=False, samples=24)['speedup']['central'] > 1"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
