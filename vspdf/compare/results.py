"""What the runs of a study show: means and paired differences over seeds, as JSON and CSV."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vspdf import ledger
from vspdf.compare.definition import Arm, Study
from vspdf.compare.multiplier import multipliers
from vspdf.compare.tuning import Tuning, tuned
from vspdf.config import resolve
from vspdf.config.resolved import ResolvedConfig
from vspdf.errors import UserError
from vspdf.files import read_json
from vspdf.kernels import hardware
from vspdf.report.comparison import CPU, WALL, Axis, at, curve, evaluated, paired, spread, timed
from vspdf.report.tables import LOSSES, main_axes
from vspdf.runs.folder import COLUMNS, Run

TOLERANCE = 0.03  # by which arms that are to train for equally long may end apart

# -- what finished runs say -------------------------------------------------------------------------------------------


def collect(study: Study, root: Path, jobs: int | None = None) -> dict[str, Any]:
    """Results of a study, from whatever runs are finished in `root`.

    Returns
    -------
    dict
        `arms` (`name`, `phases`, `tuned`, `trials`, `runs` with `seed`, `val_loss`, `test_loss`, `seconds`, `flops` and
        the `curve` of evaluations while training, ...), `paired` (`a`, `b`, `mean`, `low`, `high` of a − b on the test
        text, `seeds`, `verdict`, and as `reach` what a had spent when it came to b's loss), `multipliers` (as
        `vspdf.compare.multiplier` has them), `apart` (how far arms of a study with `seconds` differ in CPU time),
        `tasks` (`arms` with the `bleu` of their `runs`, `paired`), `complete`, and what the figures depend on.

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
    # One that diverged does not say on what machine that was.
    machines = [machine for run in runs if (machine := run.pop("machine"))["hardware"]]
    uneven = _apart(arms, study.seconds)
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
        "paired": [
            _refused(_difference(_named(arms, a), _named(arms, b), "test_loss", axes), uneven) for a, b in trained
        ],
        "multipliers": multipliers(arms, study.family),
        "budget_seconds": study.seconds,
        "apart": uneven,
        "tasks": tasks,
        "corpus": corpora[0] if corpora else None,
        "jobs": jobs,
        "command": study.command,
        # Of the first run that says, as all of them are meant to have; of this process where none does.
        **(machines[0] if machines else {"hardware": hardware.hardware(), "versions": hardware.versions()}),
        "same_machine": all(machine == machines[0] for machine in machines),
    }


def _apart(arms: Sequence[dict[str, Any]], seconds: float | None) -> dict[str, Any] | None:
    """How far the arms of a study with `seconds` ended apart in CPU time: the `share`, and of which `arms`."""
    spent = {arm["name"]: [run["cpu_seconds"] for run in timed(arm["runs"])] for arm in arms}
    took = {name: statistics.fmean(each) for name, each in spent.items() if each and all(each)}
    if seconds is None or len(took) < 2:
        return None
    least, most = min(took, key=lambda name: took[name]), max(took, key=lambda name: took[name])
    return {"share": took[most] / took[least] - 1, "arms": [most, least], "seconds": took}


def _refused(pair: dict[str, Any], uneven: dict[str, Any] | None) -> dict[str, Any]:
    """No verdict where arms that were to train for equally long did not."""
    took = [uneven["seconds"][pair[key]] for key in "ab" if pair[key] in uneven["seconds"]] if uneven else []
    if len(took) == 2 and max(took) > (1 + TOLERANCE) * min(took):
        return pair | {"verdict": f"refused: times {max(took) / min(took) - 1:.1%} apart"}
    return pair


