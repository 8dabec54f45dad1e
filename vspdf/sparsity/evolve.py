"""Masks that move: the smallest weights are dropped, others grow in their places, and optimizer state goes along.

New weights are zeros with zero moments, kept ones keep both, of dropped ones nothing stays. Everything is decided the
same way every time: ties by position, what is drawn by seed and layer, so that ranks and restarts agree.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from vspdf.errors import UserError, check_sparsity, check_whole, did_you_mean, require
from vspdf.kernels import cpu
from vspdf.pattern import Pattern, pack, unpack
from vspdf.sparsity.amounts import plain_name
from vspdf.sparsity.attached import mark
from vspdf.sparsity.layer import SparseLinear, whole_layers
from vspdf.sparsity.optimizer import carry, check_follows, elements, warn_of_stale
from vspdf.sparsity.wrapped import warn_of_reducers


def layer_number(name: str) -> int:
    """What tells a layer from the others where something is drawn: 32 bits of its name."""
    return zlib.crc32(plain_name(name).encode())


def layer_seed(seed: int, name: str) -> int:
    """Masks of different layers are independent, and a layer's does not depend on the others.

    Raises
    ------
    UserError
        If `seed` is no whole number of at least 0; any type of integer will do.
    """
    check_whole("seed", seed, least=0)
    return (int(seed) << 32) | layer_number(name)  # NumPy's integers would lose the shifted bits


def evolve(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    drop_fraction: float,
    *,
    grow: str | Mapping[str, Tensor] = "random",
    seed: int = 0,
) -> dict[str, Pattern]:
    """Moves the masks of all sparse layers, in place: as many weights as are dropped grow elsewhere.

    Of each layer that learns ``int(drop_fraction · nnz)`` weights of the smallest magnitude go (of equal ones the
    first), and as many of the positions that were masked before grow, but no more than there are: a step of SET
    (arXiv:1707.04780) where they are drawn at random, of RigL (arXiv:1911.11134) where they are those of the largest
    dense gradient.

    Parameters
    ----------
    model : nn.Module
    optimizer : torch.optim.Optimizer or None
        Its parameters are exchanged: moments of kept weights stay, new weights have zeros.
    drop_fraction : float in [0, 1]
    grow : "random", or mapping from layer name to Tensor of shape (out_features, in_features)
        Scores, of which the largest grow, of equal ones the first: for RigL magnitudes of the dense gradient.
    seed : int
        Of what is drawn; give another at each update.

    Returns
    -------
    dict of str to Pattern
        The patterns before, by module name.

    Raises
    ------
    UserError
        If the model has no sparse layer that learns, `drop_fraction` is no number in [0, 1], `seed` no whole number of
        at least 0, scores are no tensors of real numbers, missing, or of another shape, or a layer's `values` are
        pruned by torch or parametrized. The model is then as it was.

    Examples
    --------
    >>> for step, batch in enumerate(batches):
    ...     model(batch).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     if step % 100 == 99:
    ...         vspdf.evolve(model, optimizer, 0.3, seed=step)
    """
    check_sparsity("drop_fraction", drop_fraction, all_masked=True)
    layers = whole_layers(model, "values")
    if not layers:
        raise UserError("evolve found no sparse layer: call vspdf.sparsify(model, ...) first.")
    layers = {name: layer for name, layer in layers.items() if layer.values.requires_grad}
    if not layers:
        raise UserError("evolve found no sparse layer that learns: all are frozen (requires_grad is False).")
    scores: Mapping[str, Tensor] = {}
    if not isinstance(grow, str):
        scores = grow
        check_scores(layers, scores)
    elif grow != "random":
        raise UserError(f"grow = '{grow}' is not known: expected 'random', or scores by layer name.")
    moved = {}
    for name, layer in layers.items():
        pattern = layer.pattern
        count = min(int(drop_fraction * pattern.nnz), pattern.numel - pattern.nnz)
        random = np.random.default_rng(layer_seed(seed, name))
        moved[name] = renewed(layer, pattern.nnz - count, pattern.nnz, random, scores.get(name))
    return remask(model, moved, optimizer, "evolve", often=True)


def check_scores(layers: Mapping[str, SparseLinear], scores: Mapping[str, Tensor]) -> None:
    """Raises UserError unless there are numbers for every position of every layer."""
    kind = type(scores).__name__
    require(isinstance(scores, Mapping), f"grow must be 'random', or a mapping from layer name to scores, not {kind}.")
    for name in scores:
        require(name in layers, f"grow: '{name}' is no sparse layer.{did_you_mean(name, layers)}")
    for name, layer in layers.items():
        if name not in scores:
            raise UserError(f"grow: there are no scores for layer '{name}'.")
        kind = type(scores[name]).__name__
        require(isinstance(scores[name], Tensor), f"grow: scores of '{name}' must be a torch.Tensor, not {kind}.")
        shape = tuple(scores[name].shape)
        require(
            shape == layer.pattern.shape,
            f"grow: scores of '{name}' have shape {shape}: expected (out_features, in_features) = "
            f"{layer.pattern.shape}.",
        )
        require(not scores[name].is_complex(), f"grow: scores of '{name}' are complex: expected real numbers.")
        require(not bool(torch.isnan(scores[name]).any()), f"grow: scores of '{name}' hold NaN.")


def renewed(
    layer: SparseLinear,
    keep: int,
    target: int,
    random: np.random.Generator,
    scores: Tensor | None = None,
    random_share: float = 0.0,
    anywhere: bool = False,
) -> Pattern:
    """The pattern that keeps a layer's `keep` largest weights and grows others until it has `target`.

    Parameters
    ----------
    layer : SparseLinear
    keep, target : int
    random : np.random.Generator
        What is drawn comes from here.
    scores : Tensor, shape (out_features, in_features), optional
        Of which the largest grow; without them positions are drawn.
    random_share : float in [0, 1]
        Of what grows by scores, drawn all the same.
    anywhere : bool
        Whether what is dropped may grow again at once, and then stays as it was, as in cstorch.sparse.
    """
    pattern = layer.pattern
    survivors = pattern.bits.copy()
    _drop(survivors, layer, pattern.nnz - keep)
    taken = (survivors if anywhere else pattern.bits).copy()  # no candidates
    free = pattern.numel - (keep if anywhere else pattern.nnz)
    count = min(target - keep, free)
    if count > 0:
        drawn = count if scores is None else int(random_share * count)
        if scores is not None:
            flags = unpack(taken, pattern.numel)
            best = np.zeros_like(flags)
            best[highest(_exact(scores.detach().reshape(-1)), flags, count - drawn)] = True
            survivors |= pack(best)
            taken |= survivors
        survivors |= _draw(taken, pattern.numel, free - (count - drawn), drawn, random)
    return Pattern(pattern.shape, survivors)


def _drop(bits: np.ndarray, layer: SparseLinear, count: int) -> None:
    """Clears the bits of a layer's `count` smallest weights."""
    values = layer.values.detach()
    if cpu.takes(values) and values.dtype == torch.float32 and count > 0:
        values = values.contiguous()
        cpu.extension().drop_lowest(
            bits, layer.pattern.numel, values.data_ptr(), len(values), count, torch.get_num_threads()
        )
        return
    flat = unpack(bits, layer.pattern.numel)
    flat[np.flatnonzero(flat)[lowest(np.abs(_exact(values)), count)]] = False
    bits[:] = pack(flat)


