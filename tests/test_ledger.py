"""Golden numbers of the published runs, and the agreement of formulas, counts and PyTorch's own FLOP counter."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import vspdf
from vspdf import ledger
from vspdf.config.loading import load
from vspdf.errors import UserError
from vspdf.ledger import CONVENTIONS, Count, Tally, flops_per_token, training_flops
from vspdf.model import GPT
from vspdf.plan.planner import plan
from vspdf.plan.write import write
from vspdf.shapes import MODELS, Shape
from vspdf.train.trainer import train

BATCH = 1040 * 2048  # tokens a step of the 6.7B run
RECIPE = [(0.9, 62_523 * BATCH), (0.0, 9_379 * BATCH)]  # the published stages


def saved(model, convention, phases=None, **how):
    """Fraction saved by a uniform 75 %, or by `phases` against 62,522 dense steps."""
    phases = phases or [(0.75, 62_522 * BATCH)]
    dense = training_flops(model, tokens=62_522 * BATCH, convention=convention, **how)
    return 1 - training_flops(model, phases, convention=convention, **how) / dense


@pytest.mark.parametrize(
    "convention, fraction",
    [("linear", 0.7500), ("spdf", 0.6570), ("vspdf", 0.6418), ("chinchilla", 0.6341)],
)
def test_the_67b_recipe_under_each_convention(convention, fraction):
    assert saved("cerebras-gpt-6.7b", convention, RECIPE) == pytest.approx(fraction, abs=5e-5)


@pytest.mark.parametrize(
    "model, how, sparsity, times",
    [
        ("gpt3-xl", {}, 0.75, 2.494),
        ("gpt3-xl", {}, 0.50, 1.665),
        ("cerebras-gpt-6.7b", {}, 0.50, 1.813),
        ("gpt2-small", {}, 0.75, 1.81),
        ("gpt2-small", {"sequence_length": 2048}, 0.75, 1.65),
    ],
)
def test_uniform_sparsity_under_spdf(model, how, sparsity, times):
    dense, sparse = (training_flops(model, tokens=1e9, sparsity=s, convention="spdf", **how) for s in (0.0, sparsity))
    assert dense / sparse == pytest.approx(times, abs=0.5 * 10 ** -len(str(times).split(".")[1]))


@pytest.mark.parametrize(
    "model, fraction", [("gpt3-xl", 0.5991), ("cerebras-gpt-6.7b", 0.6725), ("cerebras-gpt-256m", 0.472)]
)
def test_saved_fractions_at_a_uniform_75_percent_under_spdf(model, fraction):
    assert saved(model, "spdf") == pytest.approx(fraction, abs=5e-5 if fraction != 0.472 else 5e-4)


def test_a_dense_weight_gradient_would_save_448_instead_of_6725():
    """Two of a layer's three products would skip masked weights: docs/plan.md."""
    assert saved("cerebras-gpt-6.7b", "spdf") * 2 / 3 == pytest.approx(0.4483, abs=5e-5)


@pytest.mark.parametrize(
    "model, tokens, total",
    [
        ("cerebras-gpt-111m", 2.221e9, "2.6e+18"),
        ("cerebras-gpt-256m", 5.119e9, "1.3e+19"),
        ("cerebras-gpt-590m", 1.181e10, "6.1e+19"),
        ("cerebras-gpt-1.3b", 2.631e10, "2.8e+20"),
        ("cerebras-gpt-2.7b", 5.303e10, "1.1e+21"),
        ("cerebras-gpt-6.7b", 1.332e11, "6.3e+21"),
        ("cerebras-gpt-13b", 2.571e11, "2.3e+22"),
    ],
)
def test_published_totals_to_two_digits(model, tokens, total):
    assert f"{training_flops(model, tokens=tokens, convention='cerebras-card'):.1e}" == total


def test_fine_tuning_on_dart_is_next_to_nothing():
    dart = training_flops("cerebras-gpt-6.7b", tokens=1938 * 32 * 512)
    assert dart / training_flops("cerebras-gpt-6.7b", tokens=62_522 * BATCH) == pytest.approx(0.00024, abs=5e-6)
    assert dart / training_flops("cerebras-gpt-6.7b", RECIPE) == pytest.approx(0.00067, abs=5e-6)


def test_causal_attention_is_half():
    shape = MODELS["gpt2-small"]
    full, half = (flops_per_token(shape, convention="spdf", causal=causal) for causal in (False, True))
    assert full - half == pytest.approx(6 * shape.attention / 2)
    assert flops_per_token(shape, 0.5, "linear", causal=True) == flops_per_token(shape, 0.5, "linear")


def test_sparsity_touches_projections_alone():
    shape = MODELS["gpt2-small"]
    for convention in CONVENTIONS:
        difference = flops_per_token(shape, 0.0, convention) - flops_per_token(shape, 1.0, convention)
        assert difference == pytest.approx(6 * shape.linear)


def test_parameters_of_a_shape_are_those_of_the_model():
    shape = Shape(n_layer=3, d_model=24, n_head=4, d_ff=80, vocab_size=101, sequence_length=17)
    model = GPT(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2)
    assert shape.linear == matrices


@pytest.mark.parametrize(
    "name, millions", [("cerebras-gpt-111m", 111), ("gpt2-small", 124), ("cerebras-gpt-13b", 12853)]
)
def test_presets_have_their_published_size(name, millions):
    assert MODELS[name].parameters / 1e6 == pytest.approx(millions, abs=1)


