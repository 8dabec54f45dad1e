"""The trainer: takes a model through its phases and writes down what was done.

A run killed at any moment goes on from its last checkpoint with metrics equal to the last bit.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vspdf import ledger
from vspdf.config import resolve
from vspdf.config.resolved import ResolvedConfig, ResolvedPhase
from vspdf.data import pairs
from vspdf.data.text import Dataset, prepare
from vspdf.data.tokenizer import Tokenizer, check_tokenizer
from vspdf.draw import words
from vspdf.errors import Diverged, Interrupted, UserError
from vspdf.evaluate.generate import Decoding, generate
from vspdf.evaluate.loss import Evaluation, autocast, evaluate
from vspdf.interop import checkpoints
from vspdf.kernels import hardware, tuning
from vspdf.kernels.hardware import device
from vspdf.ledger import Count
from vspdf.model import GPT
from vspdf.runs import checkpoint, writer
from vspdf.runs.folder import TENSORBOARD, Run
from vspdf.runs.record import PhaseRecord, beside_dense
from vspdf.sparsity import schedule
from vspdf.sparsity.layer import build_plans, sparse_layers
from vspdf.sparsity.phases import Phases
from vspdf.sparsity.surgery import densify
from vspdf.train import schedule as train_schedule
from vspdf.train.beside import profiled
from vspdf.train.step import dense_counts

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
        return _Run(config, resume, say).go(on_evaluation or (lambda folder: None))
    finally:
        torch.set_num_threads(threads)


class _Run:
    def __init__(self, config: ResolvedConfig, resume: bool, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.folder = Path(config.run_dir)
        self.device = device(config.train.device, "train.device")
        self.config = config = writer.check(config, resume)
        self.writer = writer.Writer(self.folder)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        begun = self._begin_with(resume)
        self.data: Dataset | pairs.Pairs
        if begun and config.task:
            self.data = pairs.prepare(config.task, config.seed, begun[1])
        else:
            self.data = prepare(config.data, config.model.sequence_length, config.seed)
        vocabulary = config.model.vocab_size or self.data.vocab_size
        if vocabulary < self.data.vocab_size:
            raise UserError(f"model.vocab_size = {vocabulary} is less than the tokenizer's {self.data.vocab_size}.")
        self.config = config = config.with_data(vocabulary)
        self.shape = resolve.model_shape(config.model)
        weights = 4 * self.shape.parameters  # fp32; a model is dense before it is sparse
        if weights > hardware.memory():
            raise UserError(
                f"the weights of {self.shape.parameters:,} parameters take {words.size(weights)}, this machine has "
                f"{words.size(hardware.memory())}; vspdf plan says what a run needs."
            )
        self.total_steps = sum(phase.steps or 0 for phase in config.phases)
        self.model: GPT = (
            begun[0]
            if begun
            else GPT(self.shape, config.model.init_std, seed=config.seed, activation=config.model.activation)
        ).to(self.device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.layers = resolve.linear_layers(config.model)
        self.phases = Phases(
            config.phases, seed=config.seed, backend=config.train.backend,
            rescale=config.phases[0].s_mu_par and not config.init_from,
        )  # fmt: skip
        self.step = 0  # global steps done
        self.seconds = 0.0  # wall clock, evaluation and checkpoints included
        self.records = [PhaseRecord() for _ in config.phases]
        self.samples: list[dict[str, Any]] = []
        self.saved_step: int | None = None
        self.stop_signal: int | None = None
        self._twin: _DenseTwin | None = None
        if not Run(self.folder).checkpoints:
            if config.init_from:
                self._begin_from(config.init_from)
            self.phases.check(self.model)
        self.config = config = self.config.with_data(first_sequence=0)
        self.first = config.data.first_sequence or 0
        self.data.check(self.first + train_schedule.position(config.phases, self.total_steps).samples)
        if resume:
            self._restore()
        else:
            self.writer.begin(config, self.data.tokenizer.to_json(), self.data.manifest)
        self.writer.go_on_from(self.step)
        self.board = _tensorboard(self.folder) if config.train.tensorboard else None

    def _begin_with(self, resume: bool) -> tuple[GPT, Tokenizer] | None:
        """Fine-tuning: the model to start from, dense, and its tokenizer; of a run that goes on, only their form."""
        task, start = self.config.task, self.config.start
        if task is None or start is None:
            return None
        if resume and Run(self.folder).checkpoints:
            model = GPT(resolve.model_shape(self.config.model), activation=self.config.model.activation)
            return model, Tokenizer.load(Run(self.folder).tokenizer)
        model, tokenizer, _ = checkpoints.load(start)
        if sparse := sparse_layers(model):
            kept = sum(layer.pattern.nnz for layer in sparse.values()) / sum(
                layer.pattern.numel for layer in sparse.values()
            )
            densify(model)
            self.say(f"'{start}' keeps {kept:.1%} of {len(sparse)} layers: densified, every weight learns")
        words = pairs.tokenizer_for(task, tokenizer, start)
        if tokenizer is None:
            check_tokenizer(words, model.shape, start)
        return model, words

    # -- the run directory -------------------------------------------------------------------------------------------

    def _begin_from(self, source: str) -> None:
        """Takes over weights, masks, moments and the place in the data of another run, or the weights of a folder."""
        config = self.config
        loaded = checkpoints.load(source, config.train.backend)
        old = loaded.state
        if loaded.tokenizer is None:
            log.warning("init_from '%s' has no tokenizer: data.tokenizer is taken to be its own.", source)
        elif not loaded.tokenizer.same_vocabulary(self.data.tokenizer):
            name = (old.get("tokenizer") or {}).get("name", loaded.tokenizer.name)
            raise UserError(
                f"init_from '{source}' was trained with the tokenizer {name}, whose vocabulary is not that of "
                f"data.tokenizer = '{config.data.tokenizer}'."
            )
        for key, value in asdict(self.shape).items():
            if (theirs := old["model"][key]) != value:
                raise UserError(f"init_from '{source}': its model.{key} is {theirs}, here it is {value}.")
        if old["activation"] != config.model.activation:
            raise UserError(f"init_from '{source}' needs model.activation={old['activation']}.")
        self.model = loaded.model.to(self.device)
        if checkpoints.kind(Path(source)) == "checkpoint":
            stored = checkpoint.read(Path(source))
            if stored.moments and config.phases[0].moments == "keep":
                self.optimizer = self._new_optimizer(config.phases[0])
                stored.restore_optimizer(self.model, self.optimizer)
        ours = (self.data.manifest["corpus"], config.data.validation_fraction, config.seed)
        same_text = (old.get("corpus"), old.get("validation_fraction"), old.get("seed")) == ours
        if config.data.first_sequence is None and same_text:
            self.config = config = config.with_data(first_sequence=old["sequences"])
        elif config.data.first_sequence is None and old.get("corpus") == self.data.manifest["corpus"]:
            log.warning("init_from '%s' saw this text in another order: some of it will be seen again.", source)
        where = f", its data from sequence {config.data.first_sequence}" if config.data.first_sequence else ""
        self.say(
            f"starting from {source} (step {old['step']}), {'with' if self.optimizer else 'without'} moments{where}"
        )

    def _restore(self) -> None:
        if not Run(self.folder).checkpoints:
            self.say("no checkpoint was written yet: starting again from step 0")
            return
        stored = checkpoint.read(self.folder)
        state = stored.state
        if state["corpus"]["sha256"] != self.data.manifest["corpus"]["sha256"]:
            raise UserError(
                f"checkpoint {stored.folder} belongs to another corpus: sha256 was "
                f"{state['corpus']['sha256'][:12]}..., is {self.data.manifest['corpus']['sha256'][:12]}...."
            )
        if state["model"] != asdict(self.shape):
            wrong = next(key for key, value in asdict(self.shape).items() if state["model"].get(key) != value)
            raise UserError(
                f"the checkpoint belongs to another model: its {wrong} is {state['model'].get(wrong)}, "
                f"here it is {asdict(self.shape)[wrong]}."
            )
        stored.restore(self.model, self.config.train.backend)
        tuning.pin(state["kernel_choices"])
        build_plans(self.model)
        self.step, self.seconds = state["step"], state["seconds"]
        self.samples = state["samples"]
        self.records = [PhaseRecord.from_json(body) for body in state["records"]]
        self.optimizer = self._new_optimizer(self.config.phases[state["phase"]])
        stored.restore_optimizer(self.model, self.optimizer)
        self.phases.resume(self.model, self.step, (stored.before_switch(self.model), state["revived_done"]))
        self.saved_step = self.step
        self.say(f"resumed at step {self.step} of {self.total_steps}")

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        assert self.optimizer is not None
        state = {
            "vspdf": hardware.versions()["vspdf"],
            "model": asdict(self.shape),
            "activation": self.config.model.activation,
            "tokenizer": self.data.manifest["tokenizer"],
            "corpus": self.data.manifest["corpus"],
            "task": {"lower_relations": self.config.data.lower_relations} if self.config.start else None,
            "phase": self.phases.now.phase,
            "seed": self.config.seed,
            "validation_fraction": self.config.data.validation_fraction,
            "sequences": self.first + train_schedule.position(self.config.phases, self.step).samples,
            "seconds": self.seconds,
            "samples": self.samples,
            "records": [record.to_json() for record in self.records],
            "revived_done": self.phases.revived.done if self.phases.revived else 0,
            "kernel_choices": tuning.choices(),
        }
        checkpoint.save(self.folder, self.step, self.model, self.optimizer, state, self.phases.ramp[0])
        checkpoint.prune(self.folder, self.config.train.keep_checkpoints)
        self.saved_step = self.step

    # -- phases ------------------------------------------------------------------------------------------------------

    def _switch(self, phase: ResolvedPhase) -> None:
        """Brings the model into the form of the step at hand, where it has another."""
        engine, begun = self.phases, self.phases.started
        old = engine.now.phase
        if not begun:
            engine.start(self.model, self.optimizer)
        elif not engine.at(self.step, self.model, self.optimizer):
            return
        self._renew(phase)
        if begun and engine.now.phase == old:
            self.say(f"densified to sparsity {engine.sparsity:.4g}: {_form(self.model)}")
            return
        if sparse_layers(self.model):
            patterns = {name: layer.pattern for name, layer in sparse_layers(self.model).items()}
            self.writer.masks(engine.now.phase, patterns)
        if engine.before and not phase.revived_warmup and (phase.beta2 or 0) > 0.98:
            log.warning(
                "phase '%s' revives weights under beta2 = %s: without revived_warmup (50-100 steps) the loss may "
                "spike.",
                phase.name,
                phase.beta2,
            )
        self.say(self._describe(phase))

    def _renew(self, phase: ResolvedPhase) -> None:
        """An optimizer over the model's present parameters with the state of the old one."""
        old, self.optimizer = self.optimizer, self._new_optimizer(phase)
        if old is not None:
            self.optimizer.state.update(old.state)
        build_plans(self.model)
        self._twin = None

    def _describe(self, phase: ResolvedPhase) -> str:
        tokens = self._tokens(self.step + (phase.steps or 0)) - self._tokens(self.step)
        return f"phase '{phase.name}': {phase.steps:,} steps, {tokens:,} tokens; {_form(self.model)}"

    def _new_optimizer(self, phase: ResolvedPhase) -> torch.optim.Optimizer:
        return _adamw(self.model, self.config, phase)

    # -- steps -------------------------------------------------------------------------------------------------------

    def go(self, on_evaluation: Callable[[Path], None]) -> dict[str, Any]:
        started = time.perf_counter() - self.seconds
        with self._signals():
            while self.step < self.total_steps:
                index, phase_step, samples = train_schedule.position(self.config.phases, self.step)
                phase, record = self.config.phases[index], self.records[index]
                self._switch(phase)
                line = self._train_step(phase, record, phase_step, samples)
                self.step += 1
                self._measure_dense(phase, record, samples, line["step_seconds"])
                last = phase_step + 1 == phase.steps
                self.seconds = time.perf_counter() - started
                every = self.config.train.eval_every
                if last or (every and self.step % every == 0):
                    self._evaluate(record, line)
                if last:
                    self._sample(phase)
                if last or "val_loss" in line or self.step % self.config.train.log_every == 0 or self.step == 1:
                    self._log(phase, line)
                self.seconds = time.perf_counter() - started
                every, stop = self.config.train.checkpoint_every, self.stop_signal
                if self.step == self.total_steps or stop or (every and self.step % every == 0):
                    self._save()
                if "val_loss" in line and self.step < self.total_steps:
                    on_evaluation(self.folder)
                if stop and self.step < self.total_steps:
                    raise Interrupted(f"stopped after step {self.step}; a checkpoint was written: `resume` goes on.")
        summary = self._summarise()
        on_evaluation(self.folder)
        return summary

    def _train_step(self, phase: ResolvedPhase, record: PhaseRecord, phase_step: int, samples: int) -> dict[str, Any]:
        assert self.optimizer is not None and phase.batch_size is not None
        lr = train_schedule.learning_rate(phase, phase_step)
        start, cpu_start = time.perf_counter(), time.process_time()
        batch = self.data.batch(self.first + samples, phase.batch_size)
        take = lambda: self._optimise(self.model, self.optimizer, phase, batch, lr, self.phases.step)  # noqa: E731
        with ledger.counting() as tally:
            # The second step: plans are built, nothing else is special about it. The profiler sees the CPU alone.
            if phase_step == 1 and self.device.type == "cpu":
                (loss, norm), record.parts = profiled(take, self.shape.vocab_size)
            else:
                loss, norm = take()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        shape = dataclasses.replace(self.shape, sequence_length=batch[0].shape[1])
        for name, count in {**tally.products, **dense_counts(self.model, shape, batch[0].numel())}.items():
            record.tally.add(name, count)
        record.seconds += seconds
        record.cpu_seconds = None if record.cpu_seconds is None else record.cpu_seconds + cpu_seconds
        record.loss = loss
        if phase_step > 1 or phase.steps in (1, 2):  # the first builds plans, the second is profiled
            record.step_seconds.append(seconds)
        return {
            "step": self.step + 1,
            "phase": phase.name,
            "sparsity": self.phases.sparsity,
            "tokens": self._tokens(self.step + 1),
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "step_seconds": seconds,
            "tokens_per_second": (self.data.tokens(samples + phase.batch_size) - self.data.tokens(samples)) / seconds,
        }

    def _tokens(self, step: int) -> int:
        return self.data.tokens(train_schedule.position(self.config.phases, step).samples)

    def _optimise(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        phase: ResolvedPhase,
        batch: tuple[Tensor, Tensor],
        lr: float,
        take: Callable[[torch.optim.Optimizer], object] = lambda optimizer: optimizer.step(),
    ) -> tuple[float, float]:
        """One optimizer step; returns loss and gradient norm. Sparse runs and the dense twin share it."""
        train = self.config.train
        assert phase.batch_size is not None and train.micro_batch_size is not None
        inputs, targets = batch
        all_targets, loss = int((targets >= 0).sum()), 0.0
        for x, y in zip(inputs.split(train.micro_batch_size), targets.split(train.micro_batch_size), strict=True):
            share = int((y >= 0).sum()) / all_targets
            with autocast(train.precision, self.device):
                part = model(x.to(self.device), y.to(self.device)) * share
            part.backward()
            loss += float(part.detach())
        self._require_finite("loss", loss)
        clip = self.config.optimizer.clip
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf))
        self._require_finite("gradient norm", norm)  # before it reaches weights that a checkpoint would keep
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        take(optimizer)
        optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that a step's seconds hold all of it
        return loss, norm

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            saved = self.saved_step
            kept = f"the checkpoint of step {saved} is intact" if saved else "no checkpoint was written yet"
            raise Diverged(
                f"the {what} of step {self.step + 1} is {value}: training stopped, {kept}. Lower optimizer.lr?"
            )

    def _measure_dense(self, phase: ResolvedPhase, record: PhaseRecord, samples: int, seconds: float) -> None:
        """Times steps of a dense twin on the batches of the sparse steps beside them, a few per phase."""
        wanted = self.config.train.measure_dense if sparse_layers(self.model) else 0
        if len(record.paired_seconds) >= wanted or len(record.step_seconds) < 2:
            return
        if self._twin is None:
            self._twin = _DenseTwin(self, phase, samples)
            record.dense_threads = self._twin.threads
            return
        record.paired_seconds.append((seconds, self._twin.step(samples)))
        if len(record.paired_seconds) == wanted:
            self._twin = None
            found = beside_dense(record.paired_seconds)
            self.say(
                "measured beside each other: a step takes {paired_step_seconds_median:.3f} s, a dense step "
                "{dense_step_seconds_median:.3f} s".format(**found)
                + f" ({record.dense_threads} threads): "
                + "{median:.2f}x faster (pairs {low:.2f}-{high:.2f})".format(**found["speedup"])
            )

    def _evaluate(self, record: PhaseRecord, line: dict[str, Any]) -> Evaluation:
        train = self.config.train
        result = evaluate(self.model, self.data, train.micro_batch_size or 1, train.eval_tokens, train.precision)
        record.val_loss, record.val_bits_per_byte = result
        line["val_loss"], line["val_bits_per_byte"] = result
        return result

    def _sample(self, phase: ResolvedPhase) -> None:
        count = self.config.train.sample_tokens
        if not count:
            return
        prompt = self.data.prompt()
        answer = generate(self.model, [prompt], Decoding(max_tokens=count, temperature=0.8), self.data.end)[0]
        text = self.data.tokenizer.decode(prompt + answer)
        self.samples.append({"step": self.step, "phase": phase.name, "text": text})
        self.say(f"sample after phase '{phase.name}': {text!r}")

    def _log(self, phase: ResolvedPhase, line: dict[str, Any]) -> None:
        total = self._total()
        line["flops"] = total.flops()
        line["seconds"] = self.seconds
        line["training_seconds"] = sum(record.seconds for record in self.records)
        line["training_cpu_seconds"] = self._cpu_seconds()
        self.writer.append(line)
        if self.board:
            for key in ("loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte", "tokens_per_second"):
                if key in line:
                    self.board.add_scalar(key, line[key], self.step)
        val = f"  val {line['val_loss']:.4f} ({line['val_bits_per_byte']:.3f} bits/byte)" if "val_loss" in line else ""
        skipped = 1 - total.executed / total.dense
        self.say(
            f"step {self.step:>{len(str(self.total_steps))}}/{self.total_steps}  {phase.name}"
            f"  loss {line['loss']:.4f}{val}"
            f"  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s  {skipped:.0%} of FLOPs skipped"
            f"  {words.eta(self._eta())}"
        )

    def _eta(self) -> float | None:
        """Seconds left: steps of each phase at its own speed, or at the dense twin's where it has not begun."""
        index, done, _ = train_schedule.position(self.config.phases, self.step)
        left, fallback = 0.0, 0.0
        for i, phase in enumerate(self.config.phases):
            record = self.records[i]
            dense = [b for _, b in record.paired_seconds]
            mine = statistics.median(record.step_seconds) if record.step_seconds else fallback
            if i == index and not mine:
                return None
            left += max(0, (phase.steps or 0) - (done if i == index else 0)) * mine if i >= index else 0.0
            fallback = statistics.median(dense) if dense else mine
        return left

    def _total(self) -> Count:
        total = Count()
        for record in self.records:
            total.add(record.tally.total)
        return total

    def _cpu_seconds(self) -> float | None:
        """Of all threads, in steps; None where a part of the run did not count them."""
        counted = [record.cpu_seconds for record in self.records]
        return None if None in counted else math.fsum(counted)  # type: ignore[arg-type]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint; a second one ends it at once."""

        def note(number: int, frame: Any) -> None:
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.say("stopping after this step; once more to stop at once")

        try:
            previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # -- summary -----------------------------------------------------------------------------------------------------

    def _summarise(self) -> dict[str, Any]:
        ends = np.cumsum([phase.steps for phase in self.config.phases]).tolist()
        phases = [
            record.summary(self.layers, phase, self._tokens(end) - self._tokens(end - (phase.steps or 0)))
            for phase, record, end in zip(self.config.phases, self.records, ends, strict=True)
        ]
        last = self.records[-1]
        stages = resolve.amounts(self.config)
        tokens = sum(n for _, n in stages)
        summary = {
            "name": self.config.name,
            "model": {**asdict(self.shape), "parameters": self.shape.parameters},
            "corpus": self.data.manifest["corpus"],
            "tokenizer": self.data.manifest["tokenizer"],
            "tokens": self._tokens(self.total_steps),
            "seconds": self.seconds,
            "cpu_seconds": self._cpu_seconds(),
            "val_loss": last.val_loss,
            "val_bits_per_byte": last.val_bits_per_byte,
            "phases": phases,
            "flops": self._total().flops(),
            "flops_saved_fraction_by_convention": {
                name: 1
                - ledger.training_flops(self.shape, stages, convention=name)
                / ledger.training_flops(self.shape, tokens=tokens, convention=name)
                for name in ledger.CONVENTIONS
            },
            "effective_sparsity": schedule.effective_sparsity(tokens, stages),
            "samples": self.samples,
            "hardware": hardware.hardware(),
            "versions": hardware.versions(),
        }
        self.writer.summary(summary)
        return summary


