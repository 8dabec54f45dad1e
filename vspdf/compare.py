"""Runs a study: tunes each arm, trains every seed, several runs at a time, and puts together what they show.

Each run is an ordinary run directory, trained by a process of its own. What is finished is kept, what was cut off goes
on from its checkpoint, so a study may be stopped and started at will. A worker stops, with a checkpoint, when its input
ends: at the end of this process, however it ended.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import torch

from vspdf import config as configuration
from vspdf import evidence, evidence_page, hub, study
from vspdf.config import Config
from vspdf.data import prepare
from vspdf.errors import Diverged, Interrupted, UserError
from vspdf.evaluate import evaluate
from vspdf.evidence import evaluation, tuned
from vspdf.files import write_whole
from vspdf.study import Arm, Study, Values
from vspdf.train import FREE_TO_CHANGE, differences, train

log = logging.getLogger("vspdf")

Say = Callable[[str], None]
_PATIENCE = 20.0  # seconds to wait for workers of a process that was killed: they finish their step and save


def run(source: str | Path, root: Path | None = None, jobs: int | None = None, say: Say = log.info) -> dict[str, Any]:
    """Runs what is missing of a study, and writes `results.json`, `results.csv` and `comparison.html`.

    Parameters
    ----------
    source : path of a study, or the name of one that ships
    root : Path, optional
        Folder of its runs; default `runs/NAME`.
    jobs : int, optional
        Runs at a time; default: as many as the cores allow, with `train.threads` each.
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
    wanted = study.load(source)
    root = root or Path("runs") / wanted.name
    _check_data(wanted)
    threads = next(iter(wanted.arms.values())).configure({}, 0).train.threads or os.cpu_count() or 1
    jobs = jobs or max(1, (os.cpu_count() or 1) // threads)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{root}' cannot be made: {error.strerror}.") from None
    with _alone(root) as lock, _signals() as stopped:
        runner = _Runner(wanted, root, jobs, lock, say, stopped)
        runner.check()
        try:
            runner.go()
        finally:
            results = evidence.collect(wanted, root, jobs)
            evidence_page.write(results, root)
    return results


def _check_data(wanted: Study) -> None:
    """Enough text for every arm, and tokens in the cache before several processes look for them."""
    for arm in wanted.arms.values():
        config = arm.configure({}, wanted.seeds[0])
        data = prepare(config.data, config.model.sequence_length or 0, config.seed)
        try:
            data.check(sum((phase.steps or 0) * (phase.batch_size or 0) for phase in config.phases))
        except UserError as error:
            raise UserError(f"{arm.where}: {error}") from None


@contextmanager
def _alone(root: Path) -> Iterator[int]:
    """Holds a lock on the study's folder that workers inherit: none is left when another process gets it."""
    with open(root / ".lock", "w") as file:
        for attempt in range(int(_PATIENCE * 10)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 0:
                    log.info("'%s' is in use: waiting for runs that are being stopped.", root)
                time.sleep(0.1)
        else:
            raise UserError(f"another process is at work on the study in '{root}'.")
        yield file.fileno()


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
class _Run:
    """One run of an arm, and the process that is at work on it."""

    arm: Arm
    values: Values
    seed: int
    test: bool  # whether its test loss is wanted: tuning never asks for it
    folder: Path
    process: subprocess.Popen[str] | None = None
    errors: IO[str] | None = None
    started: float = 0.0
    from_tuning: bool = False  # it was trained before its test loss was asked for

    @cached_property
    def config(self) -> Config:
        return self.arm.configure(self.values, self.seed, self.folder)

    @property
    def name(self) -> str:
        return ", ".join([self.arm.name, *(f"{key} = {v}" for key, v in self.values.items()), f"seed {self.seed}"])

    @property
    def trained(self) -> bool:
        return bool({"diverged", "val_loss"} & evaluation(self.folder).keys())

    @property
    def done(self) -> bool:
        known = evaluation(self.folder)
        return self.trained and (not self.test or bool({"diverged", "test_loss"} & known.keys()))

    def check(self) -> None:
        """A run of an older version of the study must not pass for one of this."""
        if not (self.folder / "config.yaml").exists():
            return
        stored = configuration.load(self.folder / "config.yaml")
        changed = differences(configuration.to_dict(stored), configuration.to_dict(self.config))
        for key, (old, new) in changed.items():
            left_open = new is None  # to the trainer, which wrote down what it took
            if key not in FREE_TO_CHANGE and not left_open:
                raise UserError(
                    f"'{self.folder}' was trained with {key} = {old}, the study says {new}: remove it, or give the "
                    "study another folder (--runs)."
                )

    def step(self) -> int:
        """Steps done so far, as the metrics tell."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().split(b"\n")
            return int(json.loads(lines[-2])["step"])
        except (OSError, ValueError, IndexError):
            return 0

    def seconds(self) -> float | None:
        """Wall clock of the whole training, over all its processes; None before its end."""
        try:
            return float(json.loads((self.folder / "summary.json").read_text())["seconds"])
        except (OSError, ValueError, KeyError):
            return None


def work() -> None:
    """A worker: trains and evaluates the one run that the first line of its input tells of."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()
    from vspdf.allocator import keep_freed_memory

    keep_freed_memory()
    try:
        _train_and_evaluate(configuration.build(order["config"], "the study"), order["test"])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        sys.exit(130)


def _stop_at_the_end_of_input() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _train_and_evaluate(config: Config, test: bool) -> None:
    folder = Path(config.run_dir or "")
    result = evaluation(folder)
    if config.train.threads:  # the trainer sets it back when it is done
        torch.set_num_threads(config.train.threads)
    try:
        if not (folder / "summary.json").exists():
            train(config, resume=(folder / "config.yaml").exists(), say=lambda line: None)
            result["load_average"] = os.getloadavg()[0]
        model = hub.load(folder, config.train.backend).model
        data = prepare(config.data, config.model.sequence_length or 0, config.seed)
        for part, text in {"val": data, **({"test": data.for_test()} if test else {})}.items():
            if f"{part}_loss" in result:  # of a trial that is now a result
                continue
            found = evaluate(model, text, config.train.micro_batch_size or 1, precision=config.train.precision)
            result[f"{part}_loss"], result[f"{part}_bits_per_byte"] = found
    except Diverged as error:
        result = {"diverged": str(error)}
    write_whole(folder / "evaluation.json", json.dumps(result))


# -- all runs ---------------------------------------------------------------------------------------------------------


class _Runner:
    """Keeps `jobs` workers busy until nothing is missing."""

    def __init__(self, wanted: Study, root: Path, jobs: int, lock: int, say: Say, stopped: Callable[[], bool]) -> None:
        self.study, self.root, self.jobs, self.lock, self.say, self.stopped = wanted, root, jobs, lock, say, stopped
        self.running: list[_Run] = []
        self.total = sum(study.planned(arm, wanted) for arm in wanted.arms.values())

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
                    if time.monotonic() - said > 30:
                        said = time.monotonic()
                        self.say("; ".join(f"{run.name}: step {run.step()} of {run.arm.steps}" for run in self.running))
                    time.sleep(0.05)
        finally:
            self._stop()

    def _known(self) -> list[_Run]:
        """Runs that are done or can start now: trials first, so that all arms are tuned; then seed by seed."""
        trials: list[_Run] = []
        finals: list[_Run] = []
        for arm in self.study.arms.values():
            state = tuned(self.study, self.root, arm)
            for trial in state.trials:
                trials.extend(self._run(arm, trial.values, seed, test=False) for seed in self.study.tuning_seeds)
            if state.chosen is not None:
                finals.extend(self._run(arm, state.chosen, seed, test=True) for seed in self.study.seeds)
            elif all(run.done for run in trials if run.arm is arm):
                raise UserError(f"{arm.where}: every value of 'tune' diverged; try smaller ones.")
        finals.sort(key=lambda run: self.study.seeds.index(run.seed))
        # A seed that was tuned on has its run already: the trial that was chosen.
        return list({run.folder: run for run in trials + finals}.values())

    def _missing(self) -> list[_Run]:
        return [run for run in self._known() if not run.done]

    def _run(self, arm: Arm, values: Values, seed: int, test: bool) -> _Run:
        return _Run(arm, values, seed, test, arm.folder(self.root, values, seed))

    def _start(self, run: _Run) -> None:
        run.check()
        run.from_tuning = run.trained
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"'{run.folder}' cannot be made: {error.strerror}.") from None
        run.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # A session of its own: Ctrl-C reaches this process alone, which stops the workers once and in order.
        run.process = subprocess.Popen(
            [sys.executable, "-c", "from vspdf.compare import work; work()"], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=run.errors, text=True, pass_fds=[self.lock], start_new_session=True,
        )  # fmt: skip
        run.started = time.monotonic()
        assert run.process.stdin is not None
        run.process.stdin.write(json.dumps({"config": configuration.to_dict(run.config), "test": run.test}) + "\n")
        run.process.stdin.flush()
        self.running.append(run)

    def _reap(self) -> bool:
        """Takes note of workers that have ended; whether there were any."""
        ended = [run for run in self.running if run.process and run.process.poll() is not None]
        for run in ended:
            self.running.remove(run)
            self._close(run)
            assert run.process is not None and run.errors is not None
            if run.process.returncode:
                run.errors.seek(0)
                lines = run.errors.read().strip().splitlines() or [f"its process ended with {run.process.returncode}"]
                raise (UserError if run.process.returncode == 2 else RuntimeError)(f"{run.name}: {lines[-1]}")
            self._note(run)
        return bool(ended)

    def _note(self, run: _Run) -> None:
        known = evaluation(run.folder)
        loss = known["diverged"] if "diverged" in known else f"validation loss {known['val_loss']:.4f}"
        if run.from_tuning:
            self.say(f"{run.name}: chosen by tuning, so a result as it is; test loss {known['test_loss']:.4f}")
            return
        took = time.monotonic() - run.started
        eta = self._eta()
        self.say(
            f"{self._done()}/{self.total}  {run.name}: {loss} ({took:.0f} s)  "
            f"ETA {'not known yet' if eta is None else _clock(eta)}"
        )

    def _done(self) -> int:
        return sum(run.trained for run in self._known())

    def _eta(self) -> float | None:
        """Seconds left, from what finished runs of each arm took; arms not seen yet as the mean of the others."""
        known = self._known()
        paces: dict[str, list[float]] = {}
        for run in known:
            if (took := run.seconds()) is not None:
                paces.setdefault(run.arm.name, []).append(took / run.arm.steps)
        if not paces:
            return None
        means = {name: fmean(seconds) for name, seconds in paces.items()}
        left = 0.0
        for arm in self.study.arms.values():
            open_ = study.planned(arm, self.study) - sum(run.trained for run in known if run.arm is arm)
            under_way = sum(run.step() for run in self.running if run.arm is arm)
            left += max(0, open_ * arm.steps - under_way) * means.get(arm.name, fmean(means.values()))
        return left / self.jobs

    def _stop(self) -> None:
        for run in self.running:
            self._close(run)
        for run in self.running:
            assert run.process is not None
            run.process.wait()

    def _close(self, run: _Run) -> None:
        assert run.process is not None and run.process.stdin is not None
        run.process.stdin.close()


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
