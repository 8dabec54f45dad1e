"""All that a run tells and keeps: lines of metrics and of progress, generated text, checkpoints, and the summary.

Of several processes one holds the log; the others are silent.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import nn

from vspdf import ledger
from vspdf.config import resolve
from vspdf.config.resolved import ResolvedPhase
from vspdf.draw import words
from vspdf.evaluate.generate import Decoding, generate
from vspdf.kernels import hardware
from vspdf.runs.record import PhaseRecord
from vspdf.runs.writer import Writer
from vspdf.sparsity import schedule
from vspdf.sparsity.layer import patterns_of, sparse_layers
from vspdf.train.boards import Board
from vspdf.train.state import State

_CURVES = ("loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte", "tokens_per_second")


class Log:
    """Where a run is told of.

    Parameters
    ----------
    writer : Writer
        Of the run directory.
    say : callable
        Receives progress, a line at a time.
    on_evaluation : callable
        Called with the run directory by `refresh`.
    boards : sequence of Board
        Where curves are drawn too.
    """

    def __init__(
        self,
        writer: Writer,
        say: Callable[[str], None],
        on_evaluation: Callable[[Path], None],
        boards: Sequence[Board] = (),
    ) -> None:
        self.writer, self.say, self.on_evaluation, self.boards = writer, say, on_evaluation, boards

    def entered(self, state: State, phase: ResolvedPhase) -> None:
        """A phase begins: its masks, and what it will be."""
        if patterns := patterns_of(state.model):
            self.writer.masks(state.phases.now.phase, patterns)
        tokens = state.tokens(state.step + phase.steps) - state.tokens(state.step)
        self.say(f"phase '{phase.name}': {phase.steps:,} steps, {tokens:,} tokens; {_form(state.model)}")

    def changed(self, state: State, before: float) -> None:
        """Within a phase the model has another sparsity than `before`; masks that only move are not worth a line."""
        if (now := state.phases.sparsity) != before:
            how = "densified" if now < before else "pruned"
            self.say(f"{how} to sparsity {now:.4g}: {_form(state.model)}")

    def beside_dense(self, record: PhaseRecord, found: dict[str, Any]) -> None:
        """A dense twin was measured beside the run."""
        ratios = "{median:.2f} times as fast (all: {low:.2f} to {high:.2f})".format(**found["speedup"])
        self.say(
            f"{found['pairs']} steps measured beside dense ones, the median pair: a step takes "
            f"{found['paired_step_seconds_median']:.4g} s, a dense step {found['dense_step_seconds_median']:.4g} s "
            f"({record.dense_threads} threads): {ratios}"
        )

    def left(self, state: State, phase: ResolvedPhase, record: PhaseRecord) -> None:
        """A phase ends: masks that moved, and generated text if the configuration wants any."""
        if state.phases.turnover:
            record.masks = state.phases.turnover.figures()
            self.writer.end_masks(state.phases.now.phase, patterns_of(state.model))
        count = state.config.train.sample_tokens
        if not count:
            return
        prompt = state.data.prompt()
        answer = generate(state.model, [prompt], Decoding(max_tokens=count, temperature=0.8), state.data.ends)[0]
        text = state.data.tokenizer.decode(prompt + answer)
        state.samples.append({"step": state.step, "phase": phase.name, "text": text})
        self.say(f"sample after phase '{phase.name}': {text!r}")

    def step(self, state: State, line: dict[str, Any]) -> None:
        """A step was taken: writes its line of metrics, with what the run has cost so far, and says it."""
        total, steps = state.count, state.config.steps
        line["flops"] = total.flops()
        line["seconds"] = state.seconds
        line["training_seconds"] = sum(record.seconds for record in state.records)
        line["training_cpu_seconds"] = state.cpu_seconds
        if state.phases.turnover:
            line |= state.phases.turnover.figures()
        self.writer.append(line)
        for board in self.boards:
            board({key: line[key] for key in _CURVES if key in line}, state.step)
        val = f"  val {line['val_loss']:.4f} ({line['val_bits_per_byte']:.3f} bits/byte)" if "val_loss" in line else ""
        self.say(
            f"step {state.step:>{len(str(steps))}}/{steps}  {line['phase']}  loss {line['loss']:.4f}{val}"
            f"  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
            f"  {1 - total.executed / total.dense:.0%} of FLOPs skipped  {words.eta(_seconds_left(state))}"
        )

    def save(self, state: State) -> None:
        """Writes a checkpoint, unless there is one of this step."""
        state.save(self.writer.synced())

    def refresh(self) -> None:
        """The run was evaluated, or is at its end: those who draw it may do it anew."""
        self.on_evaluation(self.writer.folder)

    def summary(self, state: State) -> dict[str, Any]:
        """The run is at its end: writes the summary."""
        config, manifest, last = state.config, state.data.manifest, state.records[-1]
        if state.step < config.steps:
            self.say(
                f"ended after step {state.step} of {config.steps}: train.patience = {config.train.patience} "
                "evaluations in a row found no lower validation loss"
            )
            config = config.ended(state.step)
        stages = resolve.amounts(config)
        tokens = sum(n for _, n in stages)
        layers, ends = resolve.linear_layers(config.model), accumulate(phase.steps for phase in config.phases)
        body = {
            "name": config.name,
            "model": {**asdict(state.shape), "parameters": state.shape.parameters},
            "corpus": manifest["corpus"],
            "tokenizer": manifest["tokenizer"],
            "tokens": state.tokens(config.steps),
            "seconds": state.seconds,
            "cpu_seconds": state.cpu_seconds,
            "val_loss": last.val_loss,
            "val_bits_per_byte": last.val_bits_per_byte,
            "phases": [
                record.summary(layers, phase, state.tokens(end) - state.tokens(end - phase.steps))
                for phase, record, end in zip(config.phases, state.records, ends, strict=True)
            ],
            "flops": state.count.flops(),
            "flops_saved_fraction_by_convention": {
                name: 1
                - ledger.training_flops(state.shape, stages, convention=name)
                / ledger.training_flops(state.shape, tokens=tokens, convention=name)
                for name in ledger.CONVENTIONS
            },
            "best": asdict(state.best) if state.best else None,
            "effective_sparsity": schedule.effective_sparsity(tokens, stages),
            "samples": state.samples,
            "hardware": hardware.hardware(),
            "versions": hardware.versions(),
        }
        self.writer.summary(body)
        return body


class Silent:
    """The log of a rank that is not the first: it says nothing, and keeps nothing."""

    def say(self, line: str) -> None: ...

    def entered(self, state: State, phase: ResolvedPhase) -> None: ...

    def changed(self, state: State, before: float) -> None: ...

    def beside_dense(self, record: PhaseRecord, found: dict[str, Any]) -> None: ...

    def left(self, state: State, phase: ResolvedPhase, record: PhaseRecord) -> None: ...

    def step(self, state: State, line: dict[str, Any]) -> None: ...

    def refresh(self) -> None: ...

    def save(self, state: State) -> None: ...

    def summary(self, state: State) -> dict[str, Any]:
        return {}


def _seconds_left(state: State) -> float | None:
    """Steps of each phase at its own speed, or at the dense twin's where it has not begun; None: not known yet."""
    now, left, fallback = state.place, 0.0, 0.0
    for i, (phase, record) in enumerate(zip(state.config.phases, state.records, strict=True)):
        dense = [b for _, b in record.paired_seconds]
        mine = statistics.median(record.step_seconds) if record.step_seconds else fallback
        if i == now.phase and not mine:
            return None
        if i >= now.phase:
            left += (phase.steps - (now.step if i == now.phase else 0)) * mine
        fallback = statistics.median(dense) if dense else mine
    return left


def _form(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    layers = sparse_layers(model)
    if not layers:
        return "every weight is trained"
    kept, of = (sum(getattr(layer.pattern, n) for layer in layers.values()) for n in ("nnz", "numel"))
    return f"{len(layers)} sparse layers keep {kept:,} of {of:,} weights"