def pytorchs_count(model, inputs):
    """FLOPs of forward and backward by operator, as `FlopCounterMode` and the registered formulas count them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(inputs, inputs).backward()
    return {str(name).removeprefix("aten."): flops for name, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("split", ["0.9:3,0:2", "0.8:2,0.5:2,0:1", "0:2"], ids=["two stages", "three", "dense"])
def test_planner_trainer_formulas_and_pytorch_agree(tiny, tmp_path, split):
    """Four counts of one run's linear and vocabulary products: before it, during it, and of a step by PyTorch."""
    stages = [(float(s), int(n)) for s, n in (part.split(":") for part in split.split(","))]
    planned = plan(tiny, phases=stages)  # 1: arithmetic
    write(planned, tmp_path / "planned.yaml")
    summary = train(load(tmp_path / "planned.yaml", [f"run_dir={tmp_path}/planned"]))  # 2: counted while training
    shape, tokens = planned.shape, 8 * 16
    assert len(summary["phases"]) == len(planned.phases) == len(stages)

    kept = shape.linear
    model = GPT(shape)
    for stage, phase, (sparsity, steps) in zip(planned.phases, summary["phases"], stages, strict=True):
        if sparsity:
            vspdf.sparsify(model, sparsity) if kept == shape.linear else vspdf.set_sparsity(model, sparsity)
            kept = sum(m.pattern.nnz for m in model.modules() if isinstance(m, vspdf.SparseLinear))
        else:
            vspdf.densify(model)
            kept = shape.linear
        products = 6 * tokens * steps * (kept + shape.vocabulary)
        attention = 6 * tokens * steps * shape.attention

        torchs = pytorchs_count(
            model, torch.randint(257, (8, 16))
        )  # 3: formulas registered for our operators, 4: torch's
        ours = sum(flops for name, flops in torchs.items() if name.startswith("vspdf"))
        matmuls = sum(torchs.get(name, 0) for name in ("mm", "addmm"))
        assert ours == (6 * tokens * kept if sparsity else 0)
        assert steps * (ours + matmuls) == products
        assert steps * torchs["bmm"] == attention  # of the plain attention; see the next test for the fused one

        assert phase["flops"]["useful"] == products + attention
        assert phase["flops"]["dense"] == 6 * tokens * steps * (shape.linear + shape.vocabulary) + attention
        assert phase["flops"]["executed"] >= phase["flops"]["useful"]
        formula = flops_per_token(shape, stage.sparsity, "spdf") * stage.tokens
        assert formula == pytest.approx(products + attention, rel=2e-3)  # the number kept is rounded in each layer
        exact = ledger.training_flops(shape, [(1 - kept / shape.linear, stage.tokens)], convention="spdf")
        assert exact == pytest.approx(products + attention, rel=1e-12)
    spdf = planned.by_convention()["spdf"]
    assert spdf["planned"] == pytest.approx(summary["flops"]["useful"], rel=2e-3)
    saved = summary["flops_saved_fraction_by_convention"]
    assert {name: row["saved_fraction"] for name, row in planned.by_convention().items()} == pytest.approx(saved)


def test_attention_is_two_products_forward_and_four_backward():
    """By our formula. PyTorch counts five backward where attention is fused: scores are computed anew."""
    shape = Shape(n_layer=1, d_model=40, n_head=4, d_ff=160, vocab_size=101, sequence_length=24)
    q = (3, shape.n_head, shape.sequence_length, shape.d_model // shape.n_head)
    forward, backward = sdpa_flop_count(q, q, q), sdpa_backward_flop_count(q, q, q, q)
    assert 3 * forward == 6 * 3 * shape.sequence_length * shape.attention
    assert backward == 2.5 * forward


def test_tallies_collect_from_every_thread():
    def work():
        for _ in range(500):
            ledger.record("forward", 4, 2, 3, 0.5)

    with ledger.counting() as tally:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tally.total == Count(8000, 4000, 6000, 1000.0)
    assert tally.total.flops() == {"dense": 8000, "useful": 4000, "executed": 6000}
    ledger.record("forward", 4, 2, 3, 0.5)
    assert tally.total.dense == 8000
    assert Tally().total == Count()


def test_no_torch_is_needed():
    code = """if True:
        import json, sys, vspdf
        print(json.dumps([vspdf.training_flops("gpt2-small", tokens=1), "torch" in sys.modules]))"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == [training_flops("gpt2-small", tokens=1), False]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: training_flops("gpt2-smal", tokens=1), "unknown model 'gpt2-smal'. Did you mean 'gpt2-small'?"),
        (lambda: training_flops("gpt2-small", tokens=1, convention="spfd"), "convention 'spfd'. Did you mean 'spdf'?"),
        (lambda: training_flops("gpt2-small", tokens=1, sparsity=1.2), r"sparsity must lie in \[0, 1\], not 1.2"),
        (lambda: training_flops("gpt2-small"), r"needs `tokens`, or `phases` as \(sparsity, tokens\) pairs"),
    ],
    ids=["model", "convention", "sparsity", "nothing"],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


ODD = {
    "both forms": {"phases": [(0.9, 1e9)], "tokens": 5e9},
    "a sparsity beside phases": {"phases": [(0.9, 1e9)], "sparsity": 0.5},
    "fewer tokens than none": {"tokens": -5e9},
    "no number of tokens": {"tokens": float("nan")},
    "a negative length": {"tokens": 1e9, "sequence_length": -2048},
    "half a token of length": {"tokens": 1e9, "sequence_length": 2.5},
}


@pytest.mark.parametrize("how", ODD.values(), ids=ODD)
def test_what_training_flops_cannot_honour_is_refused(how):
    with pytest.raises(UserError):
        training_flops("gpt3-xl", **how)
