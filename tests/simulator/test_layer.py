"""The weight-streaming law of one layer: its parts, its mappings, and what a user gets of them."""

import itertools
import json

import numpy as np
import pytest

import vspdf as package
from vspdf.errors import UserError
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate import estimates, layer
from vspdf.simulator.aggregate.layer import PRODUCTS, Mapping, Weights
from vspdf.simulator.events import layer as events_layer

CS2 = machines.load("cs2")
CLOCK = CS2.clocks["0.85GHz"]
TOKENS = 65536


def big(sparsity, mask=None):
    return Weights(12288, 12288, 1 - sparsity, mask)


def speedups(sparsity, tokens=TOKENS):
    return estimates.simulate_layer(CS2, big(sparsity), tokens, sensitivity=False, samples=24)["speedup"]


@pytest.mark.parametrize("transposed", [False, True])
def test_counts_are_those_of_the_mask(transposed):
    mask = np.random.default_rng(0).random((30, 50)) < 0.3
    counts = Weights(30, 50, float(mask.mean()), mask).counts(7, transposed)
    turned = mask.T if transposed else mask
    edges = np.linspace(0, turned.shape[1], 8).round().astype(int)
    slow = [[row[a:b].sum() for a, b in itertools.pairwise(edges)] for row in turned]
    assert np.array_equal(counts, slow)


def test_a_lopsided_mask_is_slower_than_an_even_one():
    even = np.zeros((512, 512), bool)
    even[:, ::8] = True
    lopsided = np.zeros((512, 512), bool)
    lopsided[:, :64] = True  # all in the first columns
    costs = [
        layer.product_cost(CS2, CLOCK, Weights(512, 512, 1 / 8, m), Mapping.of(CS2, 64, 4096), "forward")
        for m in (even, lopsided)
    ]
    assert costs[0].parts["imbalance"] == pytest.approx(0, abs=1e-6 * costs[0].cycles)
    assert costs[1].cycles > 1.5 * costs[0].cycles


# ---- products and mappings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_parts_add_up_to_the_cycles(product, density):
    weights = Weights(3000, 1000, density)
    for tokens in (8, 4096, 500_000):
        cost = layer.product_cost(CS2, CLOCK, weights, Mapping.of(CS2, 250, tokens), product)
        assert sum(cost.parts.values()) == pytest.approx(cost.cycles)
        assert cost.cycles >= cost.io


def test_few_tokens_wait_for_the_host():
    """12288² dense weights of 4 bytes at 150 GB/s: 4.03 ms, and no product can be faster."""
    result = estimates.simulate_layer(CS2, big(0), 256)
    assert result["bound_by"] == "I/O"
    assert result["seconds"]["0.85GHz"]["dense"] == pytest.approx(3 * 12288**2 * 4 / 150e9, rel=0.01)
    # Seconds of I/O do not depend on the clock.
    assert result["seconds"]["1.1GHz"]["dense"] == pytest.approx(result["seconds"]["0.85GHz"]["dense"], rel=0.02)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
def test_no_mapping_beats_the_one_found(density):
    weights = big(1 - density)
    found = layer.estimate_layer(CS2, CLOCK, weights, TOKENS)
    limit = CS2.activation_share * CS2.sram_bytes
    for columns in layer.candidates(CS2, 12288):
        mapping = Mapping.of(CS2, columns, TOKENS)
        if layer.layer_bytes(mapping, weights) <= limit:
            costs = layer.product_costs(CS2, CLOCK, weights, mapping)
            assert found.total.cycles <= sum(cost.cycles for cost in costs.values()) + 1e-6


def test_dense_and_sparse_get_mappings_of_their_own():
    mapping = estimates.simulate_layer(CS2, big(0.99), TOKENS, sensitivity=False, samples=24)["mapping"]
    assert mapping["sparse"]["columns"] != mapping["dense"]["columns"]


def test_a_mapping_holds_all_tokens():
    for columns in layer.candidates(CS2, 768):
        for tokens in (1, 1000, 2048, 777_777):
            m = Mapping.of(CS2, columns, tokens)
            assert m.columns * m.replicas <= CS2.width and m.rows <= CS2.height
            assert m.local * m.rows * m.replicas >= tokens


# ---- what comes out --------------------------------------------------------------------------------------------------

GRID = (0.0, 0.1, 0.25, 0.5, 0.7, 0.75, 0.8, 0.9, 0.95, 0.97, 0.98)


@pytest.mark.parametrize("tokens", [2048, TOKENS, 240_000])
def test_speedup_is_monotone_and_within_the_ideal(tokens):
    results = [speedups(s, tokens) for s in GRID]
    for key in ("low", "central", "high"):
        values = [r[key] for r in results]
        assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(values)), (key, values)
    for r in results:
        assert r["low"] <= r["central"] <= r["high"] <= r["ideal"] * (1 + 1e-9)
    assert all(results[0][key] == 1 for key in ("low", "central", "high", "ideal"))


