"""What hangs on a layer beside its weight (hooks, attributes, buffers) follows it into the one that takes its place."""

from __future__ import annotations

import copy
import logging
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

log = logging.getLogger("vspdf")

# What every module has of itself; the rest of a module's __dict__ was put there by somebody.
_OWN = {*vars(nn.Linear(1, 1, device="meta")), "nf", "nx", "backend", "origin", "_pattern", "_agreed", "_compared",
        "_told", "_memory"}  # fmt: skip
_COMPILED = "_compiled_call_impl"  # what module.compile() makes of one layer
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name]


def shell(module: nn.Module) -> nn.Module:
    """A copy of a linear layer without its tensors: what it takes to make a layer of that very class again."""
    empty = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules", *_HOOKS):
        empty.__dict__[table] = type(vars(module)[table])()
    for name in [name for name in vars(empty) if name not in _OWN]:
        del empty.__dict__[name]
    empty.__dict__["_parameters"] |= {"weight": None, "bias": None}
    return empty


def hand_over(old: nn.Module, new: nn.Module, name: str) -> None:
    """Gives `new` all that hangs on `old`: hooks (handles still remove them), attributes, buffers, further modules."""
    if _COMPILED in vars(old):
        log.warning("'%s' was compiled by its own compile(): call that again on the layer in its place.", name)
    for table in _HOOKS:
        if vars(old)[table]:
            vars(new)[table] = vars(old)[table]  # the very table, which handles refer to
    hook: Any
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "module", None) is not None:  # torch's wrapper, which hands the hook its module
            hook.module = weakref.ref(new)
    new._is_full_backward_hook = old._is_full_backward_hook
    for key, value in vars(old).items():
        if key not in _OWN and key != _COMPILED and key not in vars(new):
            mine = type(value) is MethodType and value.__self__ is old
            new.__dict__[key] = MethodType(value.__func__, new) if mine else value
    for table in ("_parameters", "_buffers", "_modules"):
        for key, value in vars(old)[table].items():
            if key not in ("weight", "values", "bias", "mask_digest"):
                vars(new)[table].setdefault(key, value)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set
    new.train(old.training)


def is_plain(value: object) -> bool:
    """Whether something is a tensor of numbers in memory, and not of a class of its own (quantised blocks, shards)."""
    return type(value) in (Tensor, nn.Parameter)


def mark(old: Tensor, new: Tensor, name: str, move: Callable[[Tensor], Tensor]) -> None:
    """Copies attributes of a parameter (``weight.no_decay``) to the one in its place, those of its shape (an anchor to
    which it is drawn, say) by `move`; names hooks that stay behind."""
    for key, value in vars(old).items():
        moves = is_plain(value) and value.shape == old.shape
        vars(new)[key] = move(value.detach()).contiguous() if moves else value
    if old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None):
        log.warning(
            "'%s': hooks on the weight itself are gone, since its gradient has another shape now: register them on the "
            "new parameter.", name,
        )  # fmt: skip


def place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in every place of `old`: a shared module stays shared, also where a list or dict refers to it."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)
        for key, value in vars(parent).items():
            if key not in ("_modules", "_parameters", "_buffers", *_HOOKS):
                found = _swapped(value, old, new)
                if found is not value:
                    parent.__dict__[key] = found


def _swapped(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """`value` with `new` for `old`: lists, dicts and sets in place; tuples, partials and bound methods made anew."""
    if value is old:
        return new
    if type(value) is MethodType and value.__self__ is old:
        return getattr(new, value.__name__, value)
    if type(value) is partial:
        inside = (value.func, value.args, value.keywords)
        func, args, keywords = (_swapped(item, old, new) for item in inside)
        same = func is value.func and all(a is b for a, b in zip(args, value.args, strict=True))
        return value if same else partial(func, *args, **keywords)
    if isinstance(value, list | deque | dict):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if (other := _swapped(item, old, new)) is not item:
                value[key] = other
    elif isinstance(value, set) and old in value:
        value.remove(old)
        value.add(new)
    elif isinstance(value, tuple):
        items = [_swapped(item, old, new) for item in value]
        if any(a is not b for a, b in zip(items, value, strict=True)):
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
