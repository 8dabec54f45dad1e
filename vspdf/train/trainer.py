"""The trainer: takes a model through its phases and writes down what was done.

A run killed at any moment goes on from its last checkpoint with metrics equal to the last bit.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vspdf import ledger
from vspdf.config import essentials, loading
from vspdf.config.resolved import ResolvedConfig, ResolvedPhase
from vspdf.errors import Diverged, Interrupted, RankLost
from vspdf.evaluate.loss import evaluate
from vspdf.kernels.hardware import check_threads, crowded, device, slow_bf16, slow_bf16_measured
from vspdf.parallel.environment import by_torchrun, from_environment, restarted
from vspdf.parallel.world import World
from vspdf.runs import writer
from vspdf.runs.folder import CONFIG, Run
from vspdf.runs.record import PhaseRecord
from vspdf.sparsity.layer import build_plans
from vspdf.train import common
from vspdf.train.beside import TICK, Beside, profiled
from vspdf.train.boards import boards
from vspdf.train.log import Log, Silent
from vspdf.train.start import begin
from vspdf.train.state import State
from vspdf.train.step import dense_counts, optimise

log = logging.getLogger("vspdf")


def train(
    config: ResolvedConfig,
    *,
    resume: bool = False,
    say: Callable[[str], None] = log.info,
    on_evaluation: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Runs all phases of a configuration.

    Parameters
    ----------
    config : ResolvedConfig
        As `vspdf.config.load` returns it.
    resume : bool
        Go on from the last checkpoint of the run directory.
    say : callable
        Receives progress, a line at a time.
    on_evaluation : callable, optional
        Called with the run directory after each evaluation and at the end, e.g. `vspdf.report.refresh`.

    Returns
    -------
    dict
        What `summary.json` holds.

    Raises
    ------
    UserError
        For anything the user can mend: a directory that holds a run, too little data, a damaged checkpoint, a loss that
        is not finite, a full disk.
    Interrupted
        After Ctrl-C or SIGTERM, with a checkpoint of the last whole step.
    """
    threads = torch.get_num_threads()
    try:
        with from_environment() as world:
            return _train(config, resume, say, on_evaluation or (lambda folder: None), world)
    finally:
        torch.set_num_threads(threads)


def _train(
    config: ResolvedConfig,
    resume: bool,
    say: Callable[[str], None],
    on_evaluation: Callable[[Path], None],
    world: World,
) -> dict[str, Any]:
    if not world.first:
        say, on_evaluation = lambda line: None, lambda folder: None
    resume = resume or (restarted() and Run(Path(config.run_dir)).begun)
    threads = config.train.threads or world.threads
    if threads:
        check_threads("train.threads", threads)
        torch.set_num_threads(threads)
    with writer.Writer(Path(config.run_dir)) as files:

        def prepared() -> tuple[torch.device, State]:
            where = device(config.train.device, "train.device", world.local_rank)
            if where.type == "cuda" and world.size > 1:
                torch.cuda.set_device(where)
            checked = writer.check(config, resume)
            if resume and world.first:
                files.hold()
            return where, begin(checked, where, say, world)

        def opened() -> Log | Silent:
            if not world.first:
                return Silent()
            curves = boards(state.config)
            if resume and state.step:
                files.go_on_from(state.step)
                state.prune()  # it may have been killed while it did
            else:
                if resume:
                    say("no checkpoint was written yet: starting again from step 0")
                files.begin(state.config, state.data.tokenizer.to_json(), state.data.manifest, again=resume)
            return Log(files, say, on_evaluation, curves)

        where, state = world.together(prepared)
        world.same(partial(common.beginning, state))
        log = world.together(opened)
        world.within(config.train.timeout)
        for line in _said(config, state, where, files.folder):
            say(line)
        return world.from_first(_loop(state, log))


