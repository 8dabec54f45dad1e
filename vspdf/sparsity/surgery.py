"""The ways between dense and sparse in any model: `sparsify`, `set_sparsity`, `densify`.

All of them keep weights and optimizer state.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from vspdf.errors import UserError, did_you_mean
from vspdf.pattern import Pattern
from vspdf.sparsity.layer import SparseLinear, _is_conv1d, scatter, sparse_layers
from vspdf.sparsity.optimizer import _carry, _check_moments
from vspdf.sparsity.schedule import INIT_METHODS

log = logging.getLogger("vspdf")

# Output heads of the common architectures: an unembedding is never sparsified, tied or not.
UNEMBEDDINGS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out", "output_projection", "*.unembed", "unembed")


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _is_conv1d(module)


def _globs(globs: str | Iterable[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in every place of `old`: a shared module stays shared."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)


def _layer_seed(seed: int, name: str) -> int:
    """Masks of different layers are independent, and a layer's does not depend on the others."""
    return (seed << 32) | zlib.crc32(name.encode())


def sparsify(
    model: nn.Module,
    sparsity: float | Mapping[str, float | Pattern],
    *,
    seed: int = 0,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    init_method: str = "random",
    truncate: bool = False,
    rescale: bool = False,
    backend: str = "auto",
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Pattern]:
    """Replaces linear layers of any model, in place, by sparse ones with static masks.

    Takes every `nn.Linear` and transformers' `Conv1D`, except unembeddings (by name, `UNEMBEDDINGS`). Layers whose
    weight is tied, frozen or quantised and subclasses, which may use their weight in ways of their own, are skipped
    with a logged warning. Embeddings and norms are never touched. Kept weights keep their values; biases stay the same
    parameters.

    Parameters
    ----------
    model : nn.Module
    sparsity : float in [0, 1), or mapping from glob over module names to float or Pattern
        Of a mapping the first matching glob counts; layers that match none stay dense, as do those at 0.
    seed : int
        Together with a layer's name gives its mask.
    include, exclude : globs over module names, one or several
    init_method : {"random", "topk", "from_zeros", "checkerboard"}
        Which weights are kept: at random, the largest, those that are not zero (whatever the sparsity), or evenly
        spread ones. Patterns given in the mapping are taken as they are.
    truncate : bool
        How kept weights are counted: ``numel − round(sparsity · numel)``, or ``int((1 − sparsity) · numel)``.
    rescale : bool
        Density-aware init (SµPar, arXiv:2405.15743): multiply kept weights by ``1/sqrt(density)``. For a model that was
        only just initialised.
    backend : {"auto", "cpu", "reference", "triton"}
    optimizer : torch.optim.Optimizer, optional
        Its state of the replaced weights is carried over at kept positions.

    Returns
    -------
    dict of str to Pattern
        By module name.

    Raises
    ------
    UserError
        If a sparsity is outside [0, 1), `init_method` is unknown, a pattern does not fit, or a glob or the
        whole call matches no layer. The model is then as it was.
    """
    rules, linears = _rules(sparsity, init_method), _linears(model)
    _check_globs(model, linears, (*rules, *_globs(include)), _globs(exclude))
    drawn = _drawn(model, _chosen(linears, include, exclude), rules, seed, init_method, truncate)
    layers = {name: SparseLinear.from_linear(linears[name], p, backend=backend) for name, p in drawn.items()}
    for name, layer in layers.items():
        _exchange(model, linears[name], layer, rescale, optimizer)
    return drawn


def _rules(sparsity: float | Mapping[str, float | Pattern], init_method: str) -> dict[str, float | Pattern]:
    """What `sparsify` is asked for, by glob over module names."""
    if init_method not in INIT_METHODS:
        raise UserError(f"init_method '{init_method}' is not known.{did_you_mean(init_method, INIT_METHODS)}")
    rules: dict[str, float | Pattern] = {**sparsity} if isinstance(sparsity, Mapping) else {"*": sparsity}
    for glob, amount in rules.items():
        if not isinstance(amount, Pattern) and not 0 <= amount < 1:
            raise UserError(f"sparsity must lie in [0, 1), not {amount}{'' if glob == '*' else f' (for {glob!r})'}.")
    return rules


