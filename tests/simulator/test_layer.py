"""The weight-streaming law of one layer: its parts, its mappings, and what a user gets of them."""

import itertools
import json

import numpy as np
import pytest

import vspdf as package
from vspdf.errors import UserError
from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate import estimates, layer
from vspdf.simulator.aggregate.layer import PRODUCTS, Assumption, Law, Mapping, Weights
from vspdf.simulator.events import layer as events_layer

CS2 = machines.load("cs2")
CLOCK = CS2.clocks["0.85GHz"]
TOKENS = 65536


def big(sparsity, mask=None):
    return Weights(12288, 12288, 1 - sparsity, mask)


def speedups(sparsity, tokens=TOKENS):
    return estimates.simulate_layer(CS2, big(sparsity), tokens, sensitivity=False)["speedup"]


# ---- the law ---------------------------------------------------------------------------------------------------------


def test_a_row_by_hand():
    law = Law(start_up=5, vector=4, words=8, command=20)
    assert law(16) == 16 * (5 + 4) + 20  # the sums' 8 words fit into 16 start-ups
    assert law(1) == max(9, 4 + 8) + 20  # one start-up does not hide them
    assert Law(0, 1, 1, 0)(30) == 31  # a link takes one wavelet a cycle, the command among them
    assert Law(0, 4, 8, 20, sums=1)(16) == 16 * 5 + 8 + 20  # the gradient's sums pass every core


def test_parts_add_up_to_the_law():
    for law in (Law(5, 4, 8, 20), Law(0, 1, 1, 0), Law(0, 4, 30, 20, 1)):
        for z in (0.0, 0.3, 4.0, 100.0):
            assert sum(law.attribute(z, 7).values()) == pytest.approx(7 * law(z))


def test_lock_step_is_the_published_example():
    """K/P_x = 16 at 90 %, 750 columns: the fullest has 6.3 weights, the average 1.6 (cs2.md)."""
    assert layer.pace("lock-step", 10, 16, 0.1, 750, 10_000) == pytest.approx(6.3, abs=0.05)
    assert layer.pace("decoupled", 10, 16, 0.1, 750, 10_000) == pytest.approx(1.6, rel=0.04)


