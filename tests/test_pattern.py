import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vspdf
from vspdf.errors import UserError
from vspdf.pattern import Pattern, kept_count

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
sparsities = st.floats(0, 1)


@pytest.mark.parametrize(
    "numel, sparsity, kept",
    [
        (100, 0.9, 10),
        (10, 0.25, 8),  # 2.5 rounds to even, 2
        (10, 0.35, 6),  # 3.5 to 4, though the double 0.35 is a hair below
        (15, 0.9, 1),  # 13.5 to 14, though the double product is above by rounding only
        (4096 * 16384, 0.9, 6710886),  # 60,397,977.6 masked
        (7, 0.0, 7),
        (7, 1.0, 0),
        (1, 0.5, 1),
    ],
)
def test_kept_count_is_numel_minus_rounded_exact_product(numel, sparsity, kept):
    assert kept_count(numel, sparsity) == kept


@settings(max_examples=50, deadline=None)
@given(shapes, sparsities, st.integers(0, 2**63))
def test_random_keeps_the_promised_number_and_is_reproducible(shape, sparsity, seed):
    pattern = Pattern.random(shape, sparsity, seed)
    assert pattern.nnz == kept_count(shape[0] * shape[1], sparsity) == int(pattern.mask().sum())
    assert pattern.shape == shape and pattern.numel == shape[0] * shape[1]
    assert pattern.density == pattern.nnz / pattern.numel and pattern.sparsity == 1 - pattern.density
    assert Pattern.random(shape, sparsity, seed) is pattern


def test_seeds_give_different_masks_that_cover_evenly():
    counts = sum(Pattern.random((16, 16), 0.5, seed).mask().int() for seed in range(400))
    assert Pattern.random((16, 16), 0.5, 0) is not Pattern.random((16, 16), 0.5, 1)
    assert 140 < counts.min() and counts.max() < 260  # 200 ± 10 each: six deviations


@settings(max_examples=50, deadline=None)
@given(shapes, sparsities)
def test_positions_rows_and_columns_agree_with_scipy(shape, sparsity):
    pattern = Pattern.random(shape, sparsity)
    mask = pattern.mask()
    assert Pattern.from_mask(mask) is pattern
    assert Pattern.from_mask(mask.numpy()) is pattern
    assert torch.equal(pattern.positions(), mask.flatten().nonzero().flatten())
    rows, columns = pattern.csr()
    oracle = scipy.sparse.csr_array(mask.numpy())
    oracle.sort_indices()
    assert rows.dtype == np.int64 and columns.dtype == np.int32
    np.testing.assert_array_equal(rows, oracle.indptr)
    np.testing.assert_array_equal(columns, oracle.indices)


@settings(max_examples=50, deadline=None)
@given(shapes, sparsities, sparsities)
def test_growing_adds_and_never_drops(shape, a, b):
    pattern = Pattern.random(shape, max(a, b))
    grown = pattern.grow(min(a, b), seed=1)
    assert grown.nnz == kept_count(pattern.numel, min(a, b))
    assert grown.issuperset(pattern)
    assert not (pattern.mask() & ~grown.mask()).any()


def test_growing_backwards_is_refused():
    with pytest.raises(UserError, match=r"only grow: its sparsity is 0.5, 0.9 would drop"):
        Pattern.random((4, 5), 0.5).grow(0.9)


def test_superset_needs_the_same_shape():
    full, flat = Pattern.random((4, 6), 0.0), Pattern.random((6, 4), 0.0)
    assert not full.issuperset(flat) and full is not flat


def test_equal_patterns_are_one_object_through_copies_and_pickle():
    pattern = Pattern.random((9, 5), 0.7)
    assert copy.copy(pattern) is pattern and copy.deepcopy([pattern])[0] is pattern
    assert pickle.loads(pickle.dumps(pattern)) is pattern
    assert Pattern.find(pattern.digest) is pattern
    stored, digest = pickle.dumps(pattern), pattern.digest
    del pattern
    gc.collect()
    with pytest.raises(UserError, match="not alive in this process"):
        Pattern.find(digest)  # nothing keeps a pattern alive but its users
    assert pickle.loads(stored).digest == digest


def test_a_pattern_owns_its_bits():
    bits = np.array([0b1011], np.uint8)
    pattern = Pattern((2, 2), bits)
    bits[0] = 0
    assert pattern.nnz == 3 and pattern.mask().tolist() == [[True, True], [False, True]]
    with pytest.raises(ValueError, match=r"read-only"):
        pattern.bits[0] = 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Pattern.random((4, 4), 1.1), r"sparsity must lie in \[0, 1\], not 1.1"),
        (lambda: Pattern.random((4, 4), -0.1), "not -0.1"),
        (lambda: Pattern.random((4, 4), float("nan")), "not nan"),
        (lambda: Pattern.random((0, 4), 0.5), r"both at least 1, not \(0, 4\)"),
        (lambda: Pattern.from_mask(torch.ones(3, dtype=torch.bool)), r"boolean matrix \[out, in\], got bool of shape"),
        (lambda: Pattern.from_mask(torch.ones(3, 3)), "got float32"),
        (lambda: Pattern.from_mask(np.zeros((3, 0), bool)), r"not \(3, 0\)"),
        (lambda: Pattern((3, 3), np.zeros(1, np.uint8)), "needs 2 bytes of bits"),
        (lambda: Pattern((3, 3), np.full(2, 255, np.uint8)), "trailing bits must be zero"),
    ],
    ids=["above 1", "below 0", "nan", "no rows", "vector", "float mask", "no columns", "short bits", "trailing bits"],
)
def test_impossible_patterns_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_public_name_is_the_same_class():
    assert vspdf.Pattern is Pattern


