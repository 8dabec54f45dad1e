"""The law of a row against the event level it comes from, and what columns wait for each other."""

import itertools

import numpy as np
import pytest

from vspdf.simulator import machine as machines
from vspdf.simulator.aggregate.law import GAPS, Law, law, measured_pace, pace
from vspdf.simulator.aggregate.layer import Weights
from vspdf.simulator.events import programs

CS2 = machines.load("cs2")
QUEUE = CS2.in_queue_depth[0] + CS2.router_buffer


def row_law(start_up=5, vector=4, sums=0, row=20, words=8, share=1, wire=1, hop=0, wait=-1.0):
    return Law(start_up, vector, sums, row, words, share, wire, hop, wait)


def test_a_row_by_hand():
    rule = row_law()
    assert rule(16) == 16 * (5 + 4) + 20  # the sums' 8 words fit into 16 start-ups
    assert rule(1) == pytest.approx(9 + (8 - GAPS * 5) + 20)  # one start-up does not hide them
    assert row_law(start_up=0, vector=1, row=0, words=0)(30) == 31  # a link takes one wavelet a cycle, the command too
    assert row_law(share=17)(16) == 16 * 17 + 1  # which 17 columns share
    assert row_law(sums=1, words=0)(16) == 16 * 10 + 20  # the gradient's sums pass every core


def test_parts_add_up_to_the_law():
    for rule in (row_law(), row_law(0, 1, 0, 0, 0), row_law(0, 4, 1, 20, 30), row_law(share=40)):
        for z in (0.0, 0.3, 4.0, 100.0):
            assert sum(rule.attribute(z, 7).values()) == pytest.approx(7 * rule(z))


# Columns, features of a column, tokens of a PE, density, columns of a link.
CASES = [(32, 8, 32, 1.0, 1), (32, 8, 32, 0.25, 1), (32, 8, 32, 0.25, 8), (48, 4, 40, 0.5, 12), (24, 16, 16, 0.1, 8)]


@pytest.mark.parametrize("columns, block, local, density, share", CASES)
def test_the_law_is_that_of_the_events(columns, block, local, density, share):
    """Forward on a row of PEs, per row of weights in the steady state: two runs that differ in their rows alone."""
    random = np.random.default_rng(0)
    cycles = {}
    for rows in (64, 128):
        mask = random.random((rows, columns * block)) < density
        w, x = (random.standard_normal(s).astype(np.float32) * 0.1 for s in (mask.shape, (mask.shape[1], local)))
        cycles[rows] = programs.stream_layer(CS2, w, mask, x, columns, 1, share).cycles
    machine = CS2.override({"edge_links": columns // share})
    expected = pace(law(machine, columns, local, "forward"), QUEUE, block, density, columns, 4096)
    assert (cycles[128] - cycles[64]) / 64 == pytest.approx(expected, rel=0.1)


def test_columns_of_one_link_hold_each_other_up_where_sums_are_few():
    """With two sums a column a row takes a turn of the ring; with many, what a queue lets them drift apart."""
    random = np.random.default_rng(0)
    mask = np.ones((48, 24 * 4), bool)
    w, x = (random.standard_normal(s).astype(np.float32) * 0.1 for s in (mask.shape, (96, 16)))
    alone, shared = (programs.stream_layer(CS2, w, mask, x, 24, 1, share).cycles for share in (1, 12))
    few = programs.stream_layer(CS2.override({"sums_held": 2}), w, mask, x, 24, 1, 12).cycles
    assert alone <= shared < 1.1 * alone and few > 1.1 * shared


def test_a_shared_stream_computes_the_same():
    random = np.random.default_rng(1)
    mask = random.random((20, 48)) < 0.3
    w, x, dy = (random.standard_normal(s).astype(np.float32) * 0.1 for s in (mask.shape, (48, 16), (20, 16)))
    values = [programs.stream_layer(CS2, w, mask, x, 12, 2, share).result for share in (1, 5)]
    gradients = [programs.stream_gradient(CS2, mask, dy, x, 12, 2, share).result for share in (1, 5)]
    np.testing.assert_array_equal(*values)
    np.testing.assert_array_equal(*gradients)


# ---- what columns wait for -------------------------------------------------------------------------------------------


def only_weights(share, wait=-1.0):
    """A law that counts weights."""
    return Law(0, 1, 0, 0, 0, share, 0, 0, wait)


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
def test_the_pace_bounds_a_simulation_of_queues(block, density, columns, queue):
    simulated = simulated_pace(block, density, columns, queue)
    assert simulated * 0.97 < pace(only_weights(columns), queue, block, density, columns, 10_000) < 1.2 * simulated


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("block", [1, 16, 200])
def test_the_more_columns_a_link_feeds_the_slower(block, density):
    paces = [pace(only_weights(share), 10, block, density, 200, 4096) for share in (1, 17, 200)]
    fullest = pace(only_weights(1, wait=1.0), 10, block, density, 200, 4096)
    assert block * density <= paces[0] and paces == sorted(paces) and paces[-1] <= fullest <= block


def test_the_fullest_column_is_the_published_example():
    """K/P_x = 16 at 90 %, 750 columns: the fullest has 6.3 weights, the average 1.6."""
    assert pace(only_weights(1, wait=1.0), 10, 16, 0.1, 750, 10_000) == pytest.approx(6.3, abs=0.05)
    assert pace(only_weights(1, wait=0.0), 10, 16, 0.1, 750, 10_000) == pytest.approx(1.6, rel=0.04)


def test_a_longer_queue_costs_less():
    paces = [pace(only_weights(750), queue, 16, 0.1, 750, 10_000) for queue in (0, 2, 6, 20, 200)]
    assert paces == sorted(paces, reverse=True) and paces[0] > 2 * paces[-1]


@pytest.mark.parametrize("product, share", [*itertools.product(("forward", "grad_values"), (1, 44))])
def test_real_masks_cost_what_chance_expects(product, share):
    mask = np.random.default_rng(1).random((1024, 960)) < 0.1
    counts = Weights(1024, 960, float(mask.mean()), mask).counts(60, transposed=False)
    rule = law(CS2.override({"edge_links": share}), 60, 32, product)
    assert measured_pace(rule, QUEUE, counts) == pytest.approx(pace(rule, QUEUE, 16, 0.1, 60, 1024), rel=0.05)