def _drawn(
    model: nn.Module, chosen: Mapping[str, nn.Module], rules: Mapping[str, float | Pattern], seed: int,
    init_method: str, truncate: bool,
) -> dict[str, Pattern]:  # fmt: skip
    """Patterns of those layers that become sparse; what stays dense against expectation is logged."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not _is_linear(module) and not _matches(name, UNEMBEDDINGS):
            log.warning("sparsify: '%s' stays dense: %s is a kind of its own.", name, type(module).__name__)
    uses, patterns = _uses(model), {}
    for name, module in chosen.items():
        amount = next((rule for glob, rule in rules.items() if fnmatchcase(name, glob)), 0.0)
        if not isinstance(amount, Pattern) and amount == 0:
            continue
        if why := _stays_dense(module, uses):
            log.warning("sparsify: '%s' stays dense: its weight is %s.", name, why)
            continue
        if not isinstance(amount, Pattern):
            weight = module.weight
            assert isinstance(weight, Tensor)
            dense = weight.detach().T if _is_conv1d(module) else weight.detach()
            amount = _draw(dense, amount, init_method, _layer_seed(seed, name), truncate)
            if init_method == "from_zeros" and amount.nnz == amount.numel:
                log.warning("sparsify: '%s' stays dense: none of its weights is zero.", name)
                continue
        patterns[name] = amount
    return patterns


def sparsifiable(
    model: nn.Module, include: str | Iterable[str] = "*", exclude: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The dense layers of a model that `sparsify` can replace, by name."""
    uses = _uses(model)
    chosen = _chosen(_linears(model, need=False), include, exclude)
    return {name: module for name, module in chosen.items() if not _stays_dense(module, uses)}


def _linears(model: nn.Module, need: bool = True) -> dict[str, nn.Module]:
    """Linear layers of a model beside unembeddings, by name; an error where some are needed and there is none."""
    if need and _is_linear(model):
        raise UserError("sparsify replaces layers inside a model; for a single one use SparseLinear.from_linear.")
    linears = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and not _matches(name, UNEMBEDDINGS)
    }
    if need and not linears:
        if already := len(sparse_layers(model)):
            raise UserError(
                f"sparsify found no layer: {already} are sparse already; set_sparsity adds weights to them."
            )
        raise UserError("sparsify found no layer: the model has no nn.Linear or Conv1D beside unembeddings.")
    return linears


def _check_globs(model: nn.Module, linears: Iterable[str], wanted: Iterable[str], exclude: Iterable[str]) -> None:
    for glob in wanted:
        if not any(fnmatchcase(name, glob) for name in linears):
            raise UserError(f"'{glob}' matches no linear layer.{did_you_mean(glob, linears)}")
    for glob in exclude:
        if not any(fnmatchcase(name, glob) for name, _ in model.named_modules()):
            raise UserError(f"'{glob}' matches no module.{did_you_mean(glob, linears)}")


def _chosen(
    linears: Mapping[str, nn.Module], include: str | Iterable[str], exclude: str | Iterable[str]
) -> dict[str, nn.Module]:
    include, exclude = _globs(include), _globs(exclude)
    return {n: module for n, module in linears.items() if _matches(n, include) and not _matches(n, exclude)}


def _uses(model: nn.Module) -> Counter[int]:
    """In how many places each parameter is, by its id."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _stays_dense(module: nn.Module, uses: Counter[int]) -> str | None:
    """What keeps a layer's weight from being replaced, if anything does."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"a {type(weight).__name__} of {weight.dtype} (quantised?)"
    if uses[id(weight)] > 1:
        return "tied to another module's"
    return None if weight.requires_grad else "frozen (requires_grad is False)"