def _said(config: ResolvedConfig, state: State, where: torch.device, folder: Path) -> Iterator[str]:
    """Once nothing stands in a run's way: the settings that are not defaults, and what of them is not meant so."""
    changed = loading.differences(loading.to_dict(Run(folder).config), loading.to_dict(state.config))
    still = ", ".join(f"{key} = {old}" for key, (old, _) in changed.items())  # checkpoints hold the file as it was
    yield (
        f"{config.name}: settings that are not defaults; all are in {folder / CONFIG}"
        f"{f', as the run began: there still {still}' if still else ''}"
    )
    yield from essentials.lines(config)
    if state.world.size > 1:
        yield from common.said(config, state.world)
    if config.train.threads and (crowd := crowded(config.train.threads)):
        yield f"train.threads: {crowd}"
    if config.train.precision == "bf16" and slow_bf16(where):
        yield f"train.precision = bf16 runs in fp32: {slow_bf16_measured()}."


def _loop(state: State, log: Log | Silent) -> dict[str, Any]:
    train, world, beside = state.config.train, state.world, Beside()
    started, settled, form = time.perf_counter() - state.seconds, False, None
    with _signals() as stopped, _lost(state):
        while not state.finished:
            place = state.place
            phase, record = state.config.phases[place.phase], state.records[place.phase]
            if _enter(state, phase, record, log) or not settled:
                if form != (form := state.phases.sparsity):  # masks that only moved leave a step as long as it was
                    beside.forget()
                common.settle(state)
                settled = True
            line = _step(state, phase, record)
            if found := beside.measure(state, phase, record, partial(state.batch, place), line["step_seconds"]):
                log.beside_dense(record, found)
            state.seconds = time.perf_counter() - started
            last = place.step + 1 == phase.steps
            evaluated = last or _due(train.eval_every, state.step)
            better = evaluated and state.judge(place.phase, _evaluate(state, record, line))
            if last or state.finished:
                log.left(state, phase, record)
            if evaluated or state.step == 1 or _due(train.log_every, state.step):
                log.step(state, line)
            state.seconds = time.perf_counter() - started
            stop = world.agree(bool(stopped))
            if stop and not state.finished:
                log.say("stopping: a checkpoint is written; once more to stop at once")
            if state.finished or stop or (better and train.keep_best) or _due(train.checkpoint_every, state.step):
                _save(state, log)
            if evaluated and not state.finished:
                log.refresh()
                world.wait()
            if stop and not state.finished:
                raise Interrupted(f"stopped after step {state.step}; a checkpoint was written: `resume` goes on.")
    summary = log.summary(state)
    log.refresh()
    return summary


def _save(state: State, log: Log | Silent) -> None:
    """A checkpoint of what all ranks have alike."""
    _require_finite_weights(state)
    common.require_alike(state)
    log.save(state)
    state.world.wait()
    state.saved_step = state.step


@contextmanager
def _lost(state: State) -> Iterator[None]:
    """Where a rank is gone, the others say what is left."""
    try:
        yield
    except RankLost as error:
        raise RankLost(
            f"{error}; {_kept(state)}. `torchrun --max-restarts` goes on by itself, or the same command with `resume`."
        ) from None


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _enter(state: State, phase: ResolvedPhase, record: PhaseRecord, tell: Log | Silent) -> bool:
    """Brings the model into the form of the step at hand, and says whether it had another."""
    engine = state.phases
    begun, old, sparsity = engine.started, engine.now.phase, engine.sparsity if engine.started else None
    start, cpu_start = time.perf_counter(), time.process_time()
    if not begun:
        engine.start(state.model, state.optimizer)
    elif not engine.at(state.step, state.model, state.optimizer):
        return False
    state.renew_optimizer(phase)
    build_plans(state.model, state.config.train.memory)
    if begun and engine.now.phase == old:
        assert sparsity is not None
        if engine.turnover:  # masks that move time and again are a part of what training costs
            record.spend(time.perf_counter() - start, time.process_time() - cpu_start)
        tell.changed(state, sparsity)
        return True
    if engine.before and not phase.revived_warmup and phase.beta2 > 0.98:
        log.warning(
            "phase '%s' revives weights under beta2 = %s: without revived_warmup (50-100 steps) the loss may spike.",
            phase.name,
            phase.beta2,
        )
    tell.entered(state, phase)
    return True


