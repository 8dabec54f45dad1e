"""Programs of the event simulator: values equal NumPy's, cycles add up, and two runs are the same run."""

import numpy as np
import pytest

from vspdf.errors import UserError
from vspdf.simulator import machine as machines
from vspdf.simulator.events import programs
from vspdf.simulator.events.fabric import Region

CS2 = machines.load("cs2")


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("mode", programs.VECTOR_MODES)
@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_vector_operation(length, mode):
    run = programs.vector_op(CS2, length, mode)
    x, y = np.linspace(0.5, 1.5, length, dtype=np.float32), np.linspace(-1, 1, length, dtype=np.float32)
    assert np.array_equal(run.result, y * x)


def sums_in_order(values, group):
    """The reduction's own order of additions, in float32."""
    pes = len(values)
    heads = [min(start + group, pes) for start in range(0, pes, group)]
    partial = []
    for start, end in zip(range(0, pes, group), heads, strict=True):
        total = values[start]
        for row in values[start + 1 : end]:
            total = total + row
        partial.append(total)
    total = partial[0]
    for other in partial[1:]:
        total = total + other
    return total


@pytest.mark.parametrize("pes, group", [(2, 1), (2, 2), (7, 3), (8, 8), (9, 4), (16, 4)])
def test_reduce(pes, group):
    values = normal(pes, 33)
    run = programs.reduce(CS2, values, group)
    assert np.array_equal(run.result, sums_in_order(values, group))
    assert run.region.stats["adds"].sum() == (pes - 1) * 33


def test_star_reduce():
    values = normal(6, 20)
    run = programs.reduce(CS2, values, "star")
    np.testing.assert_allclose(run.result, values.sum(0), rtol=1e-5, atol=1e-6)
    assert run.region.wavelets(0) == (5 * 20, 5 * 20)


@pytest.mark.parametrize("group", [3, 7, "star"])
def test_all_reduce_leaves_the_same_sum_everywhere(group):
    values = normal(7, 11)
    run = programs.reduce(CS2, values, group, everywhere=True)
    assert (run.result == run.result[0]).all()
    np.testing.assert_allclose(run.result[0], values.sum(0), rtol=1e-5, atol=1e-6)


def test_broadcast_delivers_every_wavelet_to_everyone():
    values = normal(50)
    run = programs.broadcast(CS2, values, 9)
    assert np.array_equal(run.result, np.tile(values, (9, 1)))
    assert run.region.wavelets(0) == (50, 50 * 8)  # sent x fan-out = delivered


def products(kind):
    return {
        "summa": programs.summa,
        "cannon": lambda *a, **k: programs.ring_gemm(*a, interleaved=False, **k),
        "meshgemm": lambda *a, **k: programs.ring_gemm(*a, interleaved=True, **k),
    }[kind]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("pes, n", [(2, 5), (3, 9), (4, 13), (5, 5)])
@pytest.mark.parametrize("kind", ["summa", "cannon", "meshgemm"])
def test_matrix_product(kind, pes, n, half):
    a, b = normal(n, n), normal(n, n, seed=1)
    run = products(kind)(CS2, a, b, pes, half=half)
    if half:
        a, b = a.astype(np.float16).astype(np.float32), b.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(run.result, a @ b, rtol=0, atol=3e-2 if half else 1e-5)
    tile = -(-n // pes)
    assert run.region.stats["fmacs"].sum() == (pes * tile) ** 3


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("pes, n", [(2, 3), (3, 10), (6, 24), (9, 9)])
def test_matrix_vector_product(pes, n, half):
    a, v = normal(n, n), normal(n, seed=1)
    run = programs.mesh_gemv(CS2, a, v, pes, half=half)
    if half:
        a, v = a.astype(np.float16).astype(np.float32), v.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(run.result, a @ v, rtol=0, atol=3e-2 if half else 1e-5)


@pytest.mark.parametrize("density", [0, 0.1, 1.0])
@pytest.mark.parametrize("fmt", programs.FORMATS)
def test_sparse_product(fmt, density):
    mask = np.random.default_rng(3).random((12, 8)) < density
    run = programs.spmm(CS2, fmt, mask, 12, 2, 3)
    c, a, b = run.result
    assert np.array_equal(a != 0, mask)
    np.testing.assert_allclose(c, a @ b, rtol=0, atol=1e-5)
    stored = run.region.stats["fmacs"].sum() // 12
    assert stored == mask.sum() if fmt in ("csc", "csr") else stored >= mask.sum()


def test_dense_product_by_the_sparse_flow():
    run = programs.dense(CS2, 12, 8, 5, 2, 3)
    c, a, b = run.result
    np.testing.assert_allclose(c, a @ b, rtol=0, atol=1e-5)
    assert run.region.stats["fmacs"].sum() == 12 * 8 * 5


def test_weight_streaming():
    mask = np.random.default_rng(0).random((10, 12)) < 0.4
    w, x = normal(10, 12) * mask, normal(12, 8, seed=1)
    run = programs.stream_layer(CS2, w, mask, x, 4, 2)
    expected = w.astype(np.float16).astype(np.float32) @ x.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(run.result, expected, rtol=0, atol=2e-2)
    assert run.region.stats["fmacs"].sum() == mask.sum() * 8
    assert run.region.wavelets(0) == (mask.sum() + 4 * 10, 2 * (mask.sum() + 4 * 10))


def test_weight_gradient_at_kept_positions():
    mask = np.random.default_rng(0).random((10, 12)) < 0.4
    dy, x = normal(10, 8), normal(12, 8, seed=1)
    run = programs.stream_gradient(CS2, mask, dy, x, 4, 2)
    expected = dy.astype(np.float16).astype(np.float32) @ x.astype(np.float16).astype(np.float32).T
    np.testing.assert_allclose(run.result, np.where(mask, expected, 0), rtol=0, atol=1e-4)
    assert run.region.stats["fmacs"].sum() == mask.sum() * 8


def test_two_runs_are_the_same_run():
    a, b = normal(12, 12), normal(12, 12, seed=1)
    one, two = (programs.summa(CS2, a, b, 4) for _ in range(2))
    assert (
        one.cycles == two.cycles and np.array_equal(one.result, two.result) and one.region.events == two.region.events
    )
    for name, values in one.region.stats.items():
        assert np.array_equal(values, two.region.stats[name]), name


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Region(CS2, 751, 2), "a grid of 751x2 PEs does not fit: cs2 has 750x994"),
        (lambda: programs.reduce(CS2, normal(1, 4), 1), "at least 2 PEs"),
        (lambda: programs.reduce(CS2, normal(4, 4), 5), "`group` 5: expected 1 to 4"),
        (
            lambda: programs.summa(CS2, normal(400, 400), normal(400, 400), 2),
            "of SRAM, it has 49,152: take a larger `grid` or a smaller `n`",
        ),
        (lambda: programs.spmm(CS2, "coo", np.ones((5, 4), bool), 4, 2, 2), "must be a multiple of"),
        (lambda: programs.spmm(CS2, "elpack", np.ones((4, 4), bool), 4, 2, 2), "Did you mean 'ellpack'"),
        (lambda: programs.vector_op(CS2, 4, "pairs"), "Did you mean 'pair'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_clear_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
