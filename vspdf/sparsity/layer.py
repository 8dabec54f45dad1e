"""`SparseLinear`: a linear layer whose parameters are the weights that its pattern keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vspdf.errors import UserError
from vspdf.kernels import cpu, ops, reference
from vspdf.kernels.ops import sparse_linear
from vspdf.pattern import Pattern


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer whose weight is [in, out]; known without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


class SparseLinear(nn.Module):
    """Linear layer in which only the kept weights exist.

    Parameters: ``values``, shape (nnz,), row-major over the pattern, and ``bias``, shape (out_features,) or None.
    A state_dict holds both and the packed pattern; loading one adopts its pattern, which must have as many weights.
    Optimizers that tell matrices from the rest by ``dim()`` take `values`, a vector, for the rest: name it to decay it.

    Attributes
    ----------
    pattern : Pattern, shape (out_features, in_features)
    backend : {"auto", "cpu", "reference", "triton"}
    """

    def __init__(self, pattern: Pattern, values: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> None:
        super().__init__()
        if values.shape != (pattern.nnz,):
            raise UserError(f"values of shape {tuple(values.shape)} do not fit a {pattern}: expected ({pattern.nnz},).")
        self.pattern = pattern
        self.backend = backend
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.conv1d: type[nn.Module] | None = None  # the class to go back to, where it is not nn.Linear

    @classmethod
    def from_linear(cls, linear: nn.Module, pattern: Pattern, *, backend: str = "auto") -> SparseLinear:
        """Sparse layer with the kept weights of an `nn.Linear` or transformers' Conv1D.

        Raises
        ------
        UserError
            If the pattern's shape is not (out_features, in_features) of the layer.
        """
        weight = linear.weight.T if _is_conv1d(linear) else linear.weight
        assert isinstance(weight, Tensor)
        if tuple(weight.shape) != pattern.shape:
            raise UserError(f"a {pattern} does not fit a layer of shape {tuple(weight.shape)} (out, in).")
        bias = linear.bias
        with torch.no_grad():
            values = weight.detach()[pattern.mask().to(weight.device)]
            layer = cls(pattern, values, None if bias is None else bias.detach().clone(), backend=backend)  # type: ignore[operator]
        layer.conv1d = type(linear) if _is_conv1d(linear) else None
        return layer.train(linear.training)

    @property
    def in_features(self) -> int:
        return self.pattern.in_features

    @property
    def out_features(self) -> int:
        return self.pattern.out_features

    @property
    def weight(self) -> Tensor:
        """Dense weight [out_features, in_features], zeros at masked positions, for code that reads a layer's weight.

        Made anew at every access and differentiable; to change weights, change `values`.
        """
        return scatter(self.values, self.pattern)

    def to_linear(self) -> nn.Linear:
        """Dense `nn.Linear` with zeros at masked positions."""
        like = {"device": self.values.device, "dtype": self.values.dtype}
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None, **like)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def to_original(self) -> nn.Module:
        """Dense layer of the class this one was made from."""
        if self.conv1d is None:
            return self.to_linear()
        with torch.device("meta"):  # its constructor would draw random numbers
            layer = self.conv1d(self.out_features, self.in_features)
        layer = layer.to_empty(device=self.values.device).to(self.values.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.weight.T)  # type: ignore[operator]
            if self.bias is not None:
                layer.bias.copy_(self.bias)  # type: ignore[operator]
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.values, self.pattern, self.bias, backend=self.backend)

    def get_extra_state(self) -> Tensor:
        return torch.from_numpy(self.pattern.bits.copy())

    def set_extra_state(self, state: Tensor) -> None:
        pattern = Pattern(self.pattern.shape, state.cpu().numpy())
        if pattern.nnz != self.pattern.nnz:
            raise UserError(f"the stored pattern has {pattern.nnz} weights, this layer {self.pattern.nnz}.")
        self.pattern = pattern

    def extra_repr(self) -> str:
        bias, sparsity = self.bias is not None, self.pattern.sparsity
        return f"{self.in_features}, {self.out_features}, {bias=}, {sparsity=:.4g}"


def explain(
    target: nn.Module | Pattern,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> str:
    """Which path each product takes here, and why.

    Parameters
    ----------
    target : Pattern, SparseLinear, or any module with sparse layers inside
    tokens : int
        Rows of the input, batch times sequence.
    backend, device
        Of a pattern; layers have their own.

    Returns
    -------
    str
        A line per product, under a line per layer where there are several.
    """
    if isinstance(target, Pattern):
        return ops.explain(target, tokens, dtype, backend, device)
    layers = sparse_layers(target)
    if not layers:
        return "no sparse layer: every product is torch's own."
    parts = []
    for name, layer in layers.items():
        lines = ops.explain(layer.pattern, tokens, dtype, layer.backend, layer.values.device)
        parts.append(f"{name}\n  " + lines.replace("\n", "\n  ") if name else lines)
    return "\n".join(parts)


def scatter(values: Tensor, pattern: Pattern, inside: Pattern | None = None) -> Tensor:
    """`values` of `pattern` spread over the dense matrix, or over the positions of `inside`, with zeros between.

    Returns a tensor of shape `pattern.shape`, or (inside.nnz,).
    """
    dense = reference.materialise(values, pattern)
    return dense if inside is None else reference.sample(dense, inside)


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """All sparse layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def build_plans(model: nn.Module) -> None:
    """Builds the CPU kernels' plans of all sparse layers now, in parallel, instead of one by one at their first use."""
    layers = [layer for layer in sparse_layers(model).values() if layer.backend in ("auto", "cpu")]
    cpu.prepare({layer.pattern for layer in layers if cpu.takes(layer.values)})


def training_state_bytes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Training-state bytes: weight, gradient and two AdamW moments each, and the plans of sparse layers.

    Returns
    -------
    dict
        ``{"sparsified": {"dense", "sparse"}, "model": {"dense", "sparse"}}``, in bytes; plans that are not built yet
        count nothing.
    """
    layers = sparse_layers(model).values()
    values = [layer.values for layer in layers]
    plans = {id(p): p for layer in layers for p in layer.pattern.plans.values() if hasattr(p, "nbytes")}
    packed = sum(layer.pattern.bits.nbytes for layer in layers) + sum(p.nbytes for p in plans.values())
    sparse = sum(4 * v.numel() * v.element_size() for v in values) + packed
    dense = sum(4 * layer.pattern.numel * layer.values.element_size() for layer in layers)
    everything = sum(4 * p.numel() * p.element_size() for p in model.parameters()) + packed
    return {
        "sparsified": {"dense": dense, "sparse": sparse},
        "model": {"dense": everything - sparse + dense, "sparse": everything},
    }