def _exchange(
    model: nn.Module, module: nn.Module, layer: SparseLinear, rescale: bool, optimizer: torch.optim.Optimizer | None
) -> None:
    """Puts a sparse layer in the place of a dense one, with its bias and the optimizer's state of its weight."""
    pattern, bias = layer.pattern, module.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    layer.bias = bias
    if rescale and pattern.nnz:
        with torch.no_grad():
            layer.values.mul_(1 / math.sqrt(pattern.density))
    mask, conv1d = pattern.mask().to(layer.values.device), _is_conv1d(module)
    _carry(optimizer, module.weight, layer.values, lambda t: (t.T if conv1d else t)[mask])
    _replace(model, module, layer)


def _draw(weight: Tensor, sparsity: float, method: str, seed: int, truncate: bool) -> Pattern:
    """Pattern of a layer with the dense `weight` [out_features, in_features]."""
    if method == "topk":
        return Pattern.topk(weight, sparsity, truncate=truncate)
    if method == "from_zeros":
        return Pattern.from_mask(weight != 0)
    shape = (weight.shape[0], weight.shape[1])
    if method == "checkerboard":
        return Pattern.checkerboard(shape, sparsity, truncate=truncate)
    return Pattern.random(shape, sparsity, seed=seed, truncate=truncate)


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
        If a layer is already denser, the model has no sparse layer, or `moments` is unknown.
    """
    _check_moments(moments)
    layers = sparse_layers(model)
    if not layers:
        raise UserError("set_sparsity found no sparse layer: call vspdf.sparsify(model, ...) first.")
    rules = sparsity if isinstance(sparsity, Mapping) else {"*": sparsity}
    for glob in rules:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise UserError(f"'{glob}' matches no sparse layer.{did_you_mean(glob, layers)}")
    grown = {
        name: layer.pattern.grow(amount, seed=_layer_seed(seed, name))
        for name, layer in layers.items()
        if (amount := next((rule for glob, rule in rules.items() if fnmatchcase(name, glob)), None)) is not None
    }
    before = {}
    for name in grown:
        layer = layers[name]
        old, old_values = layer.pattern, layer.values
        spread = lambda t, a=old, b=grown[name]: scatter(t, a, inside=b)  # noqa: E731
        values = nn.Parameter(spread(old_values.detach()), old_values.requires_grad)
        layer.pattern, layer.values = grown[name], values
        _carry(optimizer, old_values, values, spread, moments)
        before[name] = old
    return before


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
        If `moments` is unknown, or `model` is itself a sparse layer.
    """
    _check_moments(moments)
    if isinstance(model, SparseLinear):
        raise UserError("densify replaces layers inside a model; for a single one use its to_linear().")
    before = {}
    for name, layer in sparse_layers(model).items():
        dense = layer.to_original()
        assert isinstance(dense.weight, nn.Parameter)
        dense.weight.requires_grad_(layer.values.requires_grad)
        dense.register_parameter("bias", layer.bias)
        spread = lambda t, p=layer.pattern, c=layer.conv1d: scatter(t, p).T if c else scatter(t, p)  # noqa: E731
        _carry(optimizer, layer.values, dense.weight, spread, moments)
        _replace(model, layer, dense)
        before[name] = layer.pattern
    return before


def adopt(model: nn.Module, state_dict: Mapping[str, Tensor], *, backend: str = "auto") -> dict[str, Pattern]:
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
    modules, patterns = dict(model.named_modules()), {}
    for key, bits in state_dict.items():
        name = key.removesuffix("._extra_state")
        if name == key or f"{name}.values" not in state_dict:
            continue
        if name not in modules or not _is_linear(modules[name]):
            raise UserError(f"the state holds a sparse layer '{name}', the model has no linear layer of that name.")
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        out_features, in_features = reversed(weight.shape) if _is_conv1d(modules[name]) else weight.shape
        patterns[name] = Pattern((out_features, in_features), bits.cpu().numpy())
    return sparsify(model, patterns, backend=backend) if patterns else {}
