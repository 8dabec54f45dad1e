"""Masks of a form: those that hardware likes, as uniform as it allows, and even ones, all exact in count."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np

from vspdf.errors import UserError


def checkerboard(shape: tuple[int, int], keep: int) -> np.ndarray:
    """Boolean matrix of `keep` positions at equal distances, each row shifted by one against the row above."""
    rows, columns = shape
    i, numel = np.arange(rows * columns, dtype=np.int64), rows * columns
    even = ((i + 1) * keep // numel > i * keep // numel).reshape(shape)
    return np.take_along_axis(even, (np.arange(columns) + np.arange(rows)[:, None]) % columns, axis=1)


def block_of(form: str) -> tuple[int, int] | None:
    """(rows, columns) of a block that a form names, e.g. "16x16"; None for "2:4".

    Raises
    ------
    UserError
        If it is neither.
    """
    if form == "2:4":
        return None
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", str(form))
    if match is None:
        raise UserError(f"masks do not fit '{form}': expected 2:4, or blocks as ROWSxCOLUMNS, e.g. 16x16 or 128x1.")
    return int(match[1]), int(match[2])


def draw(shape: tuple[int, int], keep: int, form: str, rng: np.random.Generator) -> np.ndarray | None:
    """Mask of `keep` positions that fits `form`, bool [out_features, in_features]; None where no such mask does."""
    block = block_of(form)
    return _two_four(shape, keep, rng) if block is None else _blocks(shape, keep, block, rng)


def _blocks(shape: tuple[int, int], keep: int, block: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Whole blocks in random order until `keep` positions are kept; of the last one its first positions.

    Blocks at the lower and right edge are smaller where they do not divide the shape.
    """
    rows, columns = (-(-side // size) for side, size in zip(shape, block, strict=True))
    sizes = np.outer(*(np.diff(np.append(np.arange(0, n, b), n)) for n, b in zip(shape, block, strict=True)))
    order = rng.permutation(rows * columns)
    ends = np.cumsum(sizes.reshape(-1)[order])
    whole = int(np.searchsorted(ends, keep, side="right"))
    chosen = np.zeros(rows * columns, dtype=bool)
    chosen[order[:whole]] = True
    mask = chosen.reshape(rows, columns).repeat(block[0], 0)[: shape[0]].repeat(block[1], 1)[:, : shape[1]]
    left = keep - (int(ends[whole - 1]) if whole else 0)
    if left:
        row, column = divmod(int(order[whole]), columns)
        part = mask[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
        part[np.unravel_index(np.arange(left), part.shape)] = True
    return mask


# -- 2:4 along rows and along columns ---------------------------------------------------------------------------------
# Groups of four along both sides make tiles of 4 x 4 that have nothing to do with each other but the number of weights
# that they hold together. So a mask is drawn uniformly from all that fit: how many tiles hold how many weights, then
# which tiles those are, then for each tile one of all ways to hold so many.


@cache
def _ways(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """All tiles, bool [ways, rows, columns], with at most two kept in each row and column, by how many they keep."""
    codes = np.arange(1 << (rows * columns))[:, None] >> np.arange(rows * columns)
    tiles = (codes & 1).astype(bool).reshape(-1, rows, columns)
    tiles = tiles[(tiles.sum(1) <= 2).all(1) & (tiles.sum(2) <= 2).all(1)]
    kept = tiles.sum((1, 2))
    return tuple(tiles[kept == k] for k in range(kept.max() + 1))


def _tiles(shape: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Kinds of tiles, those at the edges smaller: (rows, columns) of one, and of how many tiles down and across."""
    down, across = ([(4, side // 4), (side % 4, 1)] for side in shape)
    return [(h, w, n, m) for h, n in down for w, m in across if h and w and n and m]


def _odds(log_ways: np.ndarray, tilt: float) -> np.ndarray:
    """Probabilities of the counts of a tile where a kept weight is exp(tilt) times as likely as a masked one."""
    odds = log_ways + tilt * np.arange(len(log_ways))
    odds = np.exp(odds - odds.max())
    return odds / odds.sum()


def _two_four(shape: tuple[int, int], keep: int, rng: np.random.Generator) -> np.ndarray | None:
    kinds = _tiles(shape)
    ways = [_ways(h, w) for h, w, _, _ in kinds]
    most = sum(n * m * (len(way) - 1) for (_, _, n, m), way in zip(kinds, ways, strict=True))
    if keep > most:
        return None
    histograms = _histograms(
        [np.log([len(w) for w in way]) for way in ways], [n * m for _, _, n, m in kinds], keep, rng
    )
    mask = np.zeros(shape, dtype=bool)
    for (h, w, n, m), way, histogram in zip(kinds, ways, histograms, strict=True):
        kept = rng.permutation(np.repeat(np.arange(len(way)), histogram))
        tiles = np.empty((n * m, h, w), dtype=bool)
        for k, options in enumerate(way):
            here = np.flatnonzero(kept == k)
            tiles[here] = options[rng.integers(len(options), size=len(here))]
        top, left = (0 if h == 4 else shape[0] - h), (0 if w == 4 else shape[1] - w)
        mask[top : top + n * h, left : left + m * w] = tiles.reshape(n, m, h, w).swapaxes(1, 2).reshape(n * h, m * w)
    return mask


def _histograms(log_ways: list[np.ndarray], tiles: list[int], keep: int, rng: np.random.Generator) -> list[np.ndarray]:
    """For each kind of tile, how many tiles keep 0, 1, 2, ... weights; `keep` of them in all.

    Independent tiles, whatever their tilt, are distributed as wanted once their sum is known to be `keep`: so counts
    are drawn until it is, at the tilt where that is likeliest.
    """
    mean = lambda tilt: sum(n * (_odds(ways, tilt) @ np.arange(len(ways))) for ways, n in zip(log_ways, tiles))  # noqa: B905, E731
    low, high = -60.0, 60.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < keep else (low, middle)
    odds = [_odds(ways, (low + high) / 2) for ways in log_ways]
    draws = 16 + 4 * math.isqrt(sum(tiles))  # about as many as it takes: the sum spreads by the root of the tiles
    while True:
        drawn = [rng.multinomial(n, p, size=draws) for n, p in zip(tiles, odds, strict=True)]
        sums = sum(counts @ np.arange(counts.shape[1]) for counts in drawn)
        if len(right := np.flatnonzero(sums == keep)):
            return [counts[right[0]] for counts in drawn]