def _step(state: State, phase: ResolvedPhase, record: PhaseRecord) -> dict[str, Any]:
    """Takes the next step and notes what it did; returns its line of metrics."""
    place, optimizer, config = state.place, state.optimizer, state.config
    assert optimizer is not None
    lr, sparsity = phase.learning_rate(place.step, config.optimizer.lr), state.phases.sparsity
    start, cpu_start = time.perf_counter(), time.process_time()
    batch = state.batch(place)
    state.world.spent()  # what was exchanged beside a step is none of its
    take = lambda: optimise(  # noqa: E731
        state.net or state.model, optimizer, batch, lr, config.train, config.optimizer.clip, state.phases.step,
        state.world, gradients.parameters if (gradients := state.phases.dense_gradients) else (),
    )  # fmt: skip
    with ledger.counting() as tally:
        # The second step: plans are built, nothing else is special about it. The profiler sees the CPU alone.
        if place.step == 1 and state.device.type == "cpu":
            (loss, norm), record.parts = profiled(take, state.shape.vocab_size, state.world.size)
        else:
            loss, norm = take()
    seconds, cpu_seconds = max(time.perf_counter() - start, TICK), time.process_time() - cpu_start
    _require_finite(state, loss, norm)
    cpu_seconds = common.add_up(state.world, tally, cpu_seconds)
    exchanged, sent = state.world.spent()
    shape = replace(state.shape, sequence_length=batch[0].shape[1])
    for name, count in {**tally.products, **dense_counts(state.model, shape, batch[0].numel())}.items():
        record.tally.add(name, count)
    record.spend(seconds, cpu_seconds)
    record.loss = loss
    if place.step > 1 or phase.steps in (1, 2):  # the first builds plans, the second is profiled
        record.step_seconds.append(seconds)
    tokens = state.tokens(state.step)
    state.step += 1
    return {
        "step": state.step,
        "phase": phase.name,
        "sparsity": sparsity,
        "tokens": state.tokens(state.step),
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "step_seconds": seconds,
        "tokens_per_second": (state.tokens(state.step) - tokens) / seconds,
        "communication_seconds": exchanged,
        "communication_bytes": sent,
    }


def _require_finite(state: State, loss: float, norm: float) -> None:
    what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
    if not math.isfinite(value):
        raise _diverged(state, f"the {what} of step {state.step + 1} is {value}")


def _require_finite_weights(state: State) -> None:
    """Before they are kept: what a step has done to weights and moments shows only in the next one's loss."""
    optimizer = state.optimizer
    for name, parameter in state.model.named_parameters():
        moments = optimizer.state.get(parameter, {}).values() if optimizer else ()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (parameter.detach(), *moments)):
            raise _diverged(state, f"after step {state.step}, '{name}' or its moments are not finite")


def _diverged(state: State, what: str) -> Diverged:
    return Diverged(f"{what}: training stopped, {_kept(state)}. Lower optimizer.lr?")


def _kept(state: State) -> str:
    saved = state.saved_step
    return f"the checkpoint of step {saved} is intact" if saved else "no checkpoint was written yet"


def _evaluate(state: State, record: PhaseRecord, line: dict[str, Any]) -> float:
    train = state.config.train
    result = evaluate(state.model, state.data, train.micro_batch_size, train.eval_tokens, train.precision, state.world)
    if not math.isfinite(result[0]):
        raise _diverged(state, f"the validation loss after step {state.step} is {result[0]}")
    record.val_loss, record.val_bits_per_byte = line["val_loss"], line["val_bits_per_byte"] = result
    return result.loss


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint; a second one ends it at once.

    Gives the signals that came. Where a rank is gone, torchrun ends the others at once and would kill them later: its
    SIGTERM waits until they have said what is left.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)  # nothing more: what was interrupted may be a line that is being printed

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        previous = {}
    try:
        yield came
    except RankLost:
        if by_torchrun() and previous:
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
