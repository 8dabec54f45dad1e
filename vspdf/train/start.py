"""How a run begins: fresh, with the weights of another, with a model to fine-tune, or where it was killed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vspdf.config import resolve
from vspdf.config.resolved import ResolvedConfig, ResolvedTask
from vspdf.data import pairs, text
from vspdf.data.tokenizer import Tokenizer, check_tokenizer
from vspdf.draw import words
from vspdf.errors import UserError
from vspdf.interop import checkpoints
from vspdf.kernels import hardware
from vspdf.model import GPT
from vspdf.parallel.world import ALONE, World
from vspdf.runs import checkpoint
from vspdf.runs.folder import Run, of_checkpoint
from vspdf.runs.record import PhaseRecord
from vspdf.shapes import Shape
from vspdf.sparsity.layer import sparse_layers
from vspdf.sparsity.phases import Phases
from vspdf.sparsity.surgery import densify
from vspdf.train.common import check_shares
from vspdf.train.schedule import position
from vspdf.train.state import State

log = logging.getLogger("vspdf")


def begin(config: ResolvedConfig, device: torch.device, say: Callable[[str], None], world: World = ALONE) -> State:
    """A run at its beginning, or at its last checkpoint if its directory has one. Nothing is written.

    Raises
    ------
    UserError
        For anything that a run cannot be started with: too little data, a checkpoint that does not fit, too large a
        model.
    """
    check_shares(config, world.size)
    run = Run(Path(config.run_dir))
    goes_on = bool(run.checkpoints)
    model: GPT | None = None
    data: text.Dataset | pairs.Pairs
    wanted = position(config.phases, config.steps).samples
    source = None if goes_on else config.init_from
    told = source and checkpoints.kind(Path(source)) != "sharded"  # which does not say what model it is of
    older = checkpoints.load(source, config.train.backend) if source and told else None
    if config.task and config.start:
        model, tokenizer = _form_of(run) if goes_on else _to_tune(config.task, config.start, say)
        data = pairs.prepare(config.task, config.seed, tokenizer)
    else:
        data = text.prepare(config.data, config.model.sequence_length, config.seed, wanted)
    config = config.with_data(data.vocab_size)
    shape = resolve.model_shape(config.model)
    if shape.vocab_size < data.vocab_size:
        raise UserError(f"model.vocab_size = {shape.vocab_size} is less than the tokenizer's {data.vocab_size}.")
    _check_memory(shape)
    drawn = config.model
    model = model or GPT(shape, drawn.init_std, config.seed, drawn.output_init_std)
    first = config.phases[0]
    engine = Phases(
        config.phases, seed=config.seed, backend=config.train.backend,
        rescale=first.s_mu_par and not config.init_from and not first.begins_dense,
    )  # fmt: skip
    records = [PhaseRecord() for _ in config.phases]
    state = State(config, device, data, shape, model.to(device), engine, records=records, world=world)
    if not goes_on:
        if source:
            _take_over(state, source, older or checkpoints.load(source, config.train.backend, shape=shape), say)
        engine.check(state.model)
    state.config = state.config.with_data(first_sequence=0)
    data.check(state.first_sample + wanted)
    if goes_on:
        state.restore()
        say(f"resumed at step {state.step} of {config.steps}")
    return state


def _check_memory(shape: Shape) -> None:
    weights = 4 * shape.parameters  # fp32; a model is dense before it is sparse
    if weights > hardware.memory():
        raise UserError(
            f"the weights of {shape.parameters:,} parameters take {words.size(weights)}, this machine has "
            f"{words.size(hardware.memory())}; vspdf plan says what a run needs."
        )


def _form_of(run: Run) -> tuple[GPT, Tokenizer]:
    """Of a fine-tuning that goes on: a model of its form, whose weights a checkpoint holds, and its tokenizer."""
    return GPT(run.shape), Tokenizer.load(run.tokenizer, run.manifest["tokenizer"])


def _to_tune(task: ResolvedTask, source: str, say: Callable[[str], None]) -> tuple[GPT, Tokenizer]:
    """The model that fine-tuning begins with, dense, and its tokenizer."""
    model, found, _ = checkpoints.load(source)
    if sparse := sparse_layers(model):
        kept, of = (sum(getattr(layer.pattern, n) for layer in sparse.values()) for n in ("nnz", "numel"))
        densify(model)
        say(f"'{source}' keeps {kept / of:.1%} of {len(sparse)} layers: densified, every weight learns")
    tokenizer = pairs.tokenizer_for(task, found, source)
    if found is None:
        check_tokenizer(tokenizer, model.shape, source)
    return model, tokenizer


def _take_over(state: State, source: str, loaded: checkpoints.Loaded, say: Callable[[str], None]) -> None:
    """Takes weights, masks, moments and the place in the data from another run, or the weights of a folder."""
    config, old = state.config, loaded.state
    if loaded.tokenizer is None:
        log.warning("init_from '%s' has no tokenizer: data.tokenizer is taken to be its own.", source)
    elif not loaded.tokenizer.same_vocabulary(state.data.tokenizer):
        name = (old.get("tokenizer") or {}).get("name", loaded.tokenizer.name)
        raise UserError(
            f"init_from '{source}' was trained with the tokenizer {name}, whose vocabulary is not that of "
            f"data.tokenizer = '{config.data.tokenizer}'."
        )
    theirs = asdict(loaded.model.shape)
    for key, value in asdict(state.shape).items():
        if theirs[key] != value:
            raise UserError(f"init_from '{source}': its model.{key} is {theirs[key]}, here it is {value}.")
    state.model = loaded.model.to(state.device)
    if checkpoints.kind(Path(source)) == "checkpoint":
        stored = checkpoint.read(Path(source))
        if stored.moments and config.phases[0].moments == "keep":
            stored.restore_optimizer(state.model, state.renew_optimizer(config.phases[0]))
    theirs, ours = old.get("corpus") or {}, state.data.manifest["corpus"]
    if theirs.get("sha256") == ours["sha256"]:  # whatever its file is called
        _go_on_in(state, source, old)
    where = f", its data from sequence {state.first_sample}" if state.first_sample else ""
    say(f"starting from {source} (step {old['step']}), {'with' if state.optimizer else 'without'} moments{where}")


def _go_on_in(state: State, source: str, old: dict[str, Any]) -> None:
    """Takes the place in the text where another run on it stopped; what it has seen of it otherwise is a warning."""
    config, data = state.config, state.config.data
    theirs = {key: old.get(key) for key in ("validation_fraction", "test_fraction")}
    if theirs["test_fraction"] is None:  # an older one does not tell, its run's configuration does
        run = of_checkpoint(checkpoint.resolve(Path(source)))
        theirs["test_fraction"] = run.config.data.test_fraction if run.configured else data.test_fraction
    others = [f"data.{key} = {was}" for key, was in theirs.items() if was != getattr(data, key)]
    seen = ["validation"] if theirs["validation_fraction"] != data.validation_fraction else []
    seen += ["test"] if others and data.test_fraction else []
    if seen:
        log.warning(
            "init_from '%s' was trained on this text with %s: it may have seen what is %s text here, whose loss would "
            "be too low.", source, " and ".join(others), " or ".join(seen),
        )  # fmt: skip
    if data.first_sequence is not None:
        return
    if others or old.get("seed") != config.seed:
        log.warning("init_from '%s' saw this text in another order: some of it will be seen again.", source)
    else:
        state.config = config.with_data(first_sequence=old["sequences"])
