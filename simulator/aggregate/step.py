"""A training step of a GPT on one or several systems, from the law of one layer (`layer`).

Per micro-batch: all blocks forward, then backward. The four matrices of a block and the unembedding are streamed;
attention multiplies what lies on the wafer by the same law, keys and values in the place of weights; softmax, GELU and
norms are vector passes. Weights come in and gradients go out once per micro-batch, the update happens in the memory
service. The choices of a compiler (columns of a ring, whether a block is kept or computed again) are searched, for
dense and sparse apart.
"""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import dataclass

import numpy as np

from vspdf.errors import UserError, check_sparsity
from vspdf.shapes import Shape
from vspdf.simulator.aggregate import layer
from vspdf.simulator.aggregate.layer import PRODUCTS, Assumption, Cost, Mapping, Weights, bounded
from vspdf.simulator.machine import Machine


@dataclass(frozen=True)
class Placement:
    """A step's mapping: one ring width for all layers, and how the batch of a system is cut."""

    ring: Mapping
    micro_batch: int  # sequences on the wafer at a time
    passes: int  # micro-batches of a step
    recompute: bool  # only a block's input is kept for the backward pass


@dataclass
class Estimate:
    """One case of a step.

    Attributes
    ----------
    parts : dict of str to Cost
        Per part of the model ("linear layers", "attention", "elementwise", "vocabulary", "update") over the step.
    products : dict of str to Cost
        The three products of the projections and the FFN; forward includes what is computed again.
    seconds : float
        Of one step at `clock`.
    """

    placement: Placement
    parts: dict[str, Cost]
    products: dict[str, Cost]
    clock: float

    @property
    def total(self) -> Cost:
        total = Cost()
        for cost in self.parts.values():
            total.add(cost)
        return total

    @property
    def seconds(self) -> float:
        return self.total.cycles / self.clock


@dataclass(frozen=True)
class Model:
    """A model in training: a shape, its sparsified matrices with how often each occurs, a batch of sequences."""

    shape: Shape
    layers: tuple[tuple[Weights, int], ...]
    batch: int  # sequences of a step, all systems
    systems: int = 1

    @classmethod
    def uniform(cls, shape: Shape, batch: int, sparsity: float = 0.0, systems: int = 1) -> Model:
        """All projection and FFN matrices at one sparsity, positions by chance."""
        check_sparsity("`sparsity`", sparsity)
        layers = tuple((Weights(o, i, 1 - sparsity), n) for (o, i), n in matrices(shape).items())
        return cls(shape, layers, batch, systems)

    @classmethod
    def of_patterns(cls, shape: Shape, patterns: abc.Mapping[str, np.ndarray], batch: int, systems: int = 1) -> Model:
        """Real positions, bool [out_features, in_features] by layer; matrices without a pattern are dense."""
        left, layers = Counter(matrices(shape)), []
        for mask in patterns.values():
            layers.append((Weights(mask.shape[0], mask.shape[1], float(mask.mean()), mask), 1))
            left[mask.shape] -= 1
        if sum(w.numel for w, _ in layers) < shape.linear:
            layers += [(Weights(o, i), n) for (o, i), n in left.items() if n > 0]
        return cls(shape, tuple(layers), batch, systems)

    @property
    def dense(self) -> Model:
        counts: Counter[tuple[int, int]] = Counter()
        for weights, n in self.layers:
            counts[weights.out_features, weights.in_features] += n
        return Model(self.shape, tuple((Weights(o, i), n) for (o, i), n in counts.items()), self.batch, self.systems)

    @property
    def kept(self) -> float:
        """The fraction of projection and FFN weights that is kept."""
        return sum(w.nnz * n for w, n in self.layers) / sum(w.numel * n for w, n in self.layers)

    @property
    def tokens(self) -> int:
        return self.batch * self.shape.sequence_length

    def flops(self, dense: bool = False) -> float:
        """Useful FLOPs of a step: kept weights, attention in full, vocabulary (convention `spdf`)."""
        s = self.shape
        linear = s.linear * (1.0 if dense else self.kept)
        return 6 * self.tokens * (linear + s.attention + s.vocabulary)

    def grouped(self) -> Model:
        """Layers of a shape as one, at their mean density: for the search."""
        groups: dict[tuple[int, int], list[tuple[Weights, int]]] = {}
        for weights, n in self.layers:
            groups.setdefault((weights.out_features, weights.in_features), []).append((weights, n))
        layers = []
        for (o, i), members in groups.items():
            count = sum(n for _, n in members)
            layers.append((Weights(o, i, sum(w.density * n for w, n in members) / count), count))
        return Model(self.shape, tuple(layers), self.batch, self.systems)


