"""Optimizer state carried over where parameters are exchanged, and ramps for revived weights."""

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
from vspdf.pattern import Pattern
from vspdf.sparsity.layer import SparseLinear, is_conv1d, sparse_layers

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

    State that is not shaped like the weight (Adafactor's rows and columns, blocks of a quantised optimizer) belongs to
    no element: the weight then starts without state, and one line says so.
    """
    if old.grad is not None:
        new.grad = move(old.grad).contiguous()
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if not state or moments != "keep":
        return
    odd = [
        key
        for key, value in state.items()
        if any(tensor.shape != old.shape and tensor.numel() > 1 for tensor in _tensors(value))
    ]
    if not odd and not _ELEMENTWISE.issuperset(state) and _kind(optimizer) == "by shape":
        odd = sorted(key for key in state if key not in _ELEMENTWISE)
    if odd:
        _say_once(optimizer, odd)
        return
    optimizer.state[new] = {key: _moved(value, old.shape, move) for key, value in state.items()}


def elements(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    """What an optimizer keeps of each element of a parameter: tensors of its shape."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return [tensor for tensor in _tensors(state) if tensor.shape == parameter.shape]


def _tensors(value: Any) -> list[Tensor]:
    """Tensors of an entry of an optimizer's state, also those in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inside for tensor in _tensors(item)]


def _moved(value: Any, shape: torch.Size, move: Callable[[Tensor], Tensor]) -> Any:
    """An entry of an optimizer's state with its tensors of `shape` in the new form."""
    if isinstance(value, Tensor):
        return move(value).contiguous() if value.shape == shape else value
    if type(value) is dict:
        return {key: _moved(item, shape, move) for key, item in value.items()}
    return type(value)(_moved(item, shape, move) for item in value) if type(value) in (list, tuple) else value


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
        asked where `optimizer` holds none of the latter.
    """
    if not exchanged:
        return
    replaced, new = zip(*exchanged, strict=True)
    trained = optimizer is not None and bool(_held(optimizer) & {id(p) for p in new})
    if often and trained:
        return
    if optimizer is not None and any(p.requires_grad for p in new) and not trained:
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


class RevivedWarmup:
    """Ramps the updates of revived weights over the first steps after a switch.

    Adam's second moment of a weight that was masked is near zero, so with a large beta2 its first updates are too large
    (SMET, arXiv:2606.00888). Scaling the gradient would not help, Adam divides it out: this scales the update itself.

    Parameters
    ----------
    model : nn.Module
        After the switch.
    before : dict of str to Pattern
        What `densify` or `set_sparsity` returned.
    steps : int
        Length of the ramp.
    """

    def __init__(self, model: nn.Module, before: Mapping[str, Pattern], steps: int, done: int = 0) -> None:
        self.steps, self.done = steps, done
        self.before = dict(before)
        self._old: list[Tensor] = []
        self.weights: list[tuple[Tensor, Tensor]] = []
        for name, old in self.before.items():
            layer = model.get_submodule(name)
            if isinstance(layer, SparseLinear):
                weight: Tensor = layer.values
                revived = ~old.mask()[layer.pattern.mask()]
            else:
                assert isinstance(layer.weight, Tensor)
                weight, revived = layer.weight, ~(old.mask().T if is_conv1d(layer) else old.mask())
            self.weights.append((weight, revived.to(weight.device)))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer.step()`` with the updates of revived weights scaled by ``(done + 1) / (steps + 1)``."""
        self.begin()
        optimizer.step()
        self.end()

    def begin(self) -> None:
        """Before an optimizer's step that is not taken through `step`."""
        self._old = [weight.detach().clone() for weight, _ in self.weights] if self.done < self.steps else []

    def end(self) -> None:
        """After it."""
        if not self._old:
            return
        self.done += 1
        ramp = self.done / (self.steps + 1)
        with torch.no_grad():
            for (weight, revived), start in zip(self.weights, self._old, strict=True):
                weight.copy_(torch.where(revived, torch.lerp(start, weight, ramp), weight))
        self._old = []
