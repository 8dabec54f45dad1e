"""Runs a study: tunes each arm, trains every seed, several runs at a time, and puts together what they show.

Each run is an ordinary run directory, trained by a process of its own. What is finished is kept, what was cut off goes
on from its checkpoint, so a study may be stopped and started at will. A worker stops, with a checkpoint, when its input
ends: at the end of this process, however it ended.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from vspdf.compare import budget, definition, earlier, tuning, worker
from vspdf.compare.definition import Arm, Study, Values
from vspdf.compare.results import TOLERANCE, collect
from vspdf.compare.tuning import tuned
from vspdf.config import loading
from vspdf.config.loading import differences, free_to_change
from vspdf.config.resolved import ResolvedConfig
from vspdf.data.text import prepare
from vspdf.draw import words
from vspdf.errors import Interrupted, UserError, did_you_mean
from vspdf.files import lock
from vspdf.kernels.hardware import device
from vspdf.report import study_page
from vspdf.runs.folder import LOCK, LOG, Run

log = logging.getLogger("vspdf")

Say = Callable[[str], None]
_FILLED_IN = {"model.vocab_size", "data.first_sequence"}  # by the trainer, where the configuration leaves them open
_PATIENCE = 20.0  # seconds to wait for workers of a process that was killed: they finish their step and save


def run(
    source: str | Path,
    root: Path | None = None,
    jobs: int | None = None,
    *,
    changes: Sequence[str] = (),
    arms: Sequence[str] = (),
    add_to: Path | None = None,
    minutes: float | None = None,
    say: Say = log.info,
) -> dict[str, Any]:
    """Runs what is missing of a study, and writes `results.json`, `results.csv` and `comparison.html`.

    Parameters
    ----------
    source : path of a study, or the name of one that ships
    root : Path, optional
        Folder of its runs; default `runs/NAME`.
    jobs : int, optional
        Runs at a time; default: as many as the cores allow, with `train.threads` each.
    changes : sequence of "key=value"
        Settings of the study to change, by dotted keys.
    arms : sequence of str
        Arms to run now; default all. The others are left for later, so results may say that they are not complete.
    add_to : Path, optional
        A `results.json` of this study whose runs are gone: its values and steps are taken, and what seeds it lacks are
        run. `root` remembers it.
    minutes : float, optional
        Stop after so long, as after Ctrl-C but without its error: the results say that they are not complete.
    say : callable
        Receives progress, a line at a time.

    Returns
    -------
    dict
        What `results.json` holds.

    Raises
    ------
    UserError
        For a study that cannot be run as written, or runs in `root` that belong to another version of it.
    Interrupted
        After Ctrl-C or SIGTERM: running trainings wrote a checkpoint, results so far were written.
    """
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    wanted = definition.load(source, changes)
    for name in arms:
        if name not in wanted.arms:
            raise UserError(f"{wanted.path}: there is no arm '{name}'.{did_you_mean(name, wanted.arms)}")
    root = root or wanted.root
    threads = next(iter(wanted.arms.values())).configure({}, 0).train.threads or os.cpu_count() or 1
    jobs = jobs or max(1, (os.cpu_count() or 1) // threads)
    wanted = earlier.take(wanted, root, add_to, say)
    wanted = budget.settle(wanted, root, jobs, say)
    _check_data(wanted)
    with _alone(root) as held, _signals() as stopped:
        runner = _Runner(wanted, arms or list(wanted.arms), root, jobs, held, say, stopped, until)
        runner.check()
        earlier.keep(root, add_to)
        try:
            runner.go()
        finally:
            results = collect(runner.study, root, jobs)
            study_page.write(results, root)
    off = results["apart"]
    if results["complete"] and off and off["share"] > TOLERANCE:
        raise UserError(
            f"'{off['arms'][0]}' took {off['share']:.1%} more CPU time than '{off['arms'][1]}', more than the "
            f"{TOLERANCE:.0%} up to which times are called equal: run it again on a quiet machine, in another folder. "
            f"What was found is in {root}."
        )
    return results


def _check_data(wanted: Study) -> None:
    """Task files, enough text for every arm, and tokens in the cache before several processes look for them."""
    for task in wanted.tasks.values():
        _ = task.parts
    for arm in wanted.arms.values():
        config = arm.configure({}, wanted.seeds[0])
        device(config.train.device, "common.train.device")
        data = prepare(config.data, config.model.sequence_length, config.seed)
        try:
            data.check(sum(phase.steps * phase.batch_size for phase in config.phases))
        except UserError as error:
            raise UserError(f"{arm.where}: {error}") from None
        earlier.check_text(arm, data)


@contextmanager
def _alone(root: Path) -> Iterator[int | None]:
    """Makes the study's folder and holds a lock on it that workers inherit: when another process gets it, none is left.

    Those of a process that was killed are waited for.
    """
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(lock(root / LOCK, f"the study in '{root}'", _PATIENCE))
        except OSError as error:
            raise UserError(f"'{root}' cannot be made or written to: {error.strerror}.") from None
        yield held


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came."""
    came: list[int] = []
    try:
        previous = {n: signal.signal(n, lambda n, _: came.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        previous = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# -- one run ----------------------------------------------------------------------------------------------------------


@dataclass
class _StudyRun:
    """One run of an arm, and the process that is at work on it."""

    arm: Arm
    values: Values
    seed: int
    test: bool  # whether its test part is wanted, loss or answers: tuning never asks for it
    folder: Path
    process: subprocess.Popen[str] | None = None
    started: float = 0.0
    from_tuning: bool = False  # it was trained before its test loss was asked for

    @cached_property
    def config(self) -> ResolvedConfig:
        return self.arm.configure(self.values, self.seed, self.folder)

    @property
    def log(self) -> Path:
        """Where its process says what goes wrong."""
        return self.folder / LOG

    @property
    def name(self) -> str:
        return ", ".join([self.arm.title, *(f"{key} = {v}" for key, v in self.values.items()), f"seed {self.seed}"])

    @property
    def steps(self) -> int:
        return 0 if self.arm.untrained else self.config.steps

    @property
    def files(self) -> Run:
        """Its directory as it is now."""
        return Run(self.folder)

    @property
    def trained(self) -> bool:
        return bool({"diverged", "val_loss"} & self.files.evaluation.keys())

    @property
    def done(self) -> bool:
        known = self.files.evaluation
        return self.trained and (not self.test or bool({"diverged", "test_loss"} & known.keys()))

    def check(self) -> None:
        """A run of an older version of the study must not pass for one of this."""
        if not self.files.configured:
            return
        changed = differences(loading.to_dict(self.files.config), loading.to_dict(self.config))
        for key, (old, new) in changed.items():
            left_open = new is None and key in _FILLED_IN
            # What it starts from is the study's own, wherever the study lies.
            if key not in free_to_change(self.config) | {"start"} and not left_open:
                raise UserError(
                    f"'{self.folder}' was trained with {key} = {old}, the study says {new}: remove it, or give the "
                    "study another folder (`root`)."
                )


# -- all runs ---------------------------------------------------------------------------------------------------------


class _Runner:
    """Keeps `jobs` workers busy until nothing is missing."""

    def __init__(
        self, wanted: Study, names: Sequence[str], root: Path, jobs: int, lock: int | None, say: Say,
        stopped: Callable[[], bool], until: float,
    ) -> None:  # fmt: skip
        self.study, self.root, self.jobs, self.say, self.stopped = wanted, root, jobs, say, stopped
        self.names = names  # of the arms to run
        self.inherited = [] if lock is None else [lock]
        self.until = until  # by the monotonic clock
        self.running: list[_StudyRun] = []
        fine = sum(tuning.planned(arm, wanted) for arm in wanted.fine_tunings.values())
        self.total = sum(tuning.planned(arm, wanted) + fine for arm in self._arms)

    @property
    def _arms(self) -> list[Arm]:
        return [arm for arm in self.study.arms.values() if arm.name in self.names]

    def check(self) -> None:
        """No run in the folder may be one of another version of the study."""
        for run in self._known():
            run.check()

    def go(self) -> None:
        said = time.monotonic()
        if self._missing():
            self.say(f"{self.study.name}: {self.total} runs, {self._done()} of them done; {self.jobs} at a time")
        try:
            while True:
                left = [run for run in self._missing() if not any(run.folder == r.folder for r in self.running)]
                while left and len(self.running) < self.jobs:
                    self._start(left.pop(0))
                if not self.running:
                    return
                while not self._reap():
                    if self.stopped():
                        raise Interrupted("stopped; the same command goes on.")
                    if time.monotonic() > self.until:
                        self.say("time is up; the same command goes on.")
                        return
                    if time.monotonic() - said > 30:
                        said = time.monotonic()
                        self.say("; ".join(f"{run.name}: step {run.files.step} of {run.steps}" for run in self.running))
                    time.sleep(0.05)
                self._settle()
        finally:
            self._stop()

    def _settle(self) -> None:
        """Takes into account what trials took that have ended."""
        before, self.study = self.study, budget.settle(self.study, self.root, self.jobs)
        for name, arm in self.study.arms.items():
            if arm.steps != (old := before.arms[name]).steps:
                self.say(
                    f"{name}: {sum(arm.steps):,} steps fill {self.study.seconds:g} s, by what its trials took; "
                    f"{sum(old.steps):,} by the first measurement"
                )

    def _known(self) -> list[_StudyRun]:
        """Runs that are done or can start now: trials first, the arms in turn; then seed by seed.

        Fine-tuning comes after pre-training, in the same order, each run as soon as what it begins with is done.
        """
        found: list[_StudyRun] = []
        arms = self._arms
        self._add(arms, found)
        begun = {run.folder for run in found if run.done and "diverged" not in run.files.evaluation}
        fine: list[Arm] = []
        for arm in arms:
            if (chosen := tuned(self.study, self.root, arm).chosen) is not None:
                fine.extend(self.study.fine_tuning(arm, task, self.root, chosen) for task in self.study.tasks)
        self._add(fine, found, lambda arm, seed: bool({arm.begin(seed), arm.begin(seed).parent} & begun))
        return found

    def _add(
        self, arms: Sequence[Arm], found: list[_StudyRun], may: Callable[[Arm, int], bool] = lambda arm, seed: True
    ) -> None:
        trials: list[list[_StudyRun]] = []
        finals: list[_StudyRun] = []
        for arm in arms:
            state = tuned(self.study, self.root, arm)
            mine = [
                self._run(arm, trial.values, seed, test=False)
                for trial in (() if arm.earlier else state.trials)
                for seed in self.study.tuning_seeds
                if may(arm, seed)
            ]
            trials.append(mine)
            if state.chosen is not None:
                left = [seed for seed in self.study.seeds if seed not in arm.held and may(arm, seed)]
                finals.extend(self._run(arm, state.chosen, seed, test=True) for seed in left)
            elif mine and all(run.done for run in mine):
                raise UserError(f"{arm.where}: every value of 'tune' diverged; try smaller ones.")
        finals.sort(key=lambda run: self.study.seeds.index(run.seed))
        # In turn, so that an arm's trials lie beside others' runs, as its other runs will: they say what those take.
        turns = [run for turn in itertools.zip_longest(*trials) for run in turn if run]
        # A seed that was tuned on has its run already: the trial that was chosen.
        found.extend({run.folder: run for run in turns + finals}.values())

    def _missing(self) -> list[_StudyRun]:
        return [run for run in self._known() if not run.done]

    def _run(self, arm: Arm, values: Values, seed: int, test: bool) -> _StudyRun:
        return _StudyRun(arm, values, seed, test, arm.folder(self.root, values, seed))

    def _start(self, run: _StudyRun) -> None:
        run.check()
        run.from_tuning = run.trained
        task = run.arm.task
        order = {
            "config": loading.to_dict(run.config), "test": run.test, "untrained": run.arm.untrained,
            "task": {"protocol": task.protocol, "decoding": asdict(task.decoding)} if task else None,
        }  # fmt: skip
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.process = worker.start(order, run.log, self.inherited)
        except OSError as error:
            raise UserError(f"'{run.folder}' cannot be made or written to: {error.strerror}.") from None
        run.started = time.monotonic()
        self.running.append(run)

    def _reap(self) -> bool:
        """Takes note of workers that have ended; whether there were any."""
        ended = [run for run in self.running if run.process and run.process.poll() is not None]
        for run in ended:
            assert run.process is not None
            self.running.remove(run)
            worker.close(run.process)
            if run.process.returncode:
                raise UserError(_why_it_ended(run, run.process.returncode))
            run.log.unlink(missing_ok=True)
            self._note(run)
        return bool(ended)

    def _note(self, run: _StudyRun) -> None:
        known = run.files.evaluation
        loss = known["diverged"] if "diverged" in known else f"validation loss {known['val_loss']:.4f}"
        score = f"BLEU {known['bleu']['bleu']:.2f}" if "bleu" in known else f"test loss {known.get('test_loss', 0):.4f}"
        if run.from_tuning:
            self.say(f"{run.name}: chosen by tuning, so a result as it is; {score}")
            return
        loss += f", {score}" if run.test and run.arm.task else ""
        took = time.monotonic() - run.started
        self.say(f"{self._done()}/{self.total}  {run.name}: {loss} ({took:.0f} s)  {words.eta(self._eta())}")

    def _done(self) -> int:
        return sum(run.trained for run in self._known())

    def _eta(self) -> float | None:
        """Seconds left, from what finished runs of each arm took a step; arms not seen yet: the mean of the others."""
        runs: dict[str, list[_StudyRun]] = {}
        for run in self._known():
            runs.setdefault(run.arm.title, []).append(run)
        done = {name: [run for run in some if run.files.finished] for name, some in runs.items()}
        took = {name: sum(run.files.summary["seconds"] for run in some) for name, some in done.items()}
        steps = {name: sum(run.steps for run in some) for name, some in done.items()}
        if not sum(steps.values()):
            return None
        pace = {name: took[name] / steps[name] for name in runs if steps[name]}
        usual = fmean(pace.values())
        each = fmean(fmean(run.steps for run in some) for some in runs.values())
        left = 0.0
        for arm in self._arms:
            for name, of in [(arm.name, arm), *((f"{arm.name} on {t}", a) for t, a in self.study.fine_tunings.items())]:
                some = runs.get(name, [])
                open_ = tuning.planned(of, self.study) - sum(run.trained for run in some)
                size = fmean(run.steps for run in some) if some else each
                under_way = sum(run.files.step for run in self.running if run.arm.title == name)
                left += max(0.0, open_ * size - under_way) * pace.get(name, usual)
        return left / self.jobs

    def _stop(self) -> None:
        processes = [run.process for run in self.running if run.process]
        for process in processes:
            worker.close(process)
        for process in processes:
            process.wait()


def _why_it_ended(run: _StudyRun, status: int) -> str:
    """What became of a worker, in a line."""
    said = (run.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    if status == 2:
        return f"{run.name}: {said}"
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{run.name}: its process {how}{f' ({said})' if said else ''}; the same command goes on. Log: {run.log}"