def _named(arms: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(arm for arm in arms if arm["name"] == name)


def _arm(study: Study, root: Path, arm: Arm) -> dict[str, Any]:
    state = tuned(study, root, arm)
    config = arm.configure(state.chosen or {}, study.seeds[0])
    runs = []
    if state.chosen is not None:
        held = arm.held
        folders = {seed: arm.folder(root, state.chosen, seed) for seed in study.seeds}
        runs = [
            dict(held[seed]) if seed in held else _run(folder, added=arm.earlier is not None)
            for seed, folder in folders.items()
            if seed in held or {"test_loss", "diverged"} & Run(folder).evaluation.keys()
        ]
    whole = [run for run in runs if run["test_loss"] is not None]
    weights = sum(resolve.linear_layers(config.model).values())
    stages = resolve.amounts(config)
    average = sum(tokens * (1 - sparsity) for sparsity, tokens in stages) / sum(tokens for _, tokens in stages)
    return {
        "name": arm.name,
        "weights": weights,  # of the layers that can be sparse
        "kept": average * weights,  # of them, on average over the tokens
        "stored_bytes": _stored(weights, 1 - stages[-1][0], runs[0]["parameters"]) if runs else None,
        "phases": [
            {key: getattr(phase, key) for key in ("name", "sparsity", "steps", "tokens")} for phase in config.phases
        ],
        "tuned": state.chosen,
        "digest": arm.digest,
        "at_the_edge": state.at_the_edge(arm),
        "trials": [{"values": trial.values, "val_loss": _finite(trial.losses)} for trial in state.trials],
        "test_loss": spread([run["test_loss"] for run in whole]),
        "flops": {**whole[0]["flops"], **whole[0]["flops_by_convention"]} if whole else None,
        "relative_flops": None,  # to the first arm's, by convention and column
        "runs": runs,
    }


def _stored(weights: int, density: float, parameters: int) -> int:
    """Bytes of a model as it ends: float32 of what is kept and all that is dense, and a bit a position of masks."""
    return 4 * (parameters - weights + round(density * weights)) + (-(-weights // 8) if density < 1 else 0)


def _finite(losses: Sequence[float | None]) -> list[float | None]:
    """Losses as JSON has them: null where a trial diverged or is not known."""
    return [loss if loss is not None and math.isfinite(loss) else None for loss in losses]


def _run(folder: Path, added: bool) -> dict[str, Any]:
    """A finished run; of a seed that is `added` to earlier results, with its machine.

    Its curve is what was logged while it trained, on `train.eval_tokens` of the validation text.
    """
    run = Run(folder).check()
    known, shape = run.evaluation, run.shape
    points = []
    for point in evaluated(curve(run)):
        stages = _stages_until(run.config, point["tokens"])
        points.append({
            **{key: point[key] for key in ("step", "tokens", "val_loss", "flops", "seconds", "cpu_seconds")},
            "flops_by_convention": {
                name: ledger.training_flops(shape, stages, convention=name) for name in ledger.CONVENTIONS
            },
        })  # fmt: skip
    last = run.lines[-1] if run.lines else {"tokens": 0, "training_seconds": 0.0, "flops": dict.fromkeys(COLUMNS, 0)}
    machine = {key: run.summary.get(key) for key in ("hardware", "versions")}
    return {
        "seed": run.config.seed,
        **{key: known.get(key) for key in LOSSES},
        **({"added": machine} if added else {}),
        **({"diverged": known["diverged"]} if "diverged" in known else {}),
        "tokens": last["tokens"],
        "seconds": last["training_seconds"],
        "cpu_seconds": last.get("training_cpu_seconds"),  # None: the run, or its beginning, is older than the count
        "threads": run.config.train.threads if run.config.train.device == "cpu" else None,
        "load_average": known.get("load_average"),
        "flops": last["flops"],
        "flops_by_convention": points[-1]["flops_by_convention"] if points else None,
        "order": run.manifest["order"],
        "corpus": {key: run.manifest[key] for key in ("corpus", "tokenizer", "train", "validation", "test")},
        "machine": machine,
        "parameters": shape.parameters,
        "curve": points,
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
            "bleu": spread([run["bleu"] for run in whole]),
            "test_loss": spread([run["test_loss"] for run in whole]), "runs": runs,
        })  # fmt: skip
    return {
        "name": name, "protocol": task.protocol, "decoding": asdict(task.decoding), "sizes": sizes,
        "bleu_of_contexts": copied, "arms": arms,
        "paired": [_difference(_named(arms, a), _named(arms, b), "bleu") for a, b in study.pairs],
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


def _difference(a: dict[str, Any], b: dict[str, Any], key: str, axes: Sequence[Axis] = ()) -> dict[str, Any]:
    """The difference a − b of `key` on the test part, seed by seed, on the seeds that both have finished.

    `at_equal` has the differences of validation losses while training, where both had spent what the shorter one spent
    in all, between evaluations.
    """
    theirs = {run["seed"]: run for run in b["runs"] if run[key] is not None}
    both = [(run, theirs[run["seed"]]) for run in a["runs"] if run[key] is not None and run["seed"] in theirs]
    differences = [mine[key] - other[key] for mine, other in both]
    body = paired(differences)
    return {
        "a": a["name"], "b": b["name"],
        "mean": body["mean"], "low": body["low"], "high": body["high"],
        "seeds": [run["seed"] for run, _ in both], "differences": differences, "verdict": body["verdict"],
        "at_equal": {axis.name: _at_equal(both, axis) for axis in axes} if both else {},
        "reach": {axis.name: _reach(both, axis) for axis in axes} if both else {},
    }  # fmt: skip


def _fair(pairs: Sequence[tuple[Any, Any]], axis: Axis) -> Sequence[tuple[Any, Any]]:
    """Pairs that an axis may be held to: added runs have no seconds to be compared."""
    return [pair for pair in pairs if len(timed(pair)) == 2] if axis in (CPU, WALL) else pairs


def _at_equal(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], axis: Axis) -> dict[str, float | None]:
    differences, budgets = [], []
    for a, b in _fair(pairs, axis):
        budget = min(axis.value(run["curve"][-1]) for run in (a, b))
        mine, theirs = at(a["curve"], axis, budget), at(b["curve"], axis, budget)
        if mine is None or theirs is None:
            return {"budget": budget, "mean": None, "low": None, "high": None}
        differences.append(mine - theirs)
        budgets.append(budget)
    body = paired(differences)
    return {
        "budget": statistics.fmean(budgets) if budgets else None,
        **{key: body[key] for key in ("mean", "low", "high")},
    }


def _reach(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], axis: Axis) -> dict[str, Any]:
    """What a had spent when it was first evaluated at no more than b's last validation loss, over what b spent in all.

    `share` is the mean over pairs with its interval, None where a pair never came there; `reached` says how many did.
    """
    shares, pairs = [], _fair(pairs, axis)
    for a, b in pairs:
        wanted, total = b["curve"][-1]["val_loss"], axis.value(b["curve"][-1])
        before = None
        for point in a["curve"]:
            x, loss = axis.value(point), point["val_loss"]
            if loss <= wanted:
                if before and before[1] > loss:  # between evaluations
                    x = before[0] + (x - before[0]) * (before[1] - wanted) / (before[1] - loss)
                shares.append(x / total)
                break
            before = (x, loss)
    body = paired(shares if len(shares) == len(pairs) else [])
    return {"share": body["mean"], "low": body["low"], "high": body["high"], "reached": len(shares)}


# -- files ------------------------------------------------------------------------------------------------------------


def read(study: Study) -> dict[str, Any]:
    """The results that are kept beside a study, else those of its runs here.

    Raises
    ------
    UserError
        If there are none.
    """
    ran = study.root / "results.json"
    for file in (study.results, ran):
        if file.exists():
            return read_json(file)
    raise UserError(
        f"study '{study.name}' has no committed results: it was not run yet, or '{ran}' would have its results. "
        f"`{study.command}` runs it."
    )
