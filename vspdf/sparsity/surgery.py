"""The ways between dense and sparse in any model: `sparsify`, `set_sparsity`, `densify`.

All of them keep weights and optimizer state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vspdf.errors import UserError, check_sparsity, did_you_mean
from vspdf.kernels import reference
from vspdf.pattern import Pattern
from vspdf.sparsity.amounts import first_match, matches, plain_name
from vspdf.sparsity.attached import hand_over, mark, place
from vspdf.sparsity.eligible import (
    check_globs,
    is_linear,
    linear_layers,
    name_others,
    places_of,
    require_some,
    selected,
    why_dense,
)
from vspdf.sparsity.evolve import layer_seed, remask
from vspdf.sparsity.from_files import Amount, MaskFile, read_amounts
from vspdf.sparsity.kinds import is_conv1d
from vspdf.sparsity.layer import SparseLinear, whole_layers
from vspdf.sparsity.optimizer import carry, check_follows, check_moments, check_takes_vectors, warn_of_stale
from vspdf.sparsity.schedule import check_init_method
from vspdf.sparsity.stored import patterns_in
from vspdf.sparsity.wrapped import warn_of_reducers

log = logging.getLogger("vspdf")


def sparsify(
    model: nn.Module,
    sparsity: Amount | Mapping[str, Amount],
    *,
    seed: int = 0,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    init_method: str = "random",
    truncate: bool = False,
    rescale: bool = False,
    backend: str = "auto",
    memory: str = "normal",
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Pattern]:
    """Replaces linear layers of any model, in place, by sparse ones with static masks.

    Takes every `nn.Linear`, subclasses that compute the same, and transformers' `Conv1D`, except heads (by name, see
    `eligible.UNEMBEDDINGS`) and low-rank adapters. Layers whose weight is tied, frozen or quantised, whose ``forward``
    was replaced, and subclasses that use their weight in ways of their own are skipped with a logged warning; of a peft
    model, the frozen base is taken and stays frozen. Embeddings and norms are never touched. Kept weights keep their
    values and gradients; biases stay the same parameters; hooks, attributes and buffers of a layer follow it, also
    where a list of the model refers to it.

    Parameters
    ----------
    model : nn.Module
    sparsity : float in [0, 1), path, or mapping from glob over module names to float, path or Pattern
        Of a mapping the first matching glob counts; layers that match none stay dense, as do those at 0. A path is a
        file or folder of masks by layer, in any form that `Pattern.read` takes, or of one mask for all; layers that it
        does not name stay dense.
    seed : int
        Together with a layer's name gives its mask.
    include, exclude : str or iterable of str
        Globs over module names. Default: all layers, and none left out beside those said above.
    init_method : {"random", "random:FORM", "topk", "from_zeros", "checkerboard"}
        Which weights are kept: at random, at random in a form that `Pattern.random` has ("random:2:4",
        "random:16x16"), the largest, those that are not zero (whatever the sparsity), or evenly spread ones. Patterns
        given in the mapping are taken as they are.
    truncate : bool
        How kept weights are counted: ``numel − round(sparsity · numel)``, or ``int((1 − sparsity) · numel)``.
    rescale : bool
        Density-aware init (SµPar, arXiv:2405.15743): multiply kept weights by ``1/sqrt(density)``. For a model that was
        only just initialised.
    backend : {"auto", "cpu", "reference", "triton"}
    memory : {"normal", "low"}
        As `SparseLinear.memory`: on CPUs, generated code, or a quarter of its bytes and some less speed.
    optimizer : torch.optim.Optimizer, optional
        Its state of the replaced weights is carried over at kept positions. A line is logged where another living
        optimizer still holds weights that were replaced, or this one held none of them.

    Returns
    -------
    dict of str to Pattern
        By module name.

    Raises
    ------
    UserError
        If a sparsity is outside [0, 1), `seed` is no whole number of at least 0, `init_method` is unknown, a pattern
        does not fit, or a glob or the whole call matches no layer. The model is then as it was.
    """
    rules = read_amounts(sparsity)
    if init_method == "file":
        raise UserError("init_method 'file' is of phases: give sparsify the file in the place of the sparsity.")
    check_init_method("init_method", init_method)
    check_follows(optimizer, model)
    linears, wrapped = linear_layers(model)
    require_some(model, linears)
    check_globs(model, linears, rules, include, exclude)
    name_others(model)
    uses = places_of(model)
    layers: dict[str, SparseLinear] = {}
    for name, module in selected(linears, include, exclude).items():
        amount = first_match(rules, name, 0.0)
        if isinstance(amount, MaskFile):
            amount = amount.of(name)
        if amount == 0.0:
            continue
        if why := why_dense(module, uses, wrapped):
            log.warning("sparsify: '%s' stays dense: %s.", name, why)
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not isinstance(amount, Pattern):
            dense = weight.detach().T if is_conv1d(module) else weight.detach()
            if dense.is_meta and (init_method in ("topk", "from_zeros") or rescale):
                what = "rescale" if rescale else f"init_method '{init_method}'"
                raise UserError(f"'{name}' is on the meta device, it has no weights yet: {what} needs them.")
            amount = _draw(dense, amount, init_method, layer_seed(seed, name), truncate)
            if init_method == "from_zeros" and amount.nnz == amount.numel:
                log.warning("sparsify: '%s' stays dense: none of its weights is zero.", name)
                continue
        layers[name] = SparseLinear.from_linear(module, amount, backend=backend, memory=memory)
    for masks in {id(rule): rule for rule in rules.values() if isinstance(rule, MaskFile)}.values():
        masks.check_used(linears)
    check_takes_vectors(optimizer, [linears[name].weight for name in layers])
    for name, layer in layers.items():
        if rescale and layer.pattern.nnz:
            with torch.no_grad():
                layer.values.mul_(1 / math.sqrt(layer.pattern.density))
        _put_sparse(model, name, linears[name], layer, optimizer)
    exchanged = [(linears[name].weight, layer.values) for name, layer in layers.items()]
    warn_of_stale("sparsify", exchanged, optimizer)  # type: ignore[arg-type]
    if exchanged:
        warn_of_reducers("sparsify", model)
    return {name: layer.pattern for name, layer in layers.items()}


def _put_sparse(
    model: nn.Module, name: str, module: nn.Module, layer: SparseLinear, optimizer: torch.optim.Optimizer | None
) -> None:
    """`layer` in the place of a dense `module`, with its bias, its state in the optimizer and all that hung on it."""
    conv1d, pattern = is_conv1d(module), layer.pattern
    layer.bias = module.bias  # type: ignore[assignment]
    assert isinstance(module.weight, nn.Parameter)

    def to_values(dense: Tensor) -> Tensor:
        return reference.sample(dense.T if conv1d else dense, pattern)

    carry(optimizer, module.weight, layer.values, to_values)
    mark(module.weight, layer.values, name, to_values)
    hand_over(module, layer, name)
    place(model, module, layer)


def _draw(weight: Tensor, sparsity: float, method: str, seed: int, truncate: bool) -> Pattern:
    """Pattern of a layer with the dense `weight` [out_features, in_features]."""
    if method == "topk":
        return Pattern.topk(weight, sparsity, truncate=truncate)
    if method == "from_zeros":
        return Pattern.from_mask(weight != 0)
    shape = (weight.shape[0], weight.shape[1])
    if method == "checkerboard":
        return Pattern.checkerboard(shape, sparsity, truncate=truncate)
    form = method.partition(":")[2] or None
    return Pattern.random(shape, sparsity, seed=seed, truncate=truncate, fits=form)


def set_sparsity(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    seed: int = 0,
    moments: str = "keep",
) -> dict[str, Pattern]:
    """Densifies every sparse layer, in place, down to `sparsity`: adds random positions, never drops any.

    `sparsity` may be a mapping from glob over module names to sparsity: the first match counts, layers that match none
    stay as they are. New weights are zeros that learn; kept weights and, with ``moments="keep"``, their optimizer state
    stay. At 0 layers stay sparse layers with a full pattern; `densify` goes back to dense classes.

    Returns
    -------
    dict of str to Pattern
        The patterns before, by module name.

    Raises
    ------
    UserError
        If a layer is already denser, the model has no sparse layer, a sparsity is no number in [0, 1], `seed` is no
        whole number of at least 0, `moments` is unknown, or a layer's `values` are pruned by torch or parametrized. The
        model is then as it was.
    """
    check_moments(moments)
    layers = whole_layers(model, "values")
    if not layers:
        raise UserError("set_sparsity found no sparse layer: call vspdf.sparsify(model, ...) first.")
    rules = sparsity if isinstance(sparsity, Mapping) else {"*": sparsity}
    for glob, amount in rules.items():
        check_sparsity("sparsity" if glob == "*" else f"the sparsity of '{glob}'", amount, all_masked=True)
        if not any(matches(name, glob) for name in layers):
            raise UserError(f"'{glob}' matches no sparse layer.{did_you_mean(glob, map(plain_name, layers))}")
    grown = {}
    for name, layer in layers.items():
        kept = first_match(rules, name, None)
        if kept is not None:
            grown[name] = layer.pattern.grow(kept, seed=layer_seed(seed, name))
    return remask(model, grown, optimizer, "set_sparsity", moments)


def densify(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, moments: str = "keep"
) -> dict[str, Pattern]:
    """Turns every sparse layer, in place, back into its original class; masked weights become zeros that learn.

    Parameters
    ----------
    model : nn.Module
    optimizer : torch.optim.Optimizer, optional
        Its parameters are exchanged; with ``moments="keep"`` moments of kept weights are carried over (zeros
        elsewhere), with ``"reset"`` those weights start without state.

    Returns
    -------
    dict of str to Pattern
        The patterns before, by module name.

    Raises
    ------
    UserError
        If `moments` is unknown, `model` is itself a sparse layer, or `values` or a bias of one are pruned by torch or
        parametrized. The model is then as it was.
    """
    check_moments(moments)
    if isinstance(model, SparseLinear):
        raise UserError("densify replaces layers inside a model; for a single one use its to_linear().")
    check_follows(optimizer, model)
    layers = whole_layers(model, "values", "bias")
    for name, layer in layers.items():
        if "forward" in vars(layer):
            raise UserError(
                f"densify: the forward of '{name}' was replaced on the layer itself (by a hook of accelerate's?), and "
                "would go on with the sparse layer: take that off first."
            )
    exchanged = []
    for name, layer in layers.items():
        dense = layer.to_original()
        assert isinstance(dense.weight, nn.Parameter)
        dense.weight.requires_grad_(layer.values.requires_grad)
        dense.register_parameter("bias", layer.bias)
        carry(optimizer, layer.values, dense.weight, layer.spread, moments)
        mark(layer.values, dense.weight, name, layer.spread)
        hand_over(layer, dense, name)
        place(model, layer, dense)
        exchanged.append((layer.values, dense.weight))
    warn_of_stale("densify", exchanged, optimizer)
    warn_of_reducers("densify", model)
    return {name: layer.pattern for name, layer in layers.items()}


def adopt(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, backend: str = "auto", memory: str = "normal"
) -> dict[str, Pattern]:
    """Makes those layers of a dense model sparse whose patterns a state_dict holds, so that it can be loaded.

    Returns
    -------
    dict of str to Pattern
        By module name; empty where the state is that of a dense model.

    Raises
    ------
    UserError
        If the model has no such layer, or a pattern does not fit it.
    """
    patterns = {name: pattern for name, (_, pattern) in patterns_in(state_dict, model, is_linear).items()}
    return sparsify(model, patterns, backend=backend, memory=memory) if patterns else {}
