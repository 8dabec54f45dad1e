"""Optimizer state carried over where parameters are exchanged."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vspdf.errors import UserError, did_you_mean
from vspdf.sparsity.attached import is_plain
from vspdf.sparsity.layer import is_sharded, sparse_layers

log = logging.getLogger("vspdf")


# State of optimizers that treat every element alike, by key; what is not here is asked for by `_kind`.
_ELEMENTWISE = {
    "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg", "acc_delta",
    "exp_inf", "ax", "eta", "mu", "mu_product", "prev", "step_size", "mu_prod",
}  # fmt: skip


def carry(
    optimizer: torch.optim.Optimizer | None,
    old: nn.Parameter,
    new: nn.Parameter,
    move: Callable[[Tensor], Tensor],
    moments: str = "keep",
) -> None:
    """Puts `new` in the place of `old`: its gradient, and place and state in an optimizer, element by element.

    State that is not shaped like the weight (Adafactor's rows and columns, blocks of a quantised optimizer) or is one
    for all weights (LBFGS) belongs to no element: the weight then starts without state, and one line says so. New
    weights have the state that the optimizer begins with.
    """
    if old.grad is not None:
        new.grad = move(old.grad).contiguous()
    if optimizer is None:
        return
    state, kept = optimizer.state.get(old), None
    if state and moments == "keep" and not isinstance(optimizer, torch.optim.LBFGS):
        if odd := _odd(optimizer, old, state):
            _say_once(optimizer, odd)
        else:
            begins = _beginning(optimizer, old)
            kept = {key: _moved(value, old.shape, move, begins.get(key, 0.0)) for key, value in state.items()}
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]  # in place: LBFGS has the list too
    forget(optimizer, old, new)
    if kept is not None:
        optimizer.state[new] = kept


def forget(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter | None = None) -> None:
    """Drops what an optimizer keeps of a parameter: `new` in its place, or it itself, is as at the beginning."""
    if isinstance(optimizer, torch.optim.LBFGS):
        if optimizer.state:
            _say_once(optimizer, ["one history of all weights"])
        optimizer.state.clear()
        optimizer._numel_cache = None
        return
    state, new = optimizer.state.pop(old, None), old if new is None else new
    if state and isinstance(optimizer, torch.optim.Adagrad):  # which makes its state once, when it is made itself
        begin = torch.full_like(new, _beginning(optimizer, new)["sum"])
        optimizer.state[new] = {"step": torch.zeros_like(state["step"]), "sum": begin.detach()}


def _odd(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Mapping[str, Any]) -> list[str]:
    """Entries of an optimizer's state of a parameter that are not element by element."""
    odd = [
        key
        for key, value in state.items()
        if any(
            (tensor.shape != parameter.shape and tensor.numel() > 1) or not (is_plain(tensor) or is_sharded(tensor))
            for tensor in _tensors(value)
        )
    ]
    if not odd and not _ELEMENTWISE.issuperset(state) and _kind(optimizer) == "by shape":
        odd = sorted(key for key in state if key not in _ELEMENTWISE)
    return odd


def _beginning(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, float]:
    """What an optimizer's state of an element begins with, where that is not zero."""
    entries = [entry for kind, entry in _BEGINNINGS.items() if isinstance(optimizer, kind)]
    groups = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    return {key: float(group[option]) for group in groups[:1] for key, option in entries}


_BEGINNINGS: dict[type, tuple[str, str]] = {
    torch.optim.Rprop: ("step_size", "lr"),
    torch.optim.Adagrad: ("sum", "initial_accumulator_value"),
}


def elements(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    """What an optimizer keeps of each element of a parameter: tensors of its shape."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return [tensor for tensor in _tensors(state) if tensor.shape == parameter.shape and is_plain(tensor)]


def _tensors(value: Any) -> list[Tensor]:
    """Tensors of an entry of an optimizer's state, also those in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inside for tensor in _tensors(item)]


def _moved(value: Any, shape: torch.Size, move: Callable[[Tensor], Tensor], begin: float = 0.0) -> Any:
    """An entry of an optimizer's state with its tensors of `shape` in the new form, `begin` for new weights."""
    if isinstance(value, Tensor):
        if value.shape != shape:
            return value
        moved = move(value).contiguous()
        return moved.masked_fill_(move(torch.ones_like(value)) == 0, begin) if begin else moved
    if type(value) is dict:
        return {key: _moved(item, shape, move, begin) for key, item in value.items()}
    return type(value)(_moved(item, shape, move, begin) for item in value) if type(value) in (list, tuple) else value


_told: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _say_once(optimizer: torch.optim.Optimizer, odd: Sequence[str]) -> None:
    if optimizer not in _told:
        _told.add(optimizer)
        log.warning(
            "%s keeps state that is not element by element (%s): it starts anew for the weights that changed form.",
            type(optimizer).__name__, ", ".join(odd),
        )  # fmt: skip


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """How an optimizer's class treats vectors and matrices, tried on two tiny ones.

    Returns
    -------
    str
        "alike", "by shape" (their state differs), "matrices" (it takes no vector), or "unknown".
    """
    known = signature(type(optimizer).__init__).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in known}

    def tried(*shape: int) -> dict[str, list[bool]]:
        tiny = nn.Parameter(torch.ones(shape))
        trial = type(optimizer)([tiny], **options)
        tiny.grad = torch.ones(shape)
        trial.step()
        return {key: [t.shape == tiny.shape for t in _tensors(value)] for key, value in trial.state[tiny].items()}

    try:
        matrix = tried(4, 3)
    except Exception:  # not to be made from its defaults alone
        return "unknown"
    try:
        return "alike" if tried(12) == matrix else "by shape"
    except Exception:
        return "matrices"


def check_optimizer(optimizer: object) -> None:
    """Refuses what is neither an optimizer (or a wrapper that looks like one) nor None.

    Raises
    ------
    UserError
        Naming its type.
    """
    if optimizer is not None and not (hasattr(optimizer, "state") and hasattr(optimizer, "param_groups")):
        raise UserError(
            f"optimizer must be one torch.optim.Optimizer or None, not of type {type(optimizer).__name__}. Of several, "
            "give one the parameters of all as groups, or make them anew afterwards."
        )


def check_follows(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Refuses an optimizer, a wrapper or layers whose parameters cannot be exchanged, before anything has changed.

    Raises
    ------
    UserError
        Naming it, or two sparse layers that share their values.
    """
    check_optimizer(optimizer)
    owners: dict[Tensor, str] = {}
    for name, layer in sparse_layers(model).items():
        if (first := owners.setdefault(layer.values, name)) != name:
            raise UserError(
                f"'{first}' and '{name}' share one parameter as `values`, and would each get another in its place: "
                "give each its own first, layer.values = torch.nn.Parameter(layer.values.detach().clone())."
            )
    flat = any(type(p).__name__ == "FlatParameter" or hasattr(p, "_fsdp_flattened") for p in model.parameters())
    if flat or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UserError(
            "FullyShardedDataParallel keeps weights in flat parameters, of which none can be exchanged: sparsify "
            "before it, and where masks are to change use torch's fully_shard and vspdf.gathered."
        )
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise UserError(
            "ZeroRedundancyOptimizer has dealt its parameters out to processes and takes no others in their place: "
            "call this with optimizer=None and make a new one, or use fully_shard and vspdf.gathered."
        )


def check_takes_vectors(optimizer: torch.optim.Optimizer | None, weights: Sequence[object]) -> None:
    """Refuses an optimizer for matrices (Muon) that holds weights about to become vectors.

    Raises
    ------
    UserError
        Naming it, before anything has changed.
    """
    if optimizer is None or isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)):
        return
    if _held(optimizer) & {id(weight) for weight in weights} and _kind(optimizer) == "matrices":
        raise UserError(
            f"{type(optimizer).__name__} takes matrices only, and sparse weights are vectors: leave them "
            "to AdamW (vspdf.parameter_groups(model, weight_decay)) and give it the matrices that stay dense."
        )


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    """Ids of the parameters that an optimizer trains."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def check_moments(moments: str) -> None:
    """Raises UserError unless `moments` is "keep" or "reset"."""
    if moments not in ("keep", "reset"):
        raise UserError(f"moments = '{moments}' is not known.{did_you_mean(moments, ('keep', 'reset'))}")


def warn_of_stale(
    verb: str,
    exchanged: Sequence[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer | None,
    *,
    often: bool = False,
) -> None:
    """Says so where an optimizer would train nothing.

    Parameters
    ----------
    verb : str
        What was called.
    exchanged : sequence of (Tensor, Tensor)
        Parameters that were replaced, and those in their place. A living optimizer that holds the former was forgotten.
    optimizer : torch.optim.Optimizer or None
        The one that was handed over; it holds the latter, or is another model's.
    often : bool
        Whether `verb` is called time and again: the interpreter takes long to say who holds what, so that it is only
        asked where `optimizer` leaves out some of the latter that learn.
    """
    if not exchanged:
        return
    replaced, new = zip(*exchanged, strict=True)
    learn, mine = {id(p) for p in new if p.requires_grad}, set() if optimizer is None else _held(optimizer)
    if often and optimizer is not None and learn <= mine:
        return
    if optimizer is not None and learn and not mine & {id(p) for p in new}:
        log.warning("%s: the optimizer holds none of the %d parameters that were replaced.", verb, len(new))
    held = set()
    for holder in gc.get_referrers(*replaced):
        if type(holder) is list:
            groups = [
                g for g in gc.get_referrers(holder) if type(g) is dict and g.get("params") is holder and len(g) > 1
            ]
            held |= {id(p) for p in holder if groups} & {id(p) for p in replaced}
    if held:
        log.warning(
            "%s: an optimizer made before still holds %d of the parameters that were replaced and trains them no more: "
            "pass it as optimizer=, or make a new one.", verb, len(held),
        )  # fmt: skip


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups for any torch optimizer: weights, which decay, and biases, norms and so on, which don't.

    The values of sparse layers are vectors, so that the common rule ``p.dim() >= 2`` takes them for biases; here they
    decay as the matrices do. Every parameter that learns is in one of the groups, once.

    Parameters
    ----------
    model : nn.Module
    weight_decay : float
        Of the first group; the second has 0.

    Returns
    -------
    list of dict
        ``[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]``.

    Examples
    --------
    >>> optimizer = torch.optim.AdamW(vspdf.parameter_groups(model, 0.1), lr=3e-3)
    """
    values = {id(layer.values) for layer in sparse_layers(model).values()}
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[not (parameter.dim() >= 2 or id(parameter) in values)].append(parameter)
    return [
        {"params": params, "weight_decay": decay} for params, decay in zip(groups, (weight_decay, 0.0), strict=True)
    ]
