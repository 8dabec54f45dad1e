"""`layer.weight` of a sparse layer: a dense matrix made anew, whose edits in place reach the kept weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from vspdf.errors import UserError

log = logging.getLogger("vspdf")


class DenseView(Tensor):
    """Dense weight [out_features, in_features] of a sparse layer, for code that reads or edits `layer.weight`.

    Differentiable, with zeros at masked positions. An edit in place under `torch.no_grad` (``nn.init``, ``copy_``,
    ``weight.data += delta``, an edit of a row) is written through to the layer's `values`; what it would put at masked
    positions is dropped, and said once a layer. Its `requires_grad` is that of `values`.

    Raises
    ------
    UserError
        For an edit in place that autograd would record.
    """

    _layer: Any
    _whole: Tensor
    _direct = False  # whether it is what `layer.weight` gave, no view or copy of it
    _is_param = True  # to isinstance, so that it compares with a dense layer's weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_param":  # nn.Parameter(layer.weight): a parameter of its own from here on
            self._layer = None
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self.detach()).__reduce_ex__(protocol)  # a file, and a copy, is of the numbers alone

    def __deepcopy__(self, memo: Any) -> Tensor:
        return _plain(self.detach()).clone()

    @staticmethod
    def of(dense: Tensor, layer: Any) -> DenseView:
        """`dense`, made by `layer`, so that its edits reach the layer."""
        view = _linked(dense, layer, dense)
        view._direct = True
        return view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        link = next((t for t in _tensors((args, kwargs)) if type(t) is DenseView and t._layer is not None), None)
        with torch._C.DisableTorchFunctionSubclass():
            if link is None:
                return func(*args, **kwargs)
            base, layer = link._whole, link._layer
            if func in _FREEZE and args[0] is link and link._direct:
                layer.values.requires_grad_(*args[1:], **kwargs)
                return link
            root = base if base._base is None else base._base  # a view's own grad_fn is made anew after any edit
            before, made_by = base._version, root.grad_fn
            if func == Tensor.data.__get__:  # type: ignore[attr-defined]
                return _linked(args[0].detach(), layer, base)  # which counts edits, as `data` does not
            if func == Tensor.data.__set__:  # type: ignore[attr-defined]
                with torch.no_grad():
                    _plain(args[0]).copy_(_plain(args[1]))
                result = None
            else:
                result = func(*args, **kwargs)
                if base._version == before:
                    return _relinked(result, link)
            if root.grad_fn is not made_by:  # autograd recorded it
                raise UserError(
                    "layer.weight of a SparseLinear is made anew at every access: edit it in place under "
                    "torch.no_grad(), or change layer.values."
                )
            layer.write(base)
            return _relinked(result, link)


_FREEZE = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


def _linked(tensor: Tensor, layer: Any, base: Tensor) -> DenseView:
    view = tensor.as_subclass(DenseView)
    view._layer, view._whole = layer, base
    return view


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, DenseView) else tensor


def _tensors(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _relinked(result: Any, link: DenseView) -> Any:
    """A result that shares the dense matrix's memory is a view of it, and its edits count too."""
    if isinstance(result, Tensor) and result.layout == torch.strided and result.device == link._whole.device:
        if isinstance(result, DenseView):
            return result
        shares = result.numel() and result.untyped_storage().data_ptr() == link._whole.untyped_storage().data_ptr()
        return _linked(_plain(result), link._layer, link._whole) if shares else _plain(result)
    if type(result).__module__ == "numpy" and hasattr(result, "setflags"):
        result.setflags(write=False)  # its edits could not be seen
    if type(result) in (list, tuple):
        return type(result)(_relinked(item, link) for item in result)
    return result
