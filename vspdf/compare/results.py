"""What the runs of a study show: means and paired differences over seeds, as JSON and CSV."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vspdf import ledger
from vspdf.compare.definition import Arm, Study
from vspdf.compare.tuning import Tuning, tuned
from vspdf.config import resolve
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.kernels import hardware
from vspdf.report.tables import _LOSSES, COLUMNS, Axis, main_axes
from vspdf.runs.folder import Run

LEVEL = 0.95  # of confidence intervals


# -- statistics -------------------------------------------------------------------------------------------------------


def student_t(p: float, degrees: int) -> float:
    """The two-sided quantile of Student's t: ``|t|`` stays below it with probability `p`.

    From the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4), by bisection.
    """

    def inside(t: float) -> float:
        theta = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        term, total = math.cos(theta) ** odd, 0.0
        for power in range(odd, degrees - 1, 2):
            total += term
            term *= math.cos(theta) ** 2 * (power + 1) / (power + 2)
        total *= math.sin(theta)
        return 2 / math.pi * (theta + total) if odd else total

    low, high = 0.0, 1.0
    while inside(high) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < p else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Confidence interval of the mean (Student's t over the values); None for less than two."""
    if len(values) < 2:
        return None
    reach = student_t(LEVEL, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - reach, mean + reach


# -- what finished runs say -------------------------------------------------------------------------------------------


def collect(study: Study, root: Path, jobs: int | None = None) -> dict[str, Any]:
    """Results of a study, from whatever runs are finished in `root`.

    Returns
    -------
    dict
        `arms` (`name`, `phases`, `tuned`, `trials`, `runs` with `seed`, `val_loss`, `test_loss`, `seconds`, `flops` and
        the `curve` of evaluations while training, ...), `paired` (`a`, `b`, `mean`, `low`, `high` of a − b on the test
        text, `seeds`, `verdict`), `tasks` (`arms` with the `bleu` of their `runs`, `paired`), `complete`, and what the
        figures depend on.

    Raises
    ------
    UserError
        If runs of a seed did not read the same tokens in the same order.
    """
    arms = [_arm(study, root, arm) for arm in study.arms.values() if not arm.untrained]
    tasks = [_task(study, root, task) for task in study.tasks]
    for some in (arms, *(task["arms"] for task in tasks)):
        for seed in study.seeds:
            orders = {run["order"]: arm["name"] for arm in some for run in arm["runs"] if run["seed"] == seed}
            if len(orders) > 1:
                raise UserError(f"runs of seed {seed} in '{root}' read different data ({', '.join(orders.values())}).")
    first, axes = arms[0], main_axes(arms)
    for arm in arms:
        if arm["flops"] and first["flops"]:
            arm["relative_flops"] = {name: total / first["flops"][name] for name, total in arm["flops"].items()}
    runs = [run for arm in arms for run in arm["runs"]]
    trained = [pair for pair in study.pairs if not any(study.arms[name].untrained for name in pair)]
    machines = [run.pop("machine") for run in runs]
    corpora = [run.pop("corpus") for run in runs]
    return {
        "study": study.name,
        "about": study.about,
        "complete": all(
            len(arm["runs"]) == len(study.seeds) for some in (arms, *(task["arms"] for task in tasks)) for arm in some
        ),
        "seeds": list(study.seeds),
        "tuning_seeds": list(study.tuning_seeds),
        "arms": arms,
        "paired": [_paired(_named(arms, a), _named(arms, b), "test_loss", axes) for a, b in trained],
        "tasks": tasks,
        "corpus": corpora[0] if corpora else None,
        "jobs": jobs,
        "command": study.command,
        # Of the first run, as all of them are meant to have; of this process where none is finished.
        **(machines[0] if machines else {"hardware": hardware.hardware(), "versions": hardware.versions()}),
        "same_machine": all(machine == machines[0] for machine in machines),
    }


def _named(arms: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(arm for arm in arms if arm["name"] == name)


def _arm(study: Study, root: Path, arm: Arm) -> dict[str, Any]:
    state = tuned(study, root, arm)
    config = arm.configure(state.chosen or {}, study.seeds[0])
    runs = []
    if state.chosen is not None:
        folders = [arm.folder(root, state.chosen, seed) for seed in study.seeds]
        runs = [_run(folder) for folder in folders if {"test_loss", "diverged"} & Run(folder).evaluation.keys()]
    whole = [run for run in runs if run["test_loss"] is not None]
    return {
        "name": arm.name,
        "phases": [
            {key: getattr(phase, key) for key in ("name", "sparsity", "steps", "tokens")} for phase in config.phases
        ],
        "tuned": state.chosen,
        "at_the_edge": state.at_the_edge(arm),
        "trials": [{"values": trial.values, "val_loss": _finite(trial.losses)} for trial in state.trials],
        "test_loss": _spread([run["test_loss"] for run in whole]),
        "flops": {**whole[0]["flops"], **whole[0]["flops_by_convention"]} if whole else None,
        "relative_flops": None,  # to the first arm's, by convention and column
        "runs": runs,
    }


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation and interval of the mean."""
    around = interval(values)
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "low": around[0] if around else None,
        "high": around[1] if around else None,
    }


def _finite(losses: Sequence[float | None]) -> list[float | None]:
    """As JSON has it: null where a trial diverged or is not known."""
    return [loss if loss is not None and math.isfinite(loss) else None for loss in losses]


def _run(folder: Path) -> dict[str, Any]:
    """A finished run. Its curve is what was logged while it trained, on `train.eval_tokens` of the validation text."""
    run = Run(folder)
    known, shape = run.evaluation, run.shape
    curve = []
    for line in run.evaluations:
        stages = _stages_until(run.config, line["tokens"])
        totals = {name: ledger.training_flops(shape, stages, convention=name) for name in ledger.CONVENTIONS}
        curve.append({
            **{key: line[key] for key in ("step", "tokens", "val_loss", "flops")},
            "seconds": line["training_seconds"], "cpu_seconds": line.get("training_cpu_seconds"),
            "flops_by_convention": totals,
        })  # fmt: skip
    last = run.lines[-1] if run.lines else {"tokens": 0, "training_seconds": 0.0, "flops": dict.fromkeys(COLUMNS, 0)}
    return {
        "seed": run.config.seed,
        **{key: known.get(key) for key in _LOSSES},
        **({"diverged": known["diverged"]} if "diverged" in known else {}),
        "tokens": last["tokens"],
        "seconds": last["training_seconds"],
        "cpu_seconds": last.get("training_cpu_seconds"),  # None: the run, or its beginning, is older than the count
        "threads": run.config.train.threads if run.config.train.device == "cpu" else None,
        "load_average": known.get("load_average"),
        "flops": last["flops"],
        "flops_by_convention": curve[-1]["flops_by_convention"] if curve else None,
        "order": run.manifest["order"],
        "corpus": {key: run.manifest[key] for key in ("corpus", "tokenizer", "train", "validation", "test")},
        "machine": {key: run.summary.get(key) for key in ("hardware", "versions")},
        "parameters": shape.parameters,
        "curve": curve,
    }


def _stages_until(config: ResolvedConfig, tokens: float) -> list[tuple[float, float]]:
    """(sparsity, tokens) of the stretches of a run until it had read so many tokens."""
    stages: list[tuple[float, float]] = []
    for sparsity, size in resolve.amounts(config):
        here = min(tokens, size)
        stages.append((sparsity, here))
        tokens -= here
    return stages


def _task(study: Study, root: Path, name: str) -> dict[str, Any]:
    """What every arm scores on a task after fine-tuning."""
    task, arms, sizes = study.tasks[name], [], {}
    copied = None
    for arm in study.arms.values():
        runs: list[dict[str, Any]] = []
        chosen, state = tuned(study, root, arm).chosen, Tuning(None, [])
        if chosen is not None:
            fine = study.fine_tuning(arm, name, root, chosen)
            state = tuned(study, root, fine)
            for seed in study.seeds if state.chosen is not None else ():
                run = Run(fine.folder(root, state.chosen or {}, seed))
                if {"bleu", "diverged"} & (known := run.evaluation).keys():
                    runs.append({"seed": seed, **_fine_tuned(run, known), "order": run.manifest["order"]})
                    sizes = {key: run.manifest[key] for key in ("corpus", "samples", "train", "validation", "test")}
                    copied = known.get("bleu_of_contexts", copied)
        whole = [run for run in runs if run["bleu"] is not None]
        arms.append({
            "name": arm.name, "tuned": state.chosen, "at_the_edge": state.at_the_edge(study.fine_tunings[name]),
            "trials": [{"values": trial.values, "val_loss": _finite(trial.losses)} for trial in state.trials],
            "bleu": _spread([run["bleu"] for run in whole]),
            "test_loss": _spread([run["test_loss"] for run in whole]), "runs": runs,
        })  # fmt: skip
    return {
        "name": name, "protocol": task.protocol, "decoding": asdict(task.decoding), "sizes": sizes,
        "bleu_of_contexts": copied, "arms": arms,
        "paired": [_paired(_named(arms, a), _named(arms, b), "bleu") for a, b in study.pairs],
    }  # fmt: skip


def _fine_tuned(run: Run, known: dict[str, Any]) -> dict[str, Any]:
    if "diverged" in known:
        return {"diverged": known["diverged"], **dict.fromkeys(("bleu", "test_loss", "val_loss"))}
    summary = run.summary
    keys = ("bleu", "brevity_penalty", "hypothesis_length", "reference_length")
    return {
        **{key: known["bleu"][key] for key in keys}, **{key: known[key] for key in ("test_loss", "val_loss")},
        "steps": summary["phases"][0]["steps"], "tokens": summary["tokens"],
        "seconds": summary["phases"][0]["seconds"], "cpu_seconds": summary["cpu_seconds"],
    }  # fmt: skip


def _paired(a: dict[str, Any], b: dict[str, Any], key: str, axes: Sequence[Axis] = ()) -> dict[str, Any]:
    """The difference a − b of `key` on the test part, seed by seed, on the seeds that both have finished.

    `at_equal` has the differences of validation losses while training, where both had spent what the shorter one spent
    in all, between evaluations.
    """
    theirs = {run["seed"]: run for run in b["runs"] if run[key] is not None}
    both = [(run, theirs[run["seed"]]) for run in a["runs"] if run[key] is not None and run["seed"] in theirs]
    differences = [mine[key] - other[key] for mine, other in both]
    around = interval(differences)
    if not both:
        verdict = "not run yet"
    elif around is None:
        verdict = "one seed: no interval"
    elif around[0] <= 0 <= around[1]:
        verdict = "not told apart"
    else:
        verdict = "lower" if around[1] < 0 else "higher"
    return {
        "a": a["name"], "b": b["name"],
        "mean": statistics.fmean(differences) if both else None,
        "low": around[0] if around else None, "high": around[1] if around else None,
        "seeds": [run["seed"] for run, _ in both], "differences": differences, "verdict": verdict,
        "at_equal": {axis.name: _at_equal(both, axis) for axis in axes} if both else {},
    }  # fmt: skip


def _at_equal(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], axis: Axis) -> dict[str, float | None]:
    differences, budgets = [], []
    for a, b in pairs:
        budget = min(axis.value(run["curve"][-1]) for run in (a, b))
        if budget < max(axis.value(run["curve"][0]) for run in (a, b)):
            return {"budget": budget, "mean": None, "low": None, "high": None}
        at = [
            float(np.interp(budget, [axis.value(p) for p in run["curve"]], [p["val_loss"] for p in run["curve"]]))
            for run in (a, b)
        ]
        differences.append(at[0] - at[1])
        budgets.append(budget)
    around = interval(differences)
    return {
        "budget": statistics.fmean(budgets), "mean": statistics.fmean(differences),
        "low": around[0] if around else None, "high": around[1] if around else None,
    }  # fmt: skip


# -- files ------------------------------------------------------------------------------------------------------------


def read(study: Study) -> dict[str, Any]:
    """The results that are kept beside a study.

    Raises
    ------
    UserError
        If there are none.
    """
    try:
        return json.loads(study.results.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"study '{study.name}' has no committed results: it was not run yet. `vspdf compare {study.path}` runs it."
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{study.results} cannot be read: {error}.") from None
