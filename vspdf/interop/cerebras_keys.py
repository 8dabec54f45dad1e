"""Which keys of the Cerebras stack's configurations are read, which change nothing here, and which have to be off.

A key that is neither is named in a line. One that would change what is trained is refused: a run that differs in
silence would be worse.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from vspdf.errors import UserError

log = logging.getLogger("vspdf")
_NEAR = 0.75  # alike enough for one word to be another misspelt

_TEXT = (
    "data_processor", "data_dir", "batch_size", "micro_batch_size", "max_sequence_length", "shuffle", "shuffle_seed",
    "shuffle_buffer", "num_workers", "prefetch_factor", "persistent_workers", "drop_last", "repeat", "mixture",
    "data_subset", "num_samples", "sort_files", "use_worker_cache", "use_multiple_workers", "dataset_map_fn",
    "vocab_file", "vocab_size", "use_vsl", "grad_accum_steps",
)  # fmt: skip
_RUN = (
    "act_memory_gi", "autogen_policy", "autoload_last_checkpoint", "cbcore_image", "check_loss_values",
    "checkpoint_path", "checkpoint_steps", "chf_memory_gi", "cmd_memory_gi", "compile_crd_memory_gi", "compile_dir",
    "compile_only", "credentials_path", "debug_args", "debug_args_path", "disable_strict_checkpoint_loading",
    "disable_version_check", "dist_addr", "dist_backend", "dump_activations", "enable_act_frequency",
    "enable_distributed", "enable_summaries", "eval_frequency", "eval_steps", "execute_crd_memory_gi",
    "execution_strategy", "experimental", "experimental_api", "fabric_type_blacklist", "hf_cache_dir", "ini",
    "init_method", "is_pretrained_checkpoint", "job_labels", "job_priority", "job_time_sec", "keep_checkpoint_max",
    "lazy_initialization", "legacy_event_dirs", "log_initialization", "log_input_summaries", "log_steps", "logging",
    "main_process_id", "max_checkpoints", "max_steps", "mgmt_address", "mgmt_namespace", "mode", "model_dir",
    "mount_dirs", "multireplica", "num_act_servers", "num_csx", "num_epochs", "num_replicas", "num_steps",
    "num_wgt_servers", "num_workers_per_csx", "op_profiler_config", "precision_opt_level", "python_paths",
    "retrace_every_iteration", "seed", "service_dir", "show_debug_metrics", "skip_train_recv_activations",
    "steps_per_epoch", "summary_dir", "sync_batchnorm", "target_device", "transfer_processes", "use_appliance_data",
    "use_cs_grad_accum", "use_cstorch_optimizer_step", "validate_only", "variant", "wgt_memory_gi", "wrk_memory_gi",
    "wsc_log_level",
)  # fmt: skip
# Keys of each block that are read or change nothing; "" is the file itself.
_OLDER = {
    "": ("train_input", "eval_input", "model", "optimizer", "runconfig", "sparsity", "seed", "wandb"),
    "runconfig": _RUN,
    "train_input": _TEXT,
}
_CURRENT = {
    "": ("trainer", "seed"),
    "trainer": ("init", "fit", "validate", "validate_all"),
    "trainer.init": ("device", "backend", "model_dir", "model", "optimizer", "schedulers", "precision", "sparsity",
                     "loop", "checkpoint", "logging", "callbacks", "loggers", "seed", "autorestart"),
    "trainer.init.loop": ("num_steps", "max_steps", "num_epochs", "steps_per_epoch", "eval_frequency", "eval_steps",
                          "grad_accum_steps"),
    "trainer.init.precision": ("enabled", "fp16_type", "precision_opt_level", "loss_scaling_factor",
                               "initial_loss_scale", "steps_per_increase", "min_loss_scale", "max_loss_scale",
                               "max_gradient_norm", "max_gradient_value", "log_loss_scale", "overflow_tolerance"),
    "trainer.init.checkpoint": ("steps", "autoload_last_checkpoint", "disable_strict_checkpoint_loading",
                                "save_initial_checkpoint", "checkpoint_name"),
    "trainer.init.logging": ("log_steps", "log_level", "wsc_log_level", "enable_act_frequency"),
    "trainer.fit": ("train_dataloader", "val_dataloader", "ckpt_path"),
    "trainer.fit.train_dataloader": _TEXT,
}  # fmt: skip
# Callbacks that look on: they measure, log, keep files or speak of their machine.
_CALLBACKS = (
    "BigCodeEvalHarness", "CheckLoss", "ComputeNorm", "ComputeNormGNS", "CountParams", "DebugArgsPath",
    "DumpActivations", "DumpAvailableTensorNames", "DurationProfiler", "EleutherEvalHarness", "EmailNotification",
    "FlopUtilization", "GlobalFlags", "HFCacheDir", "KeepNCheckpoints", "LogInputSummaries", "LogOptimizerParamGroup",
    "LogSparsity", "ModelEvalMetrics", "ModelZooParamsMetadata", "NaNChecker", "NormTensorListener", "OpProfiler",
    "Profiler", "RateProfiler", "SamplesStreamedInfo", "SaveCheckpointState", "SavePerformanceData", "ScopedTrainFlags",
    "ScopedValidateFlags", "SlackNotification", "SummaryTensorListener",
)  # fmt: skip


class Off(NamedTuple):
    """What a key may be, since anything else would change what is trained, and what to do instead."""

    allowed: tuple[Any, ...]
    instead: str


_NOTHING: tuple[Any, ...] = (None, False, 0, {}, [])
_BY_NORM = Off((None,), "gradients are clipped by their norm alone: give max_gradient_norm")
_ONE_BATCH = Off((None, 1), "batch_size is all of a step: multiply it, and leave the key out")
_NO_EPOCHS = Off((None,), "the text is another one: give max_steps")
_ADAPTERS = Off(_NOTHING, "whole models are trained")
_ALL_LEARN = Off(_NOTHING, "all of a model learns")
_AS_IT_IS = Off(_NOTHING, "weights are as they are")
_OFF = {
    "": {"init_from": Off(_NOTHING, "with a file of theirs it stands on the command line: init_from=PATH")},
    "model": {"lora_params": _ADAPTERS, "selective_grad": _ALL_LEARN, "compression": _AS_IT_IS},
    "optimizer": {"max_gradient_value": _BY_NORM, "grad_accum_steps": _ONE_BATCH},
    "runconfig": {"num_epochs": _NO_EPOCHS},
    "train_input": (text := {
        "grad_accum_steps": _ONE_BATCH,
        "use_vsl": Off(_NOTHING, "texts stand in a row and see each other"),
    }),
    "trainer.init.loop": {"num_epochs": _NO_EPOCHS, "grad_accum_steps": _ONE_BATCH},
    "trainer.init.precision": {"max_gradient_value": _BY_NORM},
    "trainer.init.callbacks": {"lora": _ADAPTERS, "selectivegrad": _ALL_LEARN, "weightcompression": _AS_IT_IS},
    "trainer.fit.train_dataloader": text,
}  # fmt: skip
_START = {"trainer.fit": "ckpt_path", "runconfig": "checkpoint_path"}


def mapping(value: Any, key: str, where: str) -> Mapping[str, Any]:
    """A block that must be a mapping; none is an empty one.

    Raises
    ------
    UserError
        If it is none.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} must be a mapping, not {value!r}.")
    return value