def test_threads_get_one_object():
    for seed in range(20):
        mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(seed)) < 0.5
        start = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _, m=mask, b=start: (b.wait(), Pattern.from_mask(m))[1], range(4)))
        assert len(set(map(id, made))) == 1


def test_topk_keeps_the_largest_and_of_equal_ones_the_first():
    weight = torch.tensor([[0.1, -5.0, 2.0], [2.0, -2.0, 0.0]])
    assert Pattern.topk(weight, 0.5).mask().tolist() == [[False, True, True], [True, False, False]]
    assert Pattern.topk(weight, 0.0).nnz == 6 and Pattern.topk(weight, 1.0).nnz == 0
    weight = torch.randn(13, 29)
    pattern = Pattern.topk(weight, 0.7)
    kept, masked = weight.abs()[pattern.mask()], weight.abs()[~pattern.mask()]
    assert pattern.nnz == kept_count(13 * 29, 0.7) and kept.min() >= masked.max()


def test_a_checkerboard_is_one_at_half_and_even_elsewhere():
    board = Pattern.checkerboard((4, 6), 0.5).mask()
    i, j = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    assert torch.equal(board, (i + j) % 2 == 1)
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        pattern = Pattern.checkerboard((40, 50), sparsity)
        assert pattern.nnz == kept_count(2000, sparsity)
        for counts in (pattern.mask().sum(0), pattern.mask().sum(1)):
            assert counts.max() - counts.min() <= 2


@pytest.mark.parametrize(
    "numel, sparsity, rounded, truncated", [(100, 0.9, 10, 9), (100, 0.5, 50, 50), (7, 0.75, 2, 1)]
)
def test_two_ways_to_count_what_is_kept(numel, sparsity, rounded, truncated):
    assert kept_count(numel, sparsity) == rounded and kept_count(numel, sparsity, truncate=True) == truncated
    for make in (Pattern.random, Pattern.checkerboard):
        assert make((1, numel), sparsity, truncate=True).nnz == truncated


# -- what is no pattern -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_topk_ranks_as_exactly_as_the_weights_are(dtype):
    small = torch.tensor([[1e-30, 2e-30], [4e-30, 3e-30]], dtype=dtype)
    assert Pattern.topk(small, 0.5).positions().tolist() == [2, 3]
    if dtype == torch.float64:
        for row in ([1e50, 1e60], [1e-60, 1e-50], [1.0, 1.0 + 1e-12]):
            assert Pattern.topk(torch.tensor([row], dtype=dtype), 0.5).positions().tolist() == [1]


EXACT = {
    "whole numbers beyond 2^24": [[2**24, 2**24 + 1]],
    "whole numbers beyond 2^53": [[2**62, -(2**62) - 1]],
    "the least whole number": [[2**63 - 1, -(2**63)]],
    "bytes": torch.tensor([[127, 200]], dtype=torch.uint8),
    "complex numbers": [[1.0 + 0.5j, 0.5 + 2j]],
}


@pytest.mark.parametrize("row", EXACT.values(), ids=EXACT)
def test_topk_ranks_what_is_no_float_by_magnitude(row):
    assert Pattern.topk(torch.as_tensor(row), 0.5).positions().tolist() == [1]


@pytest.mark.parametrize("weight", [torch.full((4, 4), float("nan")), torch.full((4, 4), float("inf")), torch.ones(4),
                                    torch.ones(2, 3, 1), torch.ones(4, 4, device="meta")],
                         ids=["NaN", "inf", "1-D", "3-D", "on meta"])  # fmt: skip
def test_topk_of_what_is_no_matrix_of_numbers_is_refused(weight):
    with pytest.raises(UserError, match="topk ranks a matrix of finite numbers"):
        Pattern.topk(weight, 0.5)


NONE = {
    "bits of another type": lambda: Pattern((1, 8), np.array([257])),
    "bits that are broken": lambda: Pattern((1, 8), np.array([1.9])),
    "a broken side": lambda: Pattern.random((2.7, 4), 0.5),
    "no seed": lambda: Pattern.random((4, 4), 0.5, seed=None),
    "a seed below 0": lambda: Pattern.random((4, 4), 0.5, seed=-1),
    "a mask in bfloat16": lambda: Pattern.from_mask(torch.ones(2, 2, dtype=torch.bfloat16)),
    "a mask on meta": lambda: Pattern.from_mask(torch.ones(2, 2, dtype=torch.bool, device="meta")),
    "weights of NumPy": lambda: Pattern.topk(np.ones((2, 2)), 0.5),
    "a form that is no text": lambda: Pattern.random((8, 8), 0.8, fits=(2, 4)),
    "another count": lambda: setattr(Pattern.random((8, 8), 0.8), "nnz", 3),
    "a sparse mask": lambda: Pattern.from_mask(torch.ones(2, 2, dtype=torch.bool).to_sparse()),
}


@pytest.mark.parametrize("make", NONE.values(), ids=NONE)
def test_what_is_no_pattern_is_refused(make):
    with pytest.raises(UserError):
        make()


def test_a_position_beyond_all_integers_is_named_as_it_is():
    with pytest.raises(UserError, match=f"not 0 to {2**63 + 5}"):
        Pattern.random((8, 8), 0.5).exchange([], np.array([0, 2**63 + 5], dtype=np.uint64))