def test_the_gain_collapses_above_99_percent_for_the_right_reason():
    """V9: beyond 99 %, work per non-zero other than its multiply-adds is over half of the time."""
    for sparsity in (0.99, 0.995, 0.999):
        result = estimates.simulate_layer(CS2, big(sparsity), TOKENS, sensitivity=False, samples=24)
        assert result["overhead"]["sparse"] > 0.5
    at_98, at_999 = speedups(0.98), speedups(0.999)
    assert at_999["central"] < 3 * at_98["central"]  # twenty times fewer weights
    assert at_98["central"] / at_98["ideal"] > 5 * at_999["central"] / at_999["ideal"]
    # No cause of its own: without start-up, commands and synchronisation the gain goes on.
    free = CS2.override(
        {"reduce_startup": 0, "hop_cycles": 0, "ramp_cycles": 0, "trigger_cycles": 0, "vector_startup": 0}
    )
    dense, sparse = (layer.estimate_layer(free, CLOCK, big(s), TOKENS).total.cycles for s in (0, 0.999))
    assert dense / sparse > 2 * at_999["central"]


def test_cycles_and_speedups_agree():
    result = estimates.simulate_layer(CS2, big(0.9), TOKENS)
    for key in ("low", "central", "high"):
        assert result["cycles"]["dense"] / result["cycles"]["sparse"][key] == pytest.approx(
            result["speedup"][key], rel=1e-5
        )
    spans = [abs(row["speedup"]["high"] - row["speedup"]["low"]) for row in result["tornado"]]
    assert spans == sorted(spans, reverse=True) and spans[0] > 0
    assert sum(result["parts"].values()) == pytest.approx(1) and result["central"].startswith("c0 = 5")


def test_a_layer_that_does_not_fit_says_how_many_tokens_do():
    with pytest.raises(UserError, match=r"does not fit cs2 .* tokens fit") as error:
        estimates.simulate_layer(CS2, big(0.9), 10_000_000)
    most = int(str(error.value).split(" tokens fit")[0].split()[-1].replace(",", ""))
    estimates.simulate_layer(CS2, big(0.9), most, sensitivity=False)
    with pytest.raises(UserError, match="does not fit"):
        estimates.simulate_layer(CS2, big(0.9), int(most * 1.01))


@pytest.mark.parametrize(
    "key, value, sparsity, tokens",
    [
        ("width", 400, 0.9, TOKENS),
        ("height", 500, 0.9, TOKENS),
        ("clock_sdk", 0.5, 0.9, 256),
        ("clock_hot_chips", 2.0, 0.9, TOKENS),
        ("hop_cycles", 3, 0.9, TOKENS),
        ("ramp_cycles", 9, 0.9, TOKENS),
        ("router_buffer", 20, 0.9, TOKENS),
        ("in_queue_depth", [20, 6, 4, 4, 2, 2, 2, 2], 0.9, TOKENS),
        ("fmac_fp16_rate", 2, 0.9, TOKENS),
        ("trigger_cycles", 9, 0.9, TOKENS),
        ("reduce_startup", 60, 0.9, TOKENS),
        ("host_bandwidth", 1e9, 0.9, TOKENS),
        ("sparse_weight_bytes", 8, 0.9, 256),
        ("dense_weight_bytes", 2, 0, 256),
        ("gradient_bytes", 8, 0.9, 256),
        ("sram_bytes", 13_275, 0.9, TOKENS),
        ("activation_share", 0.135, 0.9, TOKENS),
        ("sum_bytes", 4, 0.9, TOKENS),
        ("edge_links", 5, 0.9, TOKENS),
        ("sums_held", 8, 0.9, TOKENS),
        ("gradient_wait", 0, 0.9, TOKENS),
        ("command_cycles", 9, 0.9, TOKENS),
    ],
)
def test_every_parameter_is_live(key, value, sparsity, tokens):
    keys = ("cycles", "seconds", "speedup")
    machines_ = (CS2, CS2.override({key: value}))
    before, after = (
        estimates.simulate_layer(m, big(sparsity), tokens, sensitivity=False, samples=24) for m in machines_
    )
    assert [before[k] for k in keys] != [after[k] for k in keys]


# ---- the command line ------------------------------------------------------------------------------------------------


def test_layer_on_the_command_line(vspdf, tmp_path):
    picture = tmp_path / "speedup.png"
    sizes = ("--tokens", 4096, "--in", 1024, "--out", 4096, "--sparsity", 0.75)
    status, out, err = vspdf("simulate", "layer", *sizes, "--json", "--plot", picture, "--set", "trigger_cycles=10")
    assert status == 0, err
    result = json.loads(out)
    assert result["central"].startswith("c0 = 10") and picture.stat().st_size > 10_000
    assert result["speedup"]["ideal"] == pytest.approx(4)
    status, out, _ = vspdf("simulate", "layer", *sizes)
    assert status == 0 and "Speed-up" in out and "what moves the speed-up most" in out