def check_keys(body: Mapping[str, Any], where: str, started: bool = False) -> None:
    """Looks at every key of a file but those of ``model``, ``optimizer``, ``schedulers`` and ``sparsity``.

    Parameters
    ----------
    body : mapping
        What the file holds.
    where : str
        For messages.
    started : bool
        Whether it is said elsewhere what the run begins from, whatever the file says.

    Raises
    ------
    UserError
        Naming a key that asks for what is not done here, or is `sparsity` misspelt.
    """
    now = "trainer" in body
    for key in ("model", "optimizer", "sparsity", "train_input", "runconfig") if now else ():
        if body.get(key) not in _NOTHING:
            raise UserError(f"{where}: '{key}' beside 'trainer' is of the older form and not read: move it into there.")
    unread: list[str] = []
    for name, known in (_CURRENT if now else _OLDER).items():
        block: Any = body
        for part in name.split(".") if name else ():
            block = block.get(part) if isinstance(block, dict) else None
        block = mapping(block, name, where)
        check_off(name, block, where)
        _check_start(name, block, where, started)
        unread += unknown(name, block, known, where)
    init = mapping(mapping(body.get("trainer"), "trainer", where).get("init"), "trainer.init", where)
    _tell([*unread, *_callbacks(init.get("callbacks"), where)], where)


