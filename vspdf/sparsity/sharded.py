"""Models that FSDP2 (`fully_shard`) has sharded over processes: whole for a while, so that their masks can change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.fsdp import FSDPModule, fully_shard

from vspdf.errors import UserError
from vspdf.sparsity.layer import is_sharded, sparse_layers
from vspdf.sparsity.optimizer import carry, check_optimizer, warn_of_stale


@contextmanager
def gathered(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[nn.Module]:
    """Makes a model whole that `fully_shard` has sharded over processes, and shards it anew at the end of the block.

    Inside, the model is a plain one on every process, with whole parameters and optimizer state: `densify`,
    `set_sparsity`, `evolve`, `Phases.at`, `state_dict` and `layer.weight` work as ever. Every process must enter, and
    do the same there; each needs memory for the whole model and its moments meanwhile. Gradients are dropped: to be
    called after ``optimizer.step()``. A model that is not sharded is left as it is.

    Parameters
    ----------
    model : nn.Module
        Whose modules were given to `torch.distributed.fsdp.fully_shard`, one at a time; they will be given to it again,
        with the same mesh, policies and ``reshard_after_forward``. Hooks of FSDP's own (``set_all_reduce_hook`` and the
        like) are to be set again.
    optimizer : torch.optim.Optimizer, optional
        Its parameters are exchanged both ways, with their state.

    Yields
    ------
    nn.Module
        The model itself.

    Raises
    ------
    UserError
        If the model is sharded in a way that cannot be taken back: by a `shard_placement_fn`, several modules in one
        call, or tensor parallelism. Or if processes have left it with different masks.

    Examples
    --------
    >>> if phases.due(step):
    ...     with vspdf.gathered(model, optimizer):
    ...         phases.at(step, model, optimizer)
    """
    check_optimizer(optimizer)
    ways = _ways_back(model)
    if not ways and any(is_sharded(parameter) for parameter in model.parameters()):
        raise UserError("gathered takes back what fully_shard has done, and these DTensors are of something else.")
    if not ways:
        yield model
        return
    before = list(model.parameters())
    left = {parameter for parameter in before if not is_sharded(parameter)}
    _drop_gradients(model)
    _replace(model, {p: nn.Parameter(_whole(p), p.requires_grad) for p in before if p not in left}, optimizer)
    if optimizer is None:
        warn_of_stale("gathered", [(p, p) for p in before if p not in left], None)
    try:
        yield model
        _check_agreement(model, ways[0][1]["mesh"])
    finally:
        _drop_gradients(model)
        whole = dict(model.named_parameters(remove_duplicate=False))
        for module, how in ways:
            fully_shard(module, **how, ignored_params=left)
        sharded = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in whole.items():
            if optimizer is not None and parameter is not (new := sharded[name]):
                carry(optimizer, parameter, new, shard_like(new))


def _check_agreement(model: nn.Module, mesh: Any) -> None:
    """Raises UserError unless all processes that share a model have the same masks."""
    digests = [layer.mask_digest for layer in sparse_layers(model).values()]
    for dim in range(mesh.ndim if digests else 0):
        low, high = torch.cat(digests), torch.cat(digests)
        dist.all_reduce(low, dist.ReduceOp.MIN, mesh.get_group(dim))
        dist.all_reduce(high, dist.ReduceOp.MAX, mesh.get_group(dim))
        if not torch.equal(low, high):
            raise UserError(
                "gathered: the processes have given the model different masks: draw them by the same seed, and for "
                "RigL add up the gradients of phases.dense_gradients.parameters over processes before masks move."
            )


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _whole(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


def shard_like(parameter: Any) -> Callable[[Tensor], Tensor]:
    """Shards a whole tensor, which every process has, as a parameter is sharded."""
    from torch.distributed.tensor import distribute_tensor

    return lambda t: distribute_tensor(t, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _replace(
    model: nn.Module,
    news: Mapping[Any, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Puts whole parameters in all places of those of a model, and of its optimizer."""
    for old, new in news.items():
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[key] = new
        carry(optimizer, old, new, _whole)


def _ways_back(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Takes FSDP off a model; modules that were sharded with what they were sharded by, innermost first."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    ways = [(module, _arguments(name or "model", module)) for name, module in reversed(found)]
    for module, _ in ways:
        module.reshard()
    for module in model.modules() if ways else ():
        _take_off(module)
    return ways


def _arguments(name: str, module: nn.Module) -> dict[str, Any]:
    """What a module was given to `fully_shard` with.

    Raises
    ------
    UserError
        If that cannot be given again.
    """
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.12
        groups = [group] if (group := state._fsdp_param_group) else []
    if len(groups) > 1 or len(state._modules) > 1:
        raise UserError(f"gathered: '{name}' was sharded together with others, or over several meshes: one at a time.")
    how: dict[str, Any] = {"mp_policy": state._mp_policy}
    for group in groups:
        if any(place.is_shard() and place.dim for p in group.fsdp_params for place in p.sharded_param.placements):
            raise UserError(f"gathered: '{name}' was sharded by a shard_placement_fn, which is not known here.")
        after = group.post_forward_mesh_info
        whole = after is not None and after.mesh == group.mesh_info.mesh
        how |= {
            "mesh": group.mesh_info.mesh,
            "offload_policy": group.offload_policy,
            "reshard_after_forward": None if getattr(state, "_auto_reshard_after_forward", False)
            else whole if whole or after is None else after.shard_mesh_size,
        }  # fmt: skip
    return how


_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_state_dict_hooks",
)  # fmt: skip


def _take_off(module: nn.Module) -> None:
    """Makes a module what it was before FSDP: its class, its hooks, and what torch has noted of it."""
    for table in _HOOKS:
        hooks = getattr(module, table)
        for key in [key for key, hook in hooks.items() if _of_fsdp(hook)]:
            del hooks[key]
    for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        module.__dict__.pop(name, None)
    if isinstance(module, FSDPModule):
        for key in [key for key in vars(module) if key.startswith("__composable_api_state_key")]:
            del module.__dict__[key]
        _composable_state._module_state_mapping.pop(module, None)
        module.__class__ = type(module).__mro__[2]  # FSDP's, FSDPModule, its own


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")
