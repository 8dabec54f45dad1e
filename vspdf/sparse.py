"""Sparse layers in any model: `SparseLinear`, and the ways between dense and sparse.

Both ways keep weights and optimizer state.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from vspdf.config import INIT_METHODS
from vspdf.errors import UserError, did_you_mean
from vspdf.kernels import cpu, ops, reference
from vspdf.kernels.ops import sparse_linear
from vspdf.pattern import Pattern

log = logging.getLogger("vspdf")

# Output heads of the common architectures: an unembedding is never sparsified, tied or not.
UNEMBEDDINGS = ("lm_head", "*.lm_head", "embed_out", "*.embed_out", "output_projection", "*.unembed", "unembed")


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer whose weight is [in, out]; known without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _is_conv1d(module)


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
    if init_method not in INIT_METHODS:
        raise UserError(f"init_method '{init_method}' is not known.{did_you_mean(init_method, INIT_METHODS)}")
    rules = dict(sparsity) if isinstance(sparsity, Mapping) else {"*": sparsity}
    for glob, amount in rules.items():
        if not isinstance(amount, Pattern) and not 0 <= amount < 1:
            raise UserError(f"sparsity must lie in [0, 1), not {amount}{'' if glob == '*' else f' (for {glob!r})'}.")
    if _is_linear(model):
        raise UserError("sparsify replaces layers inside a model; for a single one use SparseLinear.from_linear.")
    linears = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and not _matches(name, UNEMBEDDINGS)
    }
    if not linears:
        if already := len(sparse_layers(model)):
            raise UserError(
                f"sparsify found no layer: {already} are sparse already; set_sparsity adds weights to them."
            )
        raise UserError("sparsify found no layer: the model has no nn.Linear or Conv1D beside unembeddings.")
    include, exclude = _globs(include), _globs(exclude)
    for glob in (*rules, *include):
        if not any(fnmatchcase(name, glob) for name in linears):
            raise UserError(f"'{glob}' matches no linear layer.{did_you_mean(glob, linears)}")
    for glob in exclude:
        if not any(fnmatchcase(name, glob) for name, _ in model.named_modules()):
            raise UserError(f"'{glob}' matches no module.{did_you_mean(glob, linears)}")
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not _is_linear(module) and not _matches(name, UNEMBEDDINGS):
            log.warning("sparsify: '%s' stays dense: %s is a kind of its own.", name, type(module).__name__)
    layers: dict[str, SparseLinear] = {}
    for name, module in linears.items():
        amount = next((rule for glob, rule in rules.items() if fnmatchcase(name, glob)), 0.0)
        if not _matches(name, include) or _matches(name, exclude) or (not isinstance(amount, Pattern) and amount == 0):
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            what = f"{type(weight).__name__} of {weight.dtype}"
            log.warning("sparsify: '%s' stays dense: its weight is a %s (quantised?).", name, what)
        elif uses[id(weight)] > 1:
            log.warning("sparsify: '%s' stays dense: its weight is tied to another module's.", name)
        elif not weight.requires_grad:
            log.warning("sparsify: '%s' stays dense: its weight is frozen (requires_grad is False).", name)
        else:
            if not isinstance(amount, Pattern):
                dense = weight.detach().T if _is_conv1d(module) else weight.detach()
                amount = _draw(dense, amount, init_method, _layer_seed(seed, name), truncate)
                if init_method == "from_zeros" and amount.nnz == amount.numel:
                    log.warning("sparsify: '%s' stays dense: none of its weights is zero.", name)
                    continue
            layers[name] = SparseLinear.from_linear(module, amount, backend=backend)
    for name, layer in layers.items():
        module, pattern = linears[name], layer.pattern
        layer.bias = module.bias
        if rescale and pattern.nnz:
            with torch.no_grad():
                layer.values.mul_(1 / math.sqrt(pattern.density))
        mask, conv1d = pattern.mask().to(layer.values.device), _is_conv1d(module)
        gather = lambda t, mask=mask, conv1d=conv1d: (t.T if conv1d else t)[mask]  # noqa: E731
        _carry(optimizer, module.weight, layer.values, gather)
        _replace(model, module, layer)
    return {name: layer.pattern for name, layer in layers.items()}


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


def _carry(
    optimizer: torch.optim.Optimizer | None,
    old: object,
    new: object,
    move: Callable[[Tensor], Tensor],
    moments: str = "keep",
) -> None:
    """Puts `new` in the place of `old` in an optimizer; state tensors shaped like `old` go through `move`."""
    assert isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if state and moments == "keep":
        optimizer.state[new] = {
            key: move(value).contiguous() if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }


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


def _check_moments(moments: str) -> None:
    if moments not in ("keep", "reset"):
        raise UserError(f"moments = '{moments}' is not known.{did_you_mean(moments, ('keep', 'reset'))}")


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
                self.weights.append((layer.values, ~old.mask()[layer.pattern.mask()]))
            else:
                assert isinstance(layer.weight, Tensor)
                self.weights.append((layer.weight, ~(old.mask().T if _is_conv1d(layer) else old.mask())))

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
                revived = revived.to(weight.device)
                weight[revived] = torch.lerp(start[revived], weight[revived], ramp)
        self._old = []
