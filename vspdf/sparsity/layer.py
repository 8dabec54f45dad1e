"""`SparseLinear`: a linear layer whose parameters are the weights that its pattern keeps."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from vspdf.errors import UserError, one_of
from vspdf.kernels import cpu, dispatch, ops, reference
from vspdf.kernels.gpu import bitmap, gather, launch
from vspdf.kernels.ops import require_pattern, sparse_linear
from vspdf.onlookers import compiling, transformed
from vspdf.pattern import Pattern
from vspdf.shapes import PATH_BYTES
from vspdf.sparsity.attached import shell
from vspdf.sparsity.dense_view import DenseView
from vspdf.sparsity.kinds import is_conv1d
from vspdf.sparsity.pretrained import teach_save_pretrained
from vspdf.sparsity.stored import from_state, to_state

log = logging.getLogger("vspdf")
_ROUNDED = 1e-3  # what averaging equal bytes in float32 may come to; that of different ones is more


def _check_vector(name: str, given: object, size: int, pattern: Pattern) -> None:
    if not isinstance(given, Tensor) or given.shape != (size,):
        of = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"type {type(given).__name__}"
        raise UserError(f"{name} of {of} for a {pattern}: expected a tensor of shape ({size},).")


class SparseLinear(nn.Linear):
    """Linear layer in which only the kept weights exist.

    Parameters: ``values``, shape (nnz,), row-major over the pattern, and ``bias``, shape (out_features,) or None.
    A state_dict holds both and the packed pattern with its shape; loading one adopts its pattern, which must be of that
    shape and have as many weights, and refuses values that come without one. It is an `nn.Linear` to code that asks
    (peft's LoRA, for one): its `weight` is made anew at every access. Optimizers that tell matrices from the rest by
    ``dim()`` take `values`, a vector, for the rest: `vspdf.parameter_groups` does not.

    Attributes
    ----------
    pattern : Pattern, shape (out_features, in_features)
    backend : {"auto", "cpu", "reference", "triton"}
    memory : {"normal", "low"}
        Whether the CPU kernels may generate code for the pattern ("normal", where that is faster), or loop over it with
        about a quarter of the bytes beside the weights. Layers of one pattern share its last choice.
    origin : nn.Module or None
        The layer it was made from, without tensors: what `densify` goes back to.
    """

    mask_digest: Tensor
    origin: nn.Module | None

    def __init__(
        self,
        pattern: Pattern,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        backend: str = "auto",
        memory: str = "normal",
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw a dense weight
        require_pattern(pattern)
        one_of("backend", backend, dispatch.BACKENDS)
        _check_vector("values", values, pattern.nnz, pattern)
        if bias is not None:
            _check_vector("bias", bias, pattern.out_features, pattern)
        self.backend, self._memory = backend, memory
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
        self.__dict__["origin"] = None  # past nn.Module, which would make it a part
        self._told = False
        # DistributedDataParallel sends rank 0's buffers to all: so ranks with other masks are found at the first step.
        self._agreed: tuple[Tensor, int]  # the digest that was compared last, and its version then
        self._compared: bool  # whether any was with this pattern
        self.register_buffer("mask_digest", torch.zeros(16, device=values.device), persistent=False)
        self.pattern = pattern
        teach_save_pretrained()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.mask_digest.dtype != torch.float32:  # pickled when it was two integers
            self.mask_digest = self._digest(self.mask_digest.device)
        teach_save_pretrained()

    @classmethod
    def from_linear(
        cls, linear: nn.Module, pattern: Pattern, *, backend: str = "auto", memory: str = "normal"
    ) -> SparseLinear:
        """Sparse layer with the kept weights of an `nn.Linear` or transformers' Conv1D.

        Raises
        ------
        UserError
            If `pattern` is no Pattern, or its shape not (out_features, in_features) of the layer.
        """
        require_pattern(pattern)
        weight = linear.weight.T if is_conv1d(linear) else linear.weight
        assert isinstance(weight, Tensor)
        if tuple(weight.shape) != pattern.shape:
            raise UserError(f"a {pattern} does not fit a layer of shape {tuple(weight.shape)} (out, in).")
        bias = linear.bias
        with torch.no_grad():
            values = reference.sample(weight.detach(), pattern)
            shift = None if bias is None else bias.detach().clone()  # type: ignore[operator]
            layer = cls(pattern, values, shift, backend=backend, memory=memory)
        layer.__dict__["origin"] = shell(linear)
        layer.values.requires_grad_(weight.requires_grad)
        if bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)  # type: ignore[arg-type]
        return layer.train(linear.training)

    @property
    def pattern(self) -> Pattern:
        """Which weights exist; setting it is for those who also set `values`."""
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: Pattern) -> None:
        self._pattern = pattern
        dispatch.set_memory(pattern, self._memory)
        home = self.values.device if self.mask_digest.is_meta else self.mask_digest.device
        if home.type != "meta":
            self.mask_digest = self._digest(home)
        self._agreed, self._compared = (self.mask_digest, 0), False

    def _digest(self, device: torch.device) -> Tensor:
        """Bytes as float32, whose average over equal ones is the same again (AveragedModel's, with buffers)."""
        return torch.tensor([*bytes.fromhex(self.pattern.digest)], dtype=torch.float32, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        meta = self.mask_digest.is_meta
        super()._apply(fn, recurse)
        if meta and not self.mask_digest.is_meta:  # to_empty, which leaves numbers of no meaning
            self.mask_digest = self._digest(self.mask_digest.device)
        elif self.mask_digest.dtype != torch.float32:  # half(): averages would be rounded to what was there before
            self.mask_digest = self.mask_digest.float()
        return self

    def _agree(self) -> None:
        """Where a digest was written here or put in the place of ours, the mask must be that one: values came with it.

        Asked after each time on CPUs; on a device, which would have to be waited for, once a pattern.
        """
        digest, (known, version) = self.mask_digest, self._agreed
        if digest is known and (digest.is_inference() or digest._version == version):
            return
        self._agreed = (digest, 0 if digest.is_inference() else digest._version)
        while torch._C._functorch.is_functorch_wrapped_tensor(digest):
            digest = torch._C._functorch.get_unwrapped(digest)
        if digest.is_meta or (digest.device.type != "cpu" and self._compared):
            return
        self._compared = True
        if not bool(((digest - self._digest(digest.device)).abs() < _ROUNDED).all()):
            raise UserError(
                f"the values of a {self.out_features} x {self.in_features} sparse layer came from one with another "
                "mask. From rank 0, by DistributedDataParallel: sparsify with the same seed on every rank, and for "
                "topk or from_zeros only after all have the same weights. From a model that is averaged "
                "(AveragedModel), stacked or called with another's parameters: give all the same masks, and average "
                "once they rest."
            )

    @property
    def memory(self) -> str:
        """What the CPU kernels may keep beside the weights."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        dispatch.set_memory(self.pattern, memory)
        self._memory = memory

    @property
    def conv1d(self) -> bool:
        """Whether it was made from transformers' Conv1D."""
        return is_conv1d(self.origin)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Width of the input."""
        return self.pattern.in_features

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Width of the output."""
        return self.pattern.out_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Dense weight [out_features, in_features], zeros at masked positions, for code that reads a layer's weight.

        Made anew at every access and differentiable. Edits in place under ``torch.no_grad()`` and assignments reach
        `values`; what they would put at masked positions is dropped. While a compiler or a transform of ``torch.func``
        looks on, whose tensors have no memory to tell edits by, it is a plain matrix, of which edits reach nothing.
        """
        require_whole(self.values)
        if compiling():  # which can follow the product as it stands, and not how a mask is unpacked
            unit = torch.eye(self.in_features, dtype=self.values.dtype, device=self.values.device)
            return sparse_linear(unit, self.values, self.pattern, backend=self.backend).T
        if transformed():
            return reference.materialise(self.values, self.pattern)
        if torch.is_inference_mode_enabled():  # whose own tensors do not count edits
            with torch.inference_mode(False), torch.no_grad():
                return DenseView.of(reference.materialise(self.values, self.pattern), self)
        return DenseView.of(reference.materialise(self.values, self.pattern), self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or not isinstance(value, Tensor):
            return super().__setattr__(name, value)
        self.write(value)
        if isinstance(value, nn.Parameter) and type(value) is not DenseView:
            log.warning(
                "a parameter was assigned as the weight of a sparse %d x %d layer: its values at kept positions were "
                "taken, and learn as layer.values; the parameter itself is no part of the layer.",
                self.out_features, self.in_features,
            )  # fmt: skip

    def write(self, dense: Tensor) -> None:
        """Takes the kept weights of a dense matrix [out_features, in_features]; drops the others, and says so once."""
        if dense.shape != self.pattern.shape:
            raise UserError(f"a weight of shape {tuple(dense.shape)} does not fit a sparse layer of {self.pattern}.")
        with torch.no_grad():
            dense = dense.detach()
            self.values.copy_(reference.sample(dense, self.pattern))
            if not self._told and bool((reference.materialise(self.values, self.pattern) != dense).any()):
                self._told = True
                log.warning(
                    "what was written to the weight of a sparse %d x %d layer had non-zeros at masked positions: "
                    "dropped, the mask stays.", self.out_features, self.in_features,
                )  # fmt: skip

    def spread(self, vector: Tensor) -> Tensor:
        """A vector over the kept weights, shape (nnz,), as the layer this one was made from has its weight.

        Zeros at masked positions; shape (out_features, in_features), of transformers' Conv1D the other way round.
        """
        dense = reference.materialise(vector, self.pattern)
        return dense.T.contiguous() if self.conv1d else dense

    def to_linear(self) -> nn.Linear:
        """Dense `nn.Linear` with zeros at masked positions."""
        like = {"device": self.values.device, "dtype": self.values.dtype}
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **like)
        with torch.no_grad():
            linear.weight.copy_(reference.materialise(self.values, self.pattern))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        linear.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    def to_original(self) -> nn.Module:
        """Dense layer of the class this one was made from, with zeros at masked positions and this layer's own bias."""
        if self.origin is None:
            return self.to_linear()
        layer = shell(self.origin)
        layer.weight = nn.Parameter(self.spread(self.values.detach()), self.values.requires_grad)
        layer.bias = self.bias
        return layer.train(self.training)

    def reset_parameters(self) -> None:
        """Draws the kept weights and the bias as a dense layer of this shape would."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        with torch.no_grad():
            self.values.copy_(reference.sample(dense.weight, self.pattern))
            if self.bias is not None:
                self.bias.copy_(dense.bias)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._agree()
        return sparse_linear(input, self.values, self.pattern, self.bias, backend=self.backend)

    def get_extra_state(self) -> Tensor:
        return to_state(self.pattern)

    def set_extra_state(self, state: Tensor) -> None:
        pattern = from_state(state, self.pattern.shape)
        if pattern.nnz != self.pattern.nnz:
            raise UserError(
                f"the stored pattern has {pattern.nnz} weights, this layer {self.pattern.nnz}. To go on from a state "
                "of another sparsity bring a fresh dense model into its form first: by Phases.restore, or a callback's "
                "prepare(model, CHECKPOINT)."
            )
        self.pattern = pattern

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        if f"{prefix}values" in state_dict and f"{prefix}_extra_state" not in state_dict:
            errors.append(
                f"'{prefix}values' comes without its pattern ('{prefix}_extra_state', which some tools strip): whether "
                "it belongs to this layer's mask cannot be checked. Where it is known to, add layer.get_extra_state() "
                "under that name."
            )
            return
        own = f"{prefix}values", f"{prefix}values_orig"  # the latter where torch prunes them
        if f"{prefix}_extra_state" in state_dict and not any(name in state_dict for name in own):
            errors.append(f"'{prefix}_extra_state' is a pattern that comes without its '{prefix}values'.")
            return
        if f"{prefix}values" not in state_dict and f"{prefix}weight" in state_dict:
            errors.append(f"'{prefix}weight' is dense, the layer sparse: load it before sparsify, or after densify.")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        bias, sparsity = self.bias is not None, self.pattern.sparsity
        return f"{self.in_features}, {self.out_features}, {bias=}, {sparsity=:.4g}"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has but a shard of a tensor (DTensor); asks without importing what is not needed."""
    return type(tensor).__name__ == "DTensor"


def require_whole(tensor: Tensor) -> None:
    """Raises UserError for a tensor of which this process has a shard only."""
    if is_sharded(tensor):
        raise UserError(
            "the weights are sharded over processes (DTensor, by fully_shard or tensor parallelism), this needs whole "
            "ones: sparsify before fully_shard; change, read and save inside `with vspdf.gathered(model, optimizer):`."
        )


def explain(
    target: nn.Module | Pattern,
    tokens: int,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> str:
    """Which path each product takes here, and why.

    Parameters
    ----------
    target : Pattern, SparseLinear, or any module with sparse layers inside
    tokens : int
        Rows of the input, batch times sequence.
    dtype : torch.dtype, optional
        What is multiplied. Default: as it would be here and now, autocast's within ``torch.autocast``, else that of a
        layer's values (of a pattern float32).
    backend, device
        Of a pattern; layers have their own.

    Returns
    -------
    str
        A line per product, under a line per layer where there are several.
    """
    if isinstance(target, Pattern):
        device = torch.device(device)
        return ops.explain(target, tokens, dtype or _multiplied(torch.float32, device), backend, device)
    layers = sparse_layers(target)
    if not layers:
        return "no sparse layer: every product is torch's own."
    parts = []
    for name, layer in layers.items():
        here = layer.values.device
        lines = ops.explain(layer.pattern, tokens, dtype or _multiplied(layer.values.dtype, here), layer.backend, here)
        parts.append(f"{name}\n  " + lines.replace("\n", "\n  ") if name else lines)
    return "\n".join(parts)


def _multiplied(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What `sparse_linear` would multiply tensors of this dtype in, here and now."""
    cast = device.type != "meta" and torch.is_autocast_enabled(device.type) and dtype != torch.float64
    return torch.get_autocast_dtype(device.type) if cast else dtype


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """All sparse layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def whole_layers(model: nn.Module, *parts: str) -> dict[str, SparseLinear]:
    """All sparse layers by name, for those who exchange `parts` of them: "values", "bias".

    Raises
    ------
    UserError
        If one is sharded, or such a part is no parameter of the layer's own.
    """
    layers = sparse_layers(model)
    for name, layer in layers.items():
        for part in parts:
            if (tensor := getattr(layer, part)) is None:
                continue
            require_whole(tensor)
            if part not in layer._parameters:
                raise UserError(
                    f"`{part}` of the sparse layer '{name}' is computed anew at every call (torch.nn.utils.prune or a "
                    "parametrization), this needs a parameter: make that permanent first, e.g. by "
                    f"torch.nn.utils.prune.remove(layer, '{part}')."
                )
    return layers


def patterns_of(model: nn.Module) -> dict[str, Pattern]:
    """The patterns of all sparse layers of a model by name."""
    return {name: layer.pattern for name, layer in sparse_layers(model).items()}


def build_plans(model: nn.Module, memory: str | None = None) -> None:
    """Builds what kernels keep of all sparse layers now, in parallel, instead of one by one at their first use.

    With `memory`, all layers for the CPU take that choice first.
    """
    layers = sparse_layers(model).values()
    for layer in layers:
        if memory is not None and layer.backend in ("auto", "cpu"):
            layer.memory = memory
    cpu.prepare({layer.pattern for layer in layers if layer.backend in ("auto", "cpu") and cpu.takes(layer.values)})
    for layer in layers:
        if layer.values.device.type == "cuda" and launch.takes(layer.values):  # a device has parallelism of its own
            if layer.backend == "triton":
                gather.tables(layer.pattern, layer.values.device).prepare()
            elif layer.backend == "auto":
                bitmap.bitmap(layer.pattern, layer.values.device)


def training_state_bytes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Training-state bytes: weight, gradient and two AdamW moments each, and what kernels keep of sparse layers.

    Returns
    -------
    dict
        ``{"sparsified": {"dense", "sparse"}, "model": {"dense", "sparse"}, "paths": {...}}``, in bytes. What is not
        built yet counts nothing in the first two; "paths" has the whole model's by the path that all its layers would
        take, once built: "cpu", and on GPUs "dense", "2:4" and "triton" (`vspdf.explain` tells which path runs).
    """
    layers = sparse_layers(model).values()
    values = [layer.values for layer in layers]
    plans = {id(p): p for layer in layers for p in layer.pattern.packed.values() if hasattr(p, "nbytes")}
    packed = sum(layer.pattern.bits.nbytes for layer in layers) + sum(p.nbytes for p in plans.values())
    bare = sum(4 * p.numel() * p.element_size() for p in model.parameters())
    sparse = sum(4 * v.numel() * v.element_size() for v in values) + packed
    dense = sum(4 * layer.pattern.numel * layer.values.element_size() for layer in layers)
    beside = {
        path: sum(round(position * layer.pattern.numel + weight * layer.pattern.nnz) for layer in layers)
        for path, (position, weight) in PATH_BYTES.items()
    }
    return {
        "sparsified": {"dense": dense, "sparse": sparse},
        "model": {"dense": bare + packed - sparse + dense, "sparse": bare + packed},
        "paths": {path: bare + more for path, more in beside.items()},
    }