def _form(model: nn.Module) -> str:
    """How much of a model is trained, in words."""
    layers = sparse_layers(model)
    kept = sum(layer.pattern.nnz for layer in layers.values())
    numel = sum(layer.pattern.numel for layer in layers.values())
    if not layers:
        return "every weight is trained"
    return f"{len(layers)} sparse layers keep {kept:,} of {numel:,} weights"


class _DenseTwin:
    """The plain dense model with the same weights, to be timed beside the sparse one; it never feeds back."""

    def __init__(self, run: _Run, phase: ResolvedPhase, samples: int) -> None:
        self.run, self.phase = run, phase
        self.model = copy.deepcopy(run.model)
        densify(self.model)
        self.optimizer = _adamw(self.model, run.config, phase)
        current = torch.get_num_threads()
        times: dict[int, float] = {}
        for threads in {current, os.cpu_count() or 1}:
            self.threads = threads
            self.step(samples)  # warm-up: allocates the moments
            times[threads] = self.step(samples)
        self.threads = min(times, key=lambda threads: times[threads])

    def step(self, samples: int) -> float:
        """Seconds of one dense step at its best thread count."""
        current = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            start = time.perf_counter()
            batch = self.run.data.batch(self.run.first + samples, self.phase.batch_size or 0)
            self.run._optimise(self.model, self.optimizer, self.phase, batch, lr=1e-8)
            return time.perf_counter() - start
        finally:
            torch.set_num_threads(current)


def _adamw(model: nn.Module, config: ResolvedConfig, phase: ResolvedPhase) -> torch.optim.AdamW:
    """AdamW over matrices and sparse values with weight decay, the rest without; fused where torch has it."""
    o = config.optimizer
    sparse = {layer.values: 1 / layer.pattern.density for layer in sparse_layers(model).values() if layer.pattern.nnz}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        decay = phase.weight_decay if parameter.dim() == 2 or parameter in sparse else 0.0
        scale = sparse.get(parameter, 1.0) if phase.s_mu_par else 1.0
        groups.setdefault((decay or 0.0, scale), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()],
        lr=0.0, betas=(o.beta1, phase.beta2 or 0.0), eps=o.eps, fused=True,
    )  # fmt: skip


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("train.tensorboard needs the package 'tensorboard': pip install tensorboard.") from None
    return SummaryWriter(str(folder / TENSORBOARD))
