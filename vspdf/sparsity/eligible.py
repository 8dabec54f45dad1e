"""Which layers of a model can be sparse, and why others stay dense."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vspdf.errors import UserError, did_you_mean
from vspdf.sparsity.amounts import matches, plain_name, shadowed
from vspdf.sparsity.kinds import is_conv1d
from vspdf.sparsity.layer import SparseLinear, require_whole, sparse_layers

log = logging.getLogger("vspdf")

# Output heads of the common architectures, unembeddings and those of classification: never sparsified, tied or not.
HEADS = ("lm_head", "embed_out", "output_projection", "unembed", "score", "classifier", "qa_outputs", "head",
         "classification_head", "seq_relationship", "vocab_projector", "output_layer")  # fmt: skip
UNEMBEDDINGS = ("output", *(glob for head in HEADS for glob in (head, f"*.{head}", f"{head}.*", f"*.{head}.*")))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else, dense: by its class, or as a renamed one by what it does."""
    if "forward" in vars(module):  # somebody's own, on this very layer: it would go on with the layer that is gone
        return False
    if type(module) is nn.Linear or is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, SparseLinear) or "weight" not in module._parameters:
        return False
    if (
        type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear
    ):  # nn.MultiheadAttention reads its weight itself
        return False
    require_whole(module.weight)
    return type(module).forward is nn.Linear.forward or _computes_linear(module)


