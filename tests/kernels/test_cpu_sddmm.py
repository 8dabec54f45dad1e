"""The compiled gradient product: dvalues = (dy^T x) at kept positions, against float64."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from vspdf import _C

ISAS = _C.isas()
LANES = {"avx512": 16, "avx2": 8, "plain": 4}
F32, BF16 = 0, 1
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def bits_of(mask: torch.Tensor) -> np.ndarray:
    bits = np.packbits(mask.numpy().reshape(-1), bitorder="little")
    bits.setflags(write=False)
    return bits


def make_plan(mask: torch.Tensor, isa: str):
    out_features, in_features = mask.shape
    return _C.Plan(out_features, in_features, bits_of(mask), isa)


def run(plan, mask, dy, x, *, threads=1, dvalues=None):
    """(dvalues, macs); the output starts as NaN, with NaN guards behind it that must stay."""
    nnz, guard = int(mask.sum()), 32
    if dvalues is None:
        dvalues = torch.full((nnz + guard,), float("nan"), dtype=x.dtype)
    dtype = F32 if x.dtype == torch.float32 else BF16
    macs = plan.grad_values(
        dvalues.data_ptr(), dy.data_ptr(), dy.stride(0), x.data_ptr(), x.stride(0), len(x), dtype, dtype, threads
    )
    assert dvalues[nnz:].isnan().all(), "wrote past the end"
    return dvalues[:nnz], macs


def check(dvalues, mask, dy, x):
    wanted = (dy.double().t() @ x.double())[mask]
    error = (dvalues.double() - wanted).norm()
    assert error <= LIMIT[x.dtype] * wanted.norm() + 1e-30, f"relative error {(error / wanted.norm()).item():.2e}"


def random(tokens, features, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=generator).to(dtype)


def random_mask(out_features, in_features, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(out_features, in_features, generator=generator) < density


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 15, 16, 17, 31, 64, 100, 127, 128, 129, 255, 256, 257, 400, 513])
def test_token_counts(isa, tokens):
    mask = random_mask(70, 150, 0.2)
    dy, x = random(tokens, 70, 1), random(tokens, 150, 2)
    dvalues, macs = run(make_plan(mask, isa), mask, dy, x)
    check(dvalues, mask, dy, x)
    assert (macs == 0) == (tokens == 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (17, 33), (65, 130), (513, 71), (71, 1030)])
def test_shapes_and_densities(isa, density, shape):
    mask = random_mask(*shape, density)
    dy, x = random(37, shape[0], 1), random(37, shape[1], 2)
    check(run(make_plan(mask, isa), mask, dy, x)[0], mask, dy, x)


def empty_rows(mask):
    mask[::3] = False


def full_rows(mask):
    mask[5:9] = True


def empty_columns(mask):
    mask[:, 64:128] = False


def full_columns(mask):
    mask[:, ::50] = True


def one_dense_corner(mask):
    mask[:] = False
    mask[:40, -60:] = True


def diagonal(mask):
    mask[:] = torch.eye(*mask.shape, dtype=torch.bool)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("change", [empty_rows, full_rows, empty_columns, full_columns, one_dense_corner, diagonal])
def test_uneven_patterns(isa, change):
    mask = random_mask(190, 310, 0.1)
    change(mask)
    dy, x = random(150, 190, 1), random(150, 310, 2)
    plan = make_plan(mask, isa)
    for threads in (1, 2, 5):
        check(run(plan, mask, dy, x, threads=threads)[0], mask, dy, x)


@pytest.mark.parametrize("isa", ISAS)
def test_dense_corner_of_a_long_sparse_matrix(isa):
    """A tile of a very sparse pattern holds more kept weights than 16 bits count."""
    mask = torch.zeros(9000, 9600, dtype=torch.bool)
    mask[:300, :300] = True
    dy, x = random(9, 9000, 1), random(9, 9600, 2)
    check(run(make_plan(mask, isa), mask, dy, x)[0], mask, dy, x)


@pytest.mark.parametrize("isa", ISAS)
def test_longest_sides(isa):
    for shape in ((50_000, 3), (3, 50_000)):
        mask = random_mask(*shape, 0.3)
        dy, x = random(20, shape[0], 1), random(20, shape[1], 2)
        check(run(make_plan(mask, isa), mask, dy, x, threads=2)[0], mask, dy, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 130, 255, 256, 257, 300, 513, 1030])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 1.0])
def test_bfloat16(isa, tokens, density):
    """Where the processor multiplies pairs of bfloat16, a lane holds two tokens."""
    mask = random_mask(75, 140, density)
    dy, x = random(tokens, 75, 1, torch.bfloat16), random(tokens, 140, 2, torch.bfloat16)
    dvalues, _ = run(make_plan(mask, isa), mask, dy, x)
    check(dvalues, mask, dy, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [2, 40, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides(isa, tokens, dtype):
    mask = random_mask(50, 90, 0.3)
    plan = make_plan(mask, isa)
    wide_dy, wide_x = random(tokens, 57, 1, dtype), random(tokens, 101, 2, dtype)
    one_dy, one_x = random(1, 50, 3, dtype), random(1, 90, 4, dtype)
    for dy, x in (
        (wide_dy[:, 3:53], wide_x[:, 7:97]),
        (one_dy.expand(tokens, 50), wide_x[:, 1:91]),
        (wide_dy[:, :50], one_x.expand(tokens, 90)),
        (one_dy.expand(tokens, 50), one_x.expand(tokens, 90)),
    ):
        check(run(plan, mask, dy, x)[0], mask, dy, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [2, 50, 300])
def test_infinities_stay_in_their_rows_and_columns(isa, tokens):
    mask = random_mask(40, 80, 0.3)
    dy, x = random(tokens, 40, 1), random(tokens, 80, 2)
    dy[1, 7] = float("inf")
    x[0, 11] = float("nan")
    dvalues, _ = run(make_plan(mask, isa), mask, dy, x)
    row, col = mask.nonzero(as_tuple=True)
    clean = (row != 7) & (col != 11)
    assert not dvalues[~clean].isfinite().any()
    wanted = (dy.double().t() @ x.double())[mask]
    torch.testing.assert_close(dvalues[clean].double(), wanted[clean], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_scratch_of_an_earlier_call_does_not_leak(isa):
    """The pool hands out memory as it was left: a call full of NaN comes first."""
    mask = random_mask(60, 100, 0.3)
    plan = make_plan(mask, isa)
    run(plan, mask, torch.full((300, 60), float("nan")), torch.full((300, 100), float("nan")))
    for tokens in (3, 20, 300):
        dy, x = random(tokens, 60, 1), random(tokens, 100, 2)
        check(run(plan, mask, dy, x)[0], mask, dy, x)


@pytest.mark.parametrize("isa", ISAS)
def test_macs_count_lanes_that_ran(isa):
    mask = random_mask(256, 512, 0.1)
    plan, nnz, lanes = make_plan(mask, isa), int(mask.sum()), LANES[isa]
    for tokens in (1, 2, 3, 16, 100, 1024):
        _, macs = run(plan, mask, random(tokens, 256, 1), random(tokens, 512, 2))
        padded = tokens if tokens == 1 else -(-tokens // lanes) * lanes
        assert padded * nnz <= macs <= padded * nnz * 1.05
        if tokens > 1:
            assert macs % (lanes * lanes) == 0


@pytest.mark.parametrize("isa", ISAS)
def test_threads_agree_and_repeat_exactly(isa):
    mask = random_mask(530, 700, 0.1)
    plan = make_plan(mask, isa)
    dy, x = random(300, 530, 1), random(300, 700, 2)
    for threads in (1, 2, 3, 4, 7, 16):
        first, macs = run(plan, mask, dy, x, threads=threads)
        again, macs_again = run(plan, mask, dy, x, threads=threads)
        assert torch.equal(first, again)
        assert macs == macs_again
        check(first, mask, dy, x)


@pytest.mark.parametrize("isa", ISAS)
def test_one_plan_in_several_python_threads(isa):
    mask = random_mask(128, 256, 0.2)
    plan = make_plan(mask, isa)
    inputs = [(random(140, 128, 2 * i), random(140, 256, 2 * i + 1)) for i in range(4)]
    results: list = [None] * len(inputs)

    def work(i):
        for _ in range(10):
            results[i] = run(plan, mask, *inputs[i], threads=2)[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for dvalues, (dy, x) in zip(results, inputs, strict=True):
        check(dvalues, mask, dy, x)


@pytest.mark.parametrize("isa", ISAS)
def test_memory_of_the_part(isa):
    mask = random_mask(768, 3072, 0.1)
    plan = make_plan(mask, isa)
    before, nnz = plan.nbytes, int(mask.sum())
    run(plan, mask, random(1, 768, 1), random(1, 3072, 2))
    columns = plan.nbytes - before
    assert columns < 2.2 * nnz, "one token needs columns in row-major order and no more"
    run(plan, mask, random(2, 768, 1), random(2, 3072, 2))
    assert nnz < plan.nbytes - before - columns < 5 * nnz


def test_describe_names_the_path():
    plan = make_plan(random_mask(20, 30, 0.5), "plain")
    assert "plain" in plan.describe(100)["grad_values"]
    assert plan.describe(1)["grad_values"] != plan.describe(100)["grad_values"]