def matrices(shape: Shape) -> dict[tuple[int, int], int]:
    """(out_features, in_features) of the sparsified matrices and how many there are: QKV as one, projection, FFN."""
    d, a, f, n = shape.d_model, shape.d_attention, shape.d_ff, shape.n_layer
    counts: Counter[tuple[int, int]] = Counter()
    for sides in ((3 * a, d), (d, a), (f, d), (d, f)):
        counts[sides] += n
    return dict(counts)


# ---- memory ----------------------------------------------------------------------------------------------------------


def token_bytes(shape: Shape, columns: int, recompute: bool) -> int:
    """SRAM of a PE per local token, fp16: what the backward pass needs of every block, and one block at work.

    Kept: a block's input, Q, K, V, attention's output, the FFN's input and inner values before GELU (norms, GELU
    and scores are computed again); with `recompute` its input alone. At work: the gradients of these; or the logits.
    """
    d, a, f, v = (-(-n // columns) for n in (shape.d_model, shape.d_attention, shape.d_ff, shape.vocab_size))
    inside = 2 * d + 4 * a + f
    at_work = 4 * max(d, a) + 2 * f + (inside if recompute else 0)
    return 2 * (shape.n_layer * (d if recompute else inside) + max(at_work, v))


def placements(machine: Machine, model: Model) -> list[Placement]:
    """Lists for every ring width both ways to keep activations, with as many sequences at a time as fit.

    Raises
    ------
    UserError
        If not one sequence fits, or systems have nothing to do.
    """
    shape = model.shape
    if not 1 <= model.systems <= model.batch:
        raise UserError(
            f"{model.systems} systems share a batch of {model.batch} sequences: expected 1 to {model.batch}."
        )
    share = -(-model.batch // model.systems)
    limit = machine.activation_share * machine.sram_bytes
    found, least = [], float("inf")
    for columns in layer.candidates(machine, min(shape.d_model, shape.d_attention, shape.d_ff)):
        groups = machine.width // columns * machine.height
        for recompute in (False, True):
            per_token = token_bytes(shape, columns, recompute)
            sequences = int(limit // per_token) * groups // shape.sequence_length
            if sequences < 1:
                least = min(least, per_token * -(-shape.sequence_length // groups))
                continue
            passes = -(-share // sequences)
            at_once = -(-share // passes)
            ring = Mapping.of(machine, columns, at_once * shape.sequence_length)
            found.append(Placement(ring, at_once, passes, recompute))
    if not found:
        raise UserError(
            f"the model does not fit {machine.name}: the activations of one sequence of {shape.sequence_length} tokens "
            f"need {least:,.0f} bytes of SRAM a PE, {limit:,.0f} are there (activation_share of "
            f"{machine.sram_bytes:,})."
        )
    return found


# ---- parts -----------------------------------------------------------------------------------------------------------


def _passes(machine: Machine, elements: float) -> Cost:
    """Softmax, GELU, norms and residual sums over so many elements of a PE: vector passes of fp16."""
    return bounded({"elementwise": machine.elementwise_passes * elements / machine.fmac_fp16_rate}, 0.0)


def attention(machine: Machine, model: Model, place: Placement, assumption: Assumption) -> Cost:
    """All heads of one block over one micro-batch, forward and backward.

    QKᵀ and AV, and the four products of their backward pass, and once more what is not kept; a key (or value) of a
    token takes the place of a weight row: its features trigger AXPYs on the local queries of its own sequence, sums go
    around the columns of a head. In full, not causal.
    """
    s, ring = model.shape, place.ring
    local = min(ring.local, s.sequence_length)
    rule = layer.law(machine, assumption.start_up, local, "forward")
    heads = -(-s.n_head // ring.columns)
    rule = layer.Law(rule.start_up, rule.vector, rule.words * heads, rule.command)
    rows = s.sequence_length * ring.local / local
    products = 8 if place.recompute else 7  # scores are never kept; AV again only with the whole block
    parts = rule.attribute(-(-s.d_attention // ring.columns), rows)
    parts["fill"] = layer.fill(machine, ring)
    one = bounded(parts, float(s.sequence_length) * s.d_attention * ring.tokens)
    total = Cost()
    total.add(one, products)
    total.macs = 6 * one.macs
    return total


def elementwise(machine: Machine, model: Model, place: Placement) -> Cost:
    """Scores' softmax, GELU, two norms and two residual sums of a block: forward, again, backward."""
    s, ring = model.shape, place.ring
    elements = s.sequence_length * s.n_head + s.d_ff + 4 * s.d_model
    return _passes(machine, 3 * ring.local * elements / ring.columns)


def estimate(
    machine: Machine, clock: float, model: Model, place: Placement, assumption: Assumption, exact: bool = True
) -> Estimate:
    """One step under a given placement. `exact`: with the waiting of columns for each other."""
    s, ring = model.shape, place.ring
    products = {name: Cost() for name in PRODUCTS}
    for weights, count in model.layers:
        costs = layer.product_costs(machine, clock, weights, ring, assumption, exact)
        again = 2 if place.recompute else 1
        for name, cost in costs.items():
            products[name].add(cost, place.passes * count * (again if name == "forward" else 1))
            products[name].macs -= place.passes * count * cost.macs * (again - 1 if name == "forward" else 0)
    linear = Cost()
    for cost in products.values():
        linear.add(cost)
    parts = {"linear layers": linear}
    per_block = {
        "attention": attention(machine, model, place, assumption),
        "elementwise": elementwise(machine, model, place),
    }
    for name, cost in per_block.items():
        parts[name] = Cost()
        parts[name].add(cost, place.passes * s.n_layer)
    vocabulary = Cost()
    for cost in layer.product_costs(machine, clock, Weights(s.vocab_size, s.d_model), ring, assumption, exact).values():
        vocabulary.add(cost)
    vocabulary.add(_passes(machine, 2 * ring.local * s.vocab_size / ring.columns))
    parts["vocabulary"] = Cost()
    parts["vocabulary"].add(vocabulary, place.passes)
    parts["update"] = update(machine, clock, model)
    return Estimate(place, parts, products, clock)


def update(machine: Machine, clock: float, model: Model) -> Cost:
    """Cycles of the update that show: the last gradient's way out and the first weights' way back, and of the rest a
    fraction (`update_exposed`). Several systems add their gradients on the way, a tree of exchanges."""
    last, _ = model.layers[0]
    dense_form = last.numel * (machine.dense_weight_bytes + machine.gradient_bytes)
    turn = min(dense_form, last.nnz * (machine.sparse_weight_bytes + machine.gradient_bytes))
    kept = sum(w.nnz * n for w, n in model.layers) + model.shape.vocabulary
    turn += machine.update_exposed * kept * machine.gradient_bytes
    levels = (model.systems - 1).bit_length()
    cycles = (turn / machine.host_bandwidth + 2 * levels * machine.exchange_latency) * clock
    return Cost(cycles, {"I/O": cycles}, {"I/O": cycles}, 0.0, cycles)


def search(machine: Machine, clock: float, model: Model, assumption: Assumption) -> Estimate:
    """The fastest placement that fits, by expectation; then what it costs with the real positions, where known."""
    grouped = model.grouped()

    def lower(place: Placement) -> float:
        return estimate(machine, clock, grouped, place, assumption, exact=False).total.cycles

    def exact(place: Placement) -> tuple[float, Estimate]:
        found = estimate(machine, clock, grouped, place, assumption)
        return found.total.cycles, found

    place, found = layer.best(placements(machine, model), lower, exact)
    measured = any(weights.mask is not None for weights, _ in model.layers)
    return estimate(machine, clock, model, place, assumption) if measured else found
