"""Random masks of a form: exact in count, seeded, and as uniform as the form allows."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vspdf
from vspdf import mask_forms
from vspdf.errors import UserError
from vspdf.pattern import Pattern, kept_count

sides = st.integers(1, 30)


def mask_of(*arguments, **options):
    return Pattern.random(*arguments, **options).mask().numpy()


def is_two_four(mask):
    """At most two of every four, along rows and columns, whatever is left at the edges."""
    for side in (mask, mask.T):
        if any((side[:, i : i + 4].sum(1) > 2).any() for i in range(0, side.shape[1], 4)):
            return False
    return True


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.floats(0.5, 1), st.integers(0, 2**32))
def test_24_has_the_exact_count_on_any_shape(rows, columns, sparsity, seed):
    pattern = Pattern.random((rows, columns), sparsity, seed, fits="2:4")
    assert pattern.nnz == kept_count(rows * columns, sparsity)
    fits = is_two_four(pattern.mask().numpy())
    assert fits or rows % 4 or columns % 4, "only where edges are odd may half of the positions be too many"
    if not fits:
        assert pattern is Pattern.random((rows, columns), sparsity, seed)
    assert pattern is Pattern.random((rows, columns), sparsity, seed, fits="2:4")


@pytest.mark.parametrize("sparsity", [0.5, 0.500001, 0.75, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(64, 256), (1024, 512), (18, 7)], ids=lambda s: "{}x{}".format(*s))
def test_24_fits_along_rows_and_columns(shape, sparsity):
    if shape == (18, 7) and sparsity < 0.7:
        pytest.skip("edges of one and two columns hold less")
    pattern = Pattern.random(shape, sparsity, seed=3, fits="2:4")
    assert is_two_four(pattern.mask().numpy()) and pattern.nnz == kept_count(pattern.numel, sparsity)


def test_every_24_mask_is_equally_likely():
    """All masks of 5 x 4, a tile and an edge, with three weights that fit, each about as often as the others."""
    fitting = 0
    for places in combinations(range(20), 3):
        mask = np.zeros(20, dtype=bool)
        mask[list(places)] = True
        fitting += is_two_four(mask.reshape(5, 4))
    rng, draws = np.random.default_rng(0), 5000
    seen = Counter(mask_forms.draw((5, 4), 3, "2:4", rng).tobytes() for _ in range(draws))
    expected = draws / fitting
    assert 0.95 * fitting < len(seen) <= fitting
    chi2 = (fitting - len(seen)) * expected + sum((n - expected) ** 2 / expected for n in seen.values())
    assert abs(chi2 - (fitting - 1)) < 5 * np.sqrt(2 * (fitting - 1))


@pytest.mark.parametrize("sparsity, narrower", [(0.75, 0.88), (0.9, 0.95), (0.95, 0.97)])
def test_counts_by_row_and_column_are_those_of_uniform_masks(sparsity, narrower):
    """Means agree; spreads are a little less, as no group of four can be full: 0.88 of binomial at 75 %."""
    mask = mask_of((1024, 1024), sparsity, seed=1, fits="2:4")
    kept = 1 - sparsity
    for counts in (mask.sum(0), mask.sum(1)):
        assert counts.mean() == pytest.approx(1024 * kept, abs=0.01)
        assert counts.std() == pytest.approx(narrower * np.sqrt(1024 * kept * sparsity), rel=0.09)
    for axis in (0, 1):  # thirds of the matrix, and places within a group
        thirds = [part.mean() for part in np.array_split(mask, 3, axis=axis)]
        assert thirds == pytest.approx([kept] * 3, rel=0.03)
        groups = [(mask if axis else mask.T)[:, i::4].mean() for i in range(4)]
        assert groups == pytest.approx([kept] * 4, rel=0.03)


def test_24_moves_few_weights_only():
    """Of a plain mask at 75 %, 11 % of the kept weights stand in groups that are too full; of a 2:4 one none."""
    count = lambda mask: np.maximum(mask.reshape(256, 64, 4).sum(2) - 2, 0).sum()  # noqa: E731
    plain = mask_of((256, 256), 0.75)
    assert 0.04 < count(plain) / plain.sum() < 0.07
    assert count(mask_of((256, 256), 0.75, fits="2:4")) == 0


def test_what_cannot_be_24_is_uniform_and_says_so(caplog):
    assert Pattern.random((16, 16), 0.4, fits="2:4") is Pattern.random((16, 16), 0.4)
    assert "no mask of 16 x 16 that keeps 154 weights fits 2:4" in caplog.text


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.floats(0, 1), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_blocks_are_whole_but_for_one(rows, columns, sparsity, height, width, seed):
    mask = mask_of((rows, columns), sparsity, seed, fits=f"{height}x{width}")
    assert mask.sum() == kept_count(rows * columns, sparsity)
    blocks = [mask[r : r + height, c : c + width] for r in range(0, rows, height) for c in range(0, columns, width)]
    assert sum(block.any() and not block.all() for block in blocks) <= 1


def test_blocks_of_one_cover_evenly():
    counts = sum(mask_of((8, 16), 0.75, seed, fits="4x4").astype(int) for seed in range(800))
    assert 120 < counts.min() and counts.max() < 290  # 200 ± 12


@pytest.mark.parametrize("fits", ["4:8", "16", "0x4", "16x", "x16", "16X16", ""])
def test_an_unknown_form_is_refused(fits):
    with pytest.raises(UserError, match=f"masks do not fit '{fits}': expected 2:4, or blocks as ROWSxCOLUMNS"):
        Pattern.random((8, 8), 0.5, fits=fits)


def test_layers_take_forms():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    for pattern in vspdf.sparsify(model, 0.75, init_method="random:2:4").values():
        assert is_two_four(pattern.mask().numpy()) and pattern.sparsity == 0.75
    phases = vspdf.Phases([(0.75, 5), (0.0, 5)], init_method="random:16x16")
    model = phases.start(nn.Sequential(nn.Linear(64, 32)))
    blocks = model[0].pattern.mask().view(2, 16, 4, 16).sum((1, 3))
    assert sorted(blocks.flatten().tolist()) == [0] * 6 + [256] * 2
    with pytest.raises(UserError, match=r"'16'"):
        vspdf.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, init_method="random:16")