def simulated_pace(block, density, columns, queue, rows=500):
    """Columns with real queues, weight by weight: a stream that stops where the slowest column's queue is full."""
    z = np.random.default_rng(0).binomial(block, density, (rows, columns))
    arrived = np.cumsum(z, axis=0)
    done = np.zeros((columns, arrived[-1].max() + 1))  # when each weight was consumed
    free, gate, gates = np.zeros(columns), 0.0, []
    for row in range(rows):
        free = np.maximum(free, gate)
        for k in range(z[row].max()):
            more = z[row] > k
            free = np.where(more, free + 1, free)
            done[more, (arrived[row] - z[row])[more] + k + 1] = free[more]
        gate = max(gate, done[np.arange(columns), np.maximum(arrived[row] - queue, 0)].max())
        gates.append(gate)
    return (gates[-1] - gates[rows // 2]) / (rows - 1 - rows // 2)


@pytest.mark.parametrize("block, density, columns", [(17, 0.5, 300), (17, 0.1, 300), (66, 0.1, 100)])
@pytest.mark.parametrize("queue", [6, 10])
def test_slack_bounds_a_simulation_of_queues(block, density, columns, queue):
    simulated = simulated_pace(block, density, columns, queue)
    assert simulated * 0.97 < layer.pace("slack", queue, block, density, columns, 10_000) < 1.2 * simulated


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("block", [1, 16, 200])
def test_policies_are_ordered_and_above_the_mean(block, density):
    paces = [layer.pace(policy, 10, block, density, 200, 4096) for policy in ("decoupled", "slack", "lock-step")]
    assert block * density <= paces[0] <= paces[1] * (1 + 1e-9)
    assert paces[1] <= paces[2] <= block


def test_a_longer_queue_costs_less():
    paces = [layer.pace("slack", queue, 16, 0.1, 750, 10_000) for queue in (0, 2, 6, 20, 200)]
    assert paces == sorted(paces, reverse=True) and paces[0] > 2 * paces[-1]


@pytest.mark.parametrize("policy", layer.POLICIES)
def test_real_masks_cost_what_chance_expects(policy):
    mask = np.random.default_rng(1).random((1024, 960)) < 0.1
    counts = Weights(1024, 960, float(mask.mean()), mask).counts(60, transposed=False)
    expected = layer.pace(policy, 10, 16, 0.1, 60, 1024)
    assert layer.measured_pace(policy, 10, counts) == pytest.approx(expected, rel=0.05)


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
        layer.product_cost(
            CS2, CLOCK, Weights(512, 512, 1 / 8, m), Mapping.of(CS2, 64, 4096), "forward", Assumption(5, "decoupled")
        )
        for m in (even, lopsided)
    ]
    assert costs[0].parts["imbalance"] == 0
    assert costs[1].cycles > 1.5 * costs[0].cycles


# ---- products and mappings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_parts_add_up_to_the_cycles(product, density):
    weights = Weights(3000, 1000, density)
    for tokens in (8, 4096, 500_000):
        cost = layer.product_cost(CS2, CLOCK, weights, Mapping.of(CS2, 250, tokens), product, layer.central(CS2))
        assert sum(cost.parts.values()) == pytest.approx(cost.cycles)
        assert cost.cycles >= cost.io


def test_few_tokens_wait_for_the_host():
    """12288² dense weights of 2 bytes at 150 GB/s: 2.01 ms, and no product can be faster."""
    result = estimates.simulate_layer(CS2, big(0), 256)
    assert result["bound_by"] == "I/O"
    assert result["seconds"]["0.85GHz"]["dense"] == pytest.approx(3 * 12288**2 * 2 / 150e9, rel=1e-6)
    # Seconds of I/O do not depend on the clock.
    assert result["seconds"]["1.1GHz"]["dense"] == pytest.approx(result["seconds"]["0.85GHz"]["dense"])


@pytest.mark.parametrize("assumption", [Assumption(5, "slack"), Assumption(0, "lock-step")], ids=lambda a: a.policy)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
def test_no_mapping_beats_the_one_found(density, assumption):
    weights = big(1 - density)
    found = layer.estimate_layer(CS2, CLOCK, weights, TOKENS, assumption)
    limit = CS2.activation_share * CS2.sram_bytes
    for columns in layer.candidates(CS2, 12288):
        mapping = Mapping.of(CS2, columns, TOKENS)
        if layer.layer_bytes(mapping, weights) <= limit:
            costs = layer.product_costs(CS2, CLOCK, weights, mapping, assumption)
            assert found.total.cycles <= sum(cost.cycles for cost in costs.values()) + 1e-6


def test_dense_and_sparse_get_mappings_of_their_own():
    mapping = estimates.simulate_layer(CS2, big(0.99), TOKENS, sensitivity=False)["mapping"]
    assert mapping["sparse"]["columns"] < mapping["dense"]["columns"]


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
    assert results[0] == pytest.approx({"low": 1, "central": 1, "high": 1, "ideal": 1})


def test_the_gain_collapses_above_99_percent_for_the_right_reason():
    """V9: beyond 99 %, work per non-zero other than its multiply-adds is over half of the time."""
    for sparsity in (0.99, 0.995, 0.999):
        result = estimates.simulate_layer(CS2, big(sparsity), TOKENS, sensitivity=False)
        assert result["overhead"]["sparse"] > 0.5
    at_98, at_999 = speedups(0.98), speedups(0.999)
    assert at_999["central"] < 3 * at_98["central"]  # twenty times fewer weights
    assert at_98["central"] / at_98["ideal"] > 5 * at_999["central"] / at_999["ideal"]
    # No cause of its own: without start-up, commands and synchronisation the gain goes on.
    free = CS2.override({"reduce_startup": 0, "hop_cycles": 0, "ramp_cycles": 0})
    dense, sparse = (
        layer.estimate_layer(free, CLOCK, big(s), TOKENS, Assumption(0, "decoupled")).total.cycles for s in (0, 0.999)
    )
    assert dense / sparse > 2 * at_999["high"]


def test_cycles_and_speedups_agree():
    result = estimates.simulate_layer(CS2, big(0.9), TOKENS)
    for key in ("low", "central", "high"):
        assert result["cycles"]["dense"] / result["cycles"]["sparse"][key] == pytest.approx(
            result["speedup"][key], rel=1e-5
        )
    assert len(result["cases"]) == 12 and result["cases"][0]["policy"] == "slack"
    assert result["cases"][0]["start_up"] == 5
    assert result["sensitivity"][0]["span"] == max(row["span"] for row in result["sensitivity"])


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
        ("dense_weight_bytes", 4, 0.9, 256),
        ("gradient_bytes", 8, 0.9, 256),
        ("sram_bytes", 14_000, 0.9, TOKENS),
        ("activation_share", 0.14, 0.9, TOKENS),
    ],
)
def test_every_parameter_is_live(key, value, sparsity, tokens):
    keys = ("cycles", "seconds", "speedup")
    before, after = (
        estimates.simulate_layer(m, big(sparsity), tokens, sensitivity=False) for m in (CS2, CS2.override({key: value}))
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
    assert status == 0 and "Speed-up" in out and "which unknown moves" in out


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
    with pytest.raises(UserError, match="leave trace and plot away"):
        package.simulate("step", model="gpt2-small", batch=1, plot=page)


def test_a_small_layer_event_by_event(vspdf):
    sizes = ("--tokens", 128, "--in", 64, "--out", 128, "--sparsity", 0.75, "--level", "event")
    status, out, err = vspdf("simulate", "layer", *sizes, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["level"] == "event" and result["region"] == {"columns": 32, "rows": 32}
    for pair in result["products"].values():
        for kind in pair.values():
            assert kind["aggregate"] == pytest.approx(kind["cycles"], rel=0.05)
    assert 1 < result["speedup"]["central"] < result["speedup"]["ideal"]
    status, out, _ = vspdf("simulate", "layer", *sizes)
    assert status == 0 and "level 1 on 32x32 PEs" in out


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
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--level", "event"), "a multiple of 4"),
        (("layer", "--tokens", 4096, "--in", 4096, "--out", 4096, "--level", "event"), "fewer features or tokens"),
        (
            ("layer", "--tokens", 9, "--in", 9, "--out", 9, "--level", "evnt"),
            "--level = 'evnt' is not known. Did you mean 'event'?",
        ),
        (("layer", "--tokens", 0, "--in", 9, "--out", 9), "must be at least 1"),
        (("layer",), "expected --tokens, --in and --out"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--sparsity", 1), "sparsity must lie in"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--set", "trigger_cycle=1"), "Did you mean 'trigger_cycles'"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--machine", "cs3"), "no machine 'cs3'"),
        (("layer", "--tokens", 10**9, "--in", 4096, "--out", 4096), "does not fit"),
        (("layer", "--tokens", 9, "--in", 9, "--out", 9, "--plot", "x.txt"), "expected a name that ends in"),
    ],
)
def test_errors_are_one_line(vspdf, arguments, message):
    status, _, err = vspdf("simulate", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1