def _draw(taken: np.ndarray, numel: int, free: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Bits of `count` of the `free` positions that are not taken, each set of them as likely as any other."""
    if cpu.unavailable() is None and not _crowded(numel, free, count):
        now = taken.copy()
        while count:
            hits = random.integers(numel, size=count + count // 8)
            count -= cpu.extension().accept(now, numel, hits, count)
        return now ^ taken
    flat = np.zeros(numel, dtype=bool)
    flat[draw(unpack(taken, numel), count, random)] = True
    return pack(flat)


def _crowded(positions: int, free: int, count: int) -> bool:
    """Whether few positions are free, so that drawing among all would mostly hit others."""
    return count * 2 > free or free * 4 < positions


def _exact(values: Tensor) -> np.ndarray:
    """Values in the type of NumPy's that tells all of them apart that differ; integers above 2^53 aside."""
    single = values.is_floating_point() and values.element_size() <= 4
    return values.cpu().to(torch.float32 if single else torch.float64).numpy()


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` smallest of one-dimensional values, of equal ones the first; NaN counts as the largest."""
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    if count >= len(values):
        return np.arange(len(values))
    edge = np.partition(values, count - 1)[count - 1]
    nan = np.isnan(edge)  # to which nothing compares: all numbers lie below, all NaN are equal
    below = np.flatnonzero(~np.isnan(values) if nan else values < edge)
    equal = np.flatnonzero(np.isnan(values) if nan else values == edge)
    return np.concatenate([below, equal[: count - len(below)]])


def highest(scores: np.ndarray, taken: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest scores, of equal ones the first, among those that are not `taken`."""
    free = np.flatnonzero(~taken)
    return free[lowest(-scores[free], count)]


def draw(taken: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` different positions that are not `taken`, each set of them as likely as any other."""
    if _crowded(len(taken), len(taken) - int(np.count_nonzero(taken)), count):
        return random.choice(np.flatnonzero(~taken), count, replace=False, shuffle=False)
    taken, found = taken.copy(), []  # drawing with what hits a taken position thrown away is many times as fast
    while count:
        hits = random.integers(len(taken), size=count + count // 8)
        hits = _once(hits[~taken[hits]], len(taken))[:count]
        taken[hits] = True
        found.append(hits)
        count -= len(hits)
    return np.concatenate([*found, np.empty(0, dtype=np.int64)])


def _once(hits: np.ndarray, limit: int) -> np.ndarray:
    """`hits`, all below `limit`, each at its first place only, in their order."""
    order, last = np.arange(len(hits), dtype=np.int32), np.empty(limit, dtype=np.int32)
    last[hits[::-1]] = order[::-1]  # of equal ones the first is written last
    return hits[last[hits] == order]


def remask(
    model: nn.Module,
    patterns: Mapping[str, Pattern],
    optimizer: torch.optim.Optimizer | None,
    verb: str,
    moments: str = "keep",
    *,
    often: bool = False,
) -> dict[str, Pattern]:
    """Gives sparse layers other patterns: weights in both keep value, gradient and state, new ones are zeros.

    Parameters
    ----------
    patterns : mapping of str to Pattern
        By module name; layers that it does not name stay as they are.
    verb : str
        What was called, as warnings say it.
    moments : {"keep", "reset"}
        Whether the optimizer's state of the weights goes along.
    often : bool
        Whether `verb` is called time and again, see `warn_of_stale`.

    Returns
    -------
    dict of str to Pattern
        The patterns before.
    """
    check_follows(optimizer, model)
    layers, before, exchanged = whole_layers(model, "values"), {}, []
    for name, pattern in patterns.items():
        layer = layers[name]
        old, old_values = layer.pattern, layer.values
        before[name] = old
        if old is pattern:
            continue
        state = elements(optimizer, old_values) if moments == "keep" else []
        move = _Move(old, pattern, [old_values.detach(), *state])
        values = nn.Parameter(move(old_values.detach()), old_values.requires_grad)
        layer.pattern, layer.values = pattern, values
        carry(optimizer, old_values, values, move, moments)
        mark(old_values, values, name, move)
        old.packed.clear()  # whoever keeps the old pattern for what it was need not keep its plans
        exchanged.append((old_values, values))
    warn_of_stale(verb, exchanged, optimizer, often=often)
    if exchanged:
        warn_of_reducers(verb, model)
    return before


class _Move:
    """Takes a vector over the weights of one pattern to one over those of another: zeros where there was none.

    Parameters
    ----------
    expected : sequence of Tensor
        Vectors that will be asked for, and stay until then: what of them can, moves in one pass over the masks.
    """

    def __init__(self, old: Pattern, new: Pattern, expected: Sequence[Tensor] = ()) -> None:
        self.old, self.new = old, new
        mine = [vector for vector in expected if self._takes(vector) and vector.is_contiguous()]
        self._ready = dict(zip((vector.data_ptr() for vector in mine), self._moved(mine), strict=True)) if mine else {}

    def __call__(self, vector: Tensor) -> Tensor:
        if self._takes(vector):
            ready = self._ready.pop(vector.data_ptr(), None) if vector.is_contiguous() else None
            return self._moved([vector.contiguous()])[0] if ready is None else ready
        there = np.flatnonzero(self._from >= 0)
        to, from_ = (torch.from_numpy(at).to(vector.device) for at in (there, self._from[there].astype(np.int64)))
        return vector.new_zeros(len(self._from)).index_copy_(0, to, vector.index_select(0, from_))

    def _takes(self, vector: Tensor) -> bool:
        return cpu.takes(vector) and vector.dtype == torch.float32

    @cached_property
    def _from(self) -> np.ndarray:
        """Which weight of the old pattern each of the new one was, int32; -1: none."""
        if cpu.unavailable() is None:
            return self._moved([torch.arange(1, self.old.nnz + 1, dtype=torch.int32)])[0].numpy() - 1
        before = self.old.mask().view(-1).numpy()
        numbers = np.cumsum(before, dtype=np.int32) - 1
        at = self.new.positions().numpy()
        return np.where(before[at], numbers[at], np.int32(-1))

    def _moved(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Vectors of four-byte numbers in the CPU's memory."""
        old, new = self.old, self.new
        found = [vector.new_empty(new.nnz) for vector in vectors]
        cpu.extension().moved(
            [vector.data_ptr() for vector in found], [vector.data_ptr() for vector in vectors],
            old.bits, new.bits, new.numel, old.nnz, new.nnz, torch.get_num_threads(),
        )  # fmt: skip
        return found
