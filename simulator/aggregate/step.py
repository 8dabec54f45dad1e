"""A training step of a GPT on one or several systems, from the law of one layer (`layer`).

Per micro-batch: all blocks forward, then backward. The matrices of a block and the unembedding are streamed; attention
multiplies what lies on the wafer by the same law, keys and values in the place of weights; softmax, GELU and norms are
vector passes. Weights come in and gradients go out once per micro-batch, the update happens in the memory service
(`cluster`), and a step has a fixed cost beside all that. The choices of a compiler (columns of a ring, whether a block
is kept or computed again) are searched, for dense and sparse apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from vspdf.errors import UserError
from vspdf.simulator.aggregate import cluster, layer
from vspdf.simulator.aggregate.law import law
from vspdf.simulator.aggregate.layer import PRODUCTS, Cost, Mapping, Weights, bounded
from vspdf.simulator.aggregate.model import Model, Transformer
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
        Per part of the model ("linear layers", "attention", "elementwise", "vocabulary", "between steps", "fixed") over
        the step.
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
        return Cost.sum(self.parts.values())

    @property
    def seconds(self) -> float:
        return self.total.cycles / self.clock


# ---- memory ----------------------------------------------------------------------------------------------------------


def token_bytes(shape: Transformer, columns: int, recompute: bool) -> int:
    """SRAM of a PE per local token, fp16: what the backward pass needs of every block, and one block at work.

    Kept: a block's input, Q, K, V, attention's output, the FFN's input and inner values before its activation (norms,
    activations and scores are computed again); with `recompute` its input alone. At work: the gradients of these; or
    the logits.
    """
    inner = shape.d_ff * (2 if shape.gated else 1)
    d, q, k, f, v = (-(-n // columns) for n in (shape.d_model, shape.d_attention, shape.d_kv, inner, shape.vocab_size))
    inside = 2 * d + 2 * q + 2 * k + f
    at_work = 4 * d + 2 * f + (inside if recompute else 0)
    return 2 * (shape.n_layer * (d if recompute else inside) + max(at_work, v))


def placements(machine: Machine, model: Model, among: tuple[int, ...] | None = None) -> list[Placement]:
    """Lists for every ring width (or those `among`) both ways to keep activations, with as many sequences as fit.

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
    for columns in among or layer.candidates(machine, min(shape.d_model, shape.d_ff)):
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


def attention(machine: Machine, model: Model, place: Placement) -> Cost:
    """All heads of one block over one micro-batch, forward and backward.

    QKᵀ and AV, and the four products of their backward pass, and once more what is not kept; a key (or value) of a
    token takes the place of a weight row: its features trigger AXPYs on the local queries of its own sequence, sums go
    around the columns of a head. In full, not causal.
    """
    s, ring = model.shape, place.ring
    local = min(ring.local, s.sequence_length)
    rule = law(machine, ring.columns, local, "forward", 0.0, -(-s.n_head // ring.columns))  # keys lie on the wafer
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
    elements = s.sequence_length * s.n_head + s.d_ff * (2 if s.gated else 1) + 4 * s.d_model
    return _passes(machine, 3 * ring.local * elements / ring.columns)


def vocabulary(machine: Machine, clock: float, model: Model, place: Placement, exact: bool) -> Cost:
    """The unembedding and the softmax over its logits, for the positions that get any, over one micro-batch."""
    s, ring = model.shape, place.ring
    if s.predicted < 1:
        ring = Mapping.of(machine, ring.columns, max(1, round(ring.tokens * s.predicted)))
    total = Cost.sum(layer.product_costs(machine, clock, Weights(s.vocab_size, s.d_model), ring, exact).values())
    total.add(_passes(machine, 2 * ring.local * s.vocab_size / ring.columns))
    return total


def estimate(machine: Machine, clock: float, model: Model, place: Placement, exact: bool = True) -> Estimate:
    """One step under a given placement. `exact`: with the waiting of columns for each other."""
    s, ring = model.shape, place.ring
    products = {name: Cost() for name in PRODUCTS}
    for weights, count in model.layers:
        costs = layer.product_costs(machine, clock, weights, ring, exact)
        again = 2 if place.recompute else 1
        for name, cost in costs.items():
            products[name].add(cost, place.passes * count * (again if name == "forward" else 1))
            products[name].macs -= place.passes * count * cost.macs * (again - 1 if name == "forward" else 0)
    parts = {"linear layers": Cost.sum(products.values())}
    once = {
        "attention": (attention(machine, model, place), s.n_layer),
        "elementwise": (elementwise(machine, model, place), s.n_layer),
        "vocabulary": (vocabulary(machine, clock, model, place, exact), 1),
    }
    for name, (cost, count) in once.items():
        parts[name] = Cost()
        parts[name].add(cost, place.passes * count)
    parts["between steps"] = between_steps(machine, clock, model, place, products, parts)
    fixed = machine.step_overhead * clock
    parts["fixed"] = Cost(fixed, {"fixed": fixed}, {"fixed": fixed})
    return Estimate(place, parts, products, clock)


def between_steps(
    machine: Machine, clock: float, model: Model, place: Placement, products: dict[str, Cost], parts: dict[str, Cost]
) -> Cost:
    """What of the chain gradients, tree, update, weights shows between two steps, and the wait for the slowest."""
    joined = cluster.Cluster.of(machine, model.systems, clock)
    s = model.shape
    forward = products["forward"].cycles / (2 if place.recompute else 1)
    inside = sum(cost.cycles for cost in products.values()) + parts["attention"].cycles + parts["elementwise"].cycles
    forward += (parts["attention"].cycles + parts["elementwise"].cycles) / 3
    blocks = place.passes * s.n_layer
    one = cluster.Block(forward / blocks, (inside - forward) / blocks, (model.trained - s.vocabulary) / s.n_layer)
    last = parts["vocabulary"].cycles / place.passes
    found = cluster.exposed(
        [*[one] * s.n_layer, cluster.Block(last / 3, last * 2 / 3, float(s.vocabulary))], model.layers[0][0].nnz, joined
    )
    found["waiting"] += joined.straggling * sum(cost.cycles for cost in parts.values())
    cycles = sum(found.values())
    bounds = {"I/O": found["streaming"], "tree": found["tree"], "memory": found["update"] + found["waiting"]}
    return Cost(cycles, dict(found), bounds, 0.0, found["streaming"])


def search(machine: Machine, clock: float, model: Model, among: tuple[int, ...] | None = None) -> Estimate:
    """The fastest placement that fits, by expectation; then what it costs with the real positions, where known."""
    grouped = model.grouped()

    def lower(place: Placement) -> float:
        return estimate(machine, clock, grouped, place, exact=False).total.cycles

    def exact(place: Placement) -> tuple[float, Estimate]:
        found = estimate(machine, clock, grouped, place)
        return found.total.cycles, found

    place, found = layer.best(placements(machine, model, among), lower, exact)
    return estimate(machine, clock, model, place) if model.measured else found