def _computes_linear(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear with a `forward` of its own (as Falcon's) gives what nn.Linear gives.

    One with tensors or modules of its own is none: an adapter or a gate that is zero today will not be.
    """
    weight, training = module.weight, module.training
    own = {*module._parameters} - {"weight", "bias"} or module._buffers or module._modules
    if own or weight.is_meta or not weight.is_floating_point():
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
    try:
        with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            wanted = nn.functional.linear(x, weight, module.bias)
            for module.training in (False, True):  # noise comes in training only
                if not torch.allclose(type(module).forward(module, x), wanted, rtol=1e-2, atol=1e-5):
                    return False
        return True
    except Exception:  # whatever it needs, it is not x alone
        return False
    finally:
        module.training = training


def _adapters(model: nn.Module) -> tuple[set[str], bool]:
    """Names of low-rank adapters, and whether they are peft's: a model's frozen weights are then their base."""
    names, wrapped = set(), False
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners") and hasattr(module, "base_layer"):
            wrapped = True
            parts = (part for part, _ in module.named_modules() if part and part.split(".")[0] != "base_layer")
            names |= {f"{name}.{part}" if name else part for part in parts}
        elif any(part.startswith("lora_") for part in name.split(".")):
            names.add(name)
    return names, wrapped


def globs_of(globs: str | Iterable[str]) -> tuple[str, ...]:
    """Globs, given as one or as several."""
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(matches(name, glob) for glob in globs)


def sparsifiable(
    model: nn.Module, include: str | Iterable[str] = "*", exclude: str | Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The dense layers of a model that `sparsify` would replace, by name."""
    linears, wrapped = linear_layers(model)
    found, uses = selected(linears, include, exclude), places_of(model)
    return {name: module for name, module in found.items() if not why_dense(module, uses, wrapped)}


def linear_layers(model: nn.Module) -> tuple[dict[str, nn.Module], bool]:
    """Linear layers by name, heads and adapters left out; and whether peft wraps the model."""
    adapters, wrapped = _adapters(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {
        name: module
        for name, module in model.named_modules()
        if name not in adapters
        and not _matches(name, UNEMBEDDINGS)
        and (output is None or module is not output)
        and is_linear(module)
    }
    return linears, wrapped


def require_some(model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
    """Raises UserError, saying why, where a model has no layer to make sparse."""
    if is_linear(model):
        raise UserError("sparsify replaces layers inside a model; for a single one use SparseLinear.from_linear.")
    if already := 0 if linears else len(sparse_layers(model)):
        raise UserError(f"sparsify found no layer: {already} are sparse already; set_sparsity adds weights to them.")
    if not linears:
        raise UserError("sparsify found no layer: the model has no nn.Linear or Conv1D beside heads and adapters.")


def name_others(model: nn.Module) -> None:
    """Logs what holds many weights and yet stays dense."""
    adapters, _ = _adapters(model)
    for name, module in model.named_modules():
        head = name in adapters or _matches(name, UNEMBEDDINGS)
        dense = isinstance(module, nn.Linear) and not isinstance(module, SparseLinear)
        if dense and not head and not is_linear(module):
            why = f"{type(module).__name__} is a kind of its own"
            if "forward" in vars(module):
                why = "its forward was replaced on the layer itself (by a hook of accelerate's?)"
            log.warning("sparsify: '%s' stays dense: %s.", name, why)
        for key, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter) and parameter.dim() == 3:  # experts, a matrix each
                where, size = f"{name}.{key}".lstrip("."), " x ".join(map(str, parameter.shape))
                log.warning("sparsify: '%s' stays dense: a parameter of %s is no linear layer.", where, size)
    if lora := sum(isinstance(module, nn.Linear) for name, module in model.named_modules() if name in adapters):
        log.info("sparsify: %d linear layers of low-rank adapters stay dense.", lora)


def selected(
    linears: Mapping[str, nn.Module], include: str | Iterable[str], exclude: str | Iterable[str]
) -> dict[str, nn.Module]:
    """Those of the layers that globs take and do not leave out."""
    include, exclude = globs_of(include), globs_of(exclude)
    return {n: m for n, m in linears.items() if _matches(n, include) and not _matches(n, exclude)}


def places_of(model: nn.Module) -> Counter[int]:
    """In how many places each parameter is, by its id; others that share its memory are the same."""
    places = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    memory = {id(p): (type(p) is nn.Parameter and not p.is_meta and p.data_ptr()) or id(p) for p in places}
    found = Counter(memory[id(p)] for p in places)
    return Counter({own: found[place] for own, place in memory.items()})


def check_globs(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    rules: Mapping[str, object],
    include: str | Iterable[str],
    exclude: str | Iterable[str],
) -> None:
    """Raises UserError for a glob that matches nothing; names a rule that never counts, since those before it do."""
    names = [plain_name(name) for name in linears]
    for glob in (*rules, *globs_of(include)):
        if not any(matches(name, glob) for name in names):
            raise UserError(f"'{glob}' matches no linear layer.{did_you_mean(glob, names)}")
    for glob in globs_of(exclude):
        if not any(matches(name, glob) for name, _ in model.named_modules()):
            raise UserError(f"'{glob}' matches no module.{did_you_mean(glob, names)}")
    for glob, before in shadowed(rules, names).items():
        if glob != "*":  # for what is left, though it be nothing
            log.warning(
                "sparsify: '%s' never counts: '%s' before it takes all that it matches.", glob, "' and '".join(before)
            )


def why_dense(module: nn.Module, uses: Mapping[int, int], wrapped: bool) -> str:
    """Why a linear layer cannot be made sparse, or ""; of one that has no weights yet nobody can tell: UserError."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_lazy(weight):
        raise UserError(f"the weight of a {type(module).__name__} is not made yet: run one batch through the model.")
    require_whole(weight)
    if not isinstance(weight, nn.Parameter):
        return (
            "its weight is computed anew at every call (torch.nn.utils.prune or a weight norm): make that permanent "
            "first, e.g. by torch.nn.utils.prune.remove, then init_method='from_zeros' takes its mask"
        )
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype} (quantised?)"
    if module.bias is not None and not isinstance(module.bias, nn.Parameter):
        return (
            "its bias is computed anew at every call (torch.nn.utils.prune or a parametrization): make that permanent"
        )
    if uses[id(weight)] > 1:
        return "its weight is tied to another module's"
    if not weight.requires_grad and not wrapped:
        return "its weight is frozen (requires_grad is False)"
    return ""