def name_unknown(what: str, block: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Names the keys of a block that are not known in a line; refuses as `unknown`."""
    _tell(unknown(what, block, known, where), where)


def unknown(what: str, block: Mapping[str, Any], known: Iterable[str], where: str) -> list[str]:
    """Keys of a block that are neither read nor known to change nothing, each with what may have been meant.

    Raises
    ------
    UserError
        Naming a key that is `sparsity` misspelt or misplaced: without it a run would be dense.
    """
    known, found, at, off = list(known), [], f"{what}." if what else "", _OFF.get(what, {})
    for key, value in block.items():
        key = str(key)
        if key in known or (what == "runconfig" and key.startswith("save_")):
            continue
        if key in off and value in off[key].allowed:
            continue
        if value not in _NOTHING and ("spars" in key.lower() or get_close_matches(key, ["sparsity"], cutoff=_NEAR)):
            meant = "trainer.init.sparsity" if what.startswith("trainer") else "sparsity"
            raise UserError(f"{where}: unknown setting '{at}{key}'. Did you mean '{meant}'?")
        near = get_close_matches(key, known, n=1, cutoff=_NEAR)
        found.append(f"{at}{key}" + (f" (did you mean '{near[0]}'?)" if near else ""))
    return found


def check_off(what: str, block: Mapping[str, Any], where: str) -> None:
    """Refuses keys of a block that are not off, as they have to be.

    Raises
    ------
    UserError
        Naming the key.
    """
    for key, off in _OFF.get(what, {}).items():
        if (value := block.get(key)) not in off.allowed:
            raise UserError(f"{where}: {f'{what}.' * bool(what)}{key} = {value!r} is not offered; {off.instead}.")


def _check_start(what: str, block: Mapping[str, Any], where: str, started: bool) -> None:
    """Refuses a checkpoint to begin from, which is found here by `init_from` alone."""
    key = _START.get(what, "")
    if not block.get(key):
        return
    if not started:
        raise UserError(
            f"{where}: {what}.{key} = {block[key]!r} is not read: give what the run is to begin from as "
            "init_from=PATH, or leave the key out to begin anew."
        )
    log.warning("%s: %s.%s is not read: the run begins from what was given, and has all its steps.", where, what, key)


def _callbacks(listed: Any, where: str) -> Iterator[str]:
    """Names of callbacks that are not known; refuses those that would change what is trained."""
    known = {name.lower() for name in _CALLBACKS}
    for entry in listed if isinstance(listed, list) else [] if listed is None else [listed]:
        for name, settings in entry.items() if isinstance(entry, dict) else [(entry, {})]:
            off = _OFF["trainer.init.callbacks"].get(str(name).lower())
            if settings is None:  # which turns one off
                continue
            if off is not None:
                raise UserError(f"{where}: trainer.init.callbacks: {name} is not offered; {off.instead}.")
            if str(name).lower() not in known:
                yield f"trainer.init.callbacks.{name}"


def _tell(unread: list[str], where: str) -> None:
    if unread:
        log.warning("%s: settings that are not read here: %s.", where, ", ".join(unread))