def test_layers_are_drawn_from_python_too(tmp_path):
    sizes = {"tokens": 16, "in_features": 8, "out_features": 8, "sparsity": 0.5}
    page = tmp_path / "page.html"
    assert package.simulate("layer", level="event", plot=page, **sizes)["level"] == "event" and page.stat().st_size
    with pytest.raises(UserError, match=r"ends in \.png"):
        package.simulate("layer", plot=page, **sizes)
    with pytest.raises(UserError, match="there is no folder"):
        package.simulate("layer", plot=tmp_path / "no" / "x.png", **sizes)
    with pytest.raises(UserError, match="leave trace away"):
        package.simulate("layer", trace=tmp_path / "x.json", **sizes)
    with pytest.raises(UserError, match="give a `sparsity` or a `sweep`"):
        package.simulate("step", model="gpt2-small", batch=1, plot=page.with_suffix(".png"))


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_both_levels_answer_the_same_question(vspdf, sparsity):
    sizes = ("--tokens", 128, "--in", 192, "--out", 256, "--sparsity", sparsity)
    results = {}
    for level in ("event", "aggregate"):
        status, out, err = vspdf("simulate", "layer", *sizes, "--level", level, "--json")
        assert status == 0, err
        results[level] = json.loads(out)
    event, closed = results["event"], results["aggregate"]
    assert event["level"] == "event" and event["region"]["columns"] == event["mapping"]["sparse"]["columns"]
    assert "stands for the wafer" in event["why"]
    for pair in event["products"].values():
        for kind in pair.values():
            assert kind["aggregate"] == pytest.approx(kind["cycles"], rel=0.15)
    assert event["cycles"]["dense"] == pytest.approx(closed["cycles"]["dense"], rel=0.1)
    assert event["speedup"]["central"] == pytest.approx(closed["speedup"]["central"], rel=0.1)
    assert 1 <= event["speedup"]["central"] < event["speedup"]["ideal"]


@pytest.mark.parametrize(
    "tokens, n_in, n_out, sparsity",
    [(20_000, 64, 512, 0.9), (4096, 256, 256, 0.9), (20_000, 512, 64, 0.9), (6000, 96, 160, 0.5)],
)
def test_the_levels_agree_on_tall_mappings_too(tokens, n_in, n_out, sparsity, tmp_path):
    """The last sums of grad_values come down all rows, of which one runs; a picture of four changes no figure."""
    weights = layer.Weights(n_out, n_in, 1 - sparsity)
    result = events_layer.event_layer(CS2, weights, tokens)
    assert min(mapping["rows"] for mapping in result["mapping"].values()) > 200
    for name, pair in result["products"].items():
        for kind, cost in pair.items():
            assert cost["cycles"] == pytest.approx(cost["aggregate"], rel=0.1), (name, kind)
    assert events_layer.event_layer(CS2, weights, tokens, tmp_path / "page.html") == result


def test_a_small_layer_in_print(vspdf):
    sizes = ("--tokens", 32, "--in", 32, "--out", 32, "--sparsity", 0.75, "--level", "event")
    status, out, err = vspdf("simulate", "layer", *sizes)
    assert status == 0 and "level 1 on" in out and "ideal" in out, err


@pytest.mark.parametrize("shape", [(5, 3), (96, 300), (3, 17)], ids=["fewer inputs than PEs", "large", "odd"])
def test_a_corner_of_a_mask_at_work(shape):
    mask = np.random.default_rng(0).random(shape) < 0.3
    part = events_layer.corner(CS2, mask)
    kept = mask[: part.outputs, : part.features]
    assert part.outputs == min(96, shape[0]) and part.features <= min(256, shape[1]) < part.features + 16
    assert part.density == kept.mean() and part.cycles < part.dense_cycles
    stats = part.region.stats
    assert stats["fmacs"].sum() == kept.sum() * events_layer.ROWS * events_layer.LOCAL
    assert len(part.region.trace_events())


def test_a_layer_of_one_input_has_no_corner():
    with pytest.raises(UserError, match="nothing to share"):
        events_layer.corner(CS2, np.ones((4, 1), bool))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("layer", "--tokens", 9, "--in", 1, "--out", 9, "--level", "event"), "at least 2 features"),
        (("layer", "--tokens", 8, "--in", 8, "--out", 8, "--level", "event", "--set", "sum_bytes=4"), "up in fp16"),
        (("layer", "--tokens", 4096, "--in", 4096, "--out", 4096, "--level", "event"), "take fewer features"),
        (
            ("layer", "--tokens", 9, "--in", 9, "--out", 9, "--level", "evnt"),
            "--level = 'evnt' is not known. Did you mean 'event'?",
        ),
        (("layer", "--tokens", 0, "--in", 9, "--out", 9), "must be a whole number of at least 1"),
        (("layer",), "expected --tokens, --in and --out"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--sparsity", 1), "sparsity must lie in"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--set", "trigger_cycle=1"), "Did you mean 'trigger_cycles'"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--machine", "cs4"), "no machine 'cs4'"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--sparsity", 75), "Did you mean 0.75?"),
        (("layer", "--tokens", 10**9, "--in", 4096, "--out", 4096), "does not fit"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--plot", "x.txt"), "expected a name that ends in"),
    ],
)
def test_errors_are_one_line(vspdf, arguments, message):
    status, _, err = vspdf("simulate", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1
