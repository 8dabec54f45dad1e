"""What the runs of a study show: means and paired differences over seeds, as JSON, CSV, a page and a plot."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vspdf import config as configuration
from vspdf import info, ledger, report, schedule
from vspdf.errors import UserError
from vspdf.files import write_whole
from vspdf.study import Arm, Study, Tuning, Values, tuning
from vspdf.svg import Series, interval_chart, legend, line_chart

LEVEL = 0.95  # of confidence intervals
COLUMNS = ("dense", "useful", "executed")


class Axis(NamedTuple):
    """What losses are drawn against: a value of each point of a curve."""

    name: str
    unit: str
    value: Callable[[dict[str, Any]], float]


MAIN_AXES = (
    Axis("tokens", "tokens", lambda point: point["tokens"]),
    Axis("executed FLOPs", "FLOP", lambda point: point["flops"]["executed"]),
    Axis("training time", "s", lambda point: point["seconds"]),
)
OTHER_AXES = (
    Axis("FLOPs as if dense", "FLOP", lambda point: point["flops"]["dense"]),
    Axis("useful FLOPs", "FLOP", lambda point: point["flops"]["useful"]),
    *(
        Axis(f"FLOPs, convention {name}", "FLOP", lambda point, name=name: point["flops_by_convention"][name])  # type: ignore[misc]
        for name in ledger.CONVENTIONS
    ),
)


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


def evaluation(folder: Path) -> dict[str, Any]:
    """What is known of a finished run: losses on all of the held-out text, or why it diverged; empty before that."""
    try:
        return json.loads((folder / "evaluation.json").read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / 'evaluation.json'} cannot be read: {error}.") from None


def tuned(study: Study, root: Path, arm: Arm) -> Tuning:
    """What the finished trials of an arm say about its values."""

    def loss(values: Values, seed: int) -> float | None:
        known = evaluation(arm.folder(root, values, seed))
        return math.inf if "diverged" in known else known.get("val_loss")

    return tuning(arm, study.tuning_seeds, loss)


def collect(study: Study, root: Path, jobs: int | None = None) -> dict[str, Any]:
    """Results of a study, from whatever runs are finished in `root`.

    Returns
    -------
    dict
        `arms` (`name`, `phases`, `tuned`, `trials`, `runs` with `seed`, `val_loss`, `test_loss`, `seconds`, `flops` and
        the `curve` of evaluations while training, ...), `paired` (`a`, `b`, `mean`, `low`, `high` of a − b on the test
        text, `seeds`, `verdict`), `complete`, and what the figures depend on.

    Raises
    ------
    UserError
        If runs of a seed did not read the same tokens in the same order.
    """
    arms = [_arm(study, root, arm) for arm in study.arms.values()]
    for seed in study.seeds:
        orders = {run["order"]: arm["name"] for arm in arms for run in arm["runs"] if run["seed"] == seed}
        if len(orders) > 1:
            raise UserError(f"runs of seed {seed} in '{root}' read different data ({', '.join(orders.values())}).")
    first = arms[0]
    for arm in arms:
        if arm["flops"] and first["flops"]:
            arm["relative_flops"] = {name: total / first["flops"][name] for name, total in arm["flops"].items()}
    runs = [run for arm in arms for run in arm["runs"]]
    machines = [run.pop("machine") for run in runs]
    corpora = [run.pop("corpus") for run in runs]
    return {
        "study": study.name,
        "about": study.about,
        "complete": all(len(arm["runs"]) == len(study.seeds) for arm in arms),
        "seeds": list(study.seeds),
        "tuning_seeds": list(study.tuning_seeds),
        "arms": arms,
        "paired": [_paired(_named(arms, a), _named(arms, b)) for a, b in study.pairs],
        "corpus": corpora[0] if corpora else None,
        "jobs": jobs,
        "command": f"vspdf compare {study.path.stem}",
        # Of the first run, as all of them are meant to have; of this process where none is finished.
        **(machines[0] if machines else {"hardware": info.hardware(), "versions": info.versions()}),
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
        runs = [_run(folder) for folder in folders if {"test_loss", "diverged"} & evaluation(folder).keys()]
    whole = [run for run in runs if run["test_loss"] is not None]
    test = [run["test_loss"] for run in whole]
    around = interval(test)
    return {
        "name": arm.name,
        "phases": [
            {key: getattr(phase, key) for key in ("name", "sparsity", "steps", "tokens")} for phase in config.phases
        ],
        "tuned": state.chosen,
        "at_the_edge": state.at_the_edge(arm),
        "trials": [{"values": trial.values, "val_loss": _finite(trial.losses)} for trial in state.trials],
        "test_loss": {
            "mean": statistics.fmean(test) if test else None,
            "std": statistics.stdev(test) if len(test) > 1 else None,
            "low": around[0] if around else None,
            "high": around[1] if around else None,
        },
        "flops": {**whole[0]["flops"], **whole[0]["flops_by_convention"]} if whole else None,
        "relative_flops": None,  # to the first arm's, by convention and column
        "runs": runs,
    }


def _finite(losses: Sequence[float | None]) -> list[float | None]:
    """As JSON has it: null where a trial diverged or is not known."""
    return [loss if loss is not None and math.isfinite(loss) else None for loss in losses]


def _run(folder: Path) -> dict[str, Any]:
    """A finished run. Its curve is what was logged while it trained, on `train.eval_tokens` of the validation text."""
    known = evaluation(folder)
    (run,) = report.read([folder])
    shape = configuration.model_shape(run.config.model)
    curve = []
    for line in run.evaluations:
        stages = _stages_until(run.config, line["tokens"])
        totals = {name: ledger.training_flops(shape, stages, convention=name) for name in ledger.CONVENTIONS}
        curve.append({
            **{key: line[key] for key in ("step", "tokens", "val_loss", "flops")},
            "seconds": line["training_seconds"], "flops_by_convention": totals,
        })  # fmt: skip
    last = run.lines[-1] if run.lines else {"tokens": 0, "training_seconds": 0.0, "flops": dict.fromkeys(COLUMNS, 0)}
    return {
        "seed": run.config.seed,
        **{key: known.get(key) for key in _LOSSES},
        **({"diverged": known["diverged"]} if "diverged" in known else {}),
        "tokens": last["tokens"],
        "seconds": last["training_seconds"],
        "load_average": known.get("load_average"),
        "flops": last["flops"],
        "flops_by_convention": curve[-1]["flops_by_convention"] if curve else None,
        "order": run.manifest["order"],
        "corpus": {key: run.manifest[key] for key in ("corpus", "tokenizer", "train", "validation", "test")},
        "machine": {key: run.summary.get(key) for key in ("hardware", "versions")},
        "parameters": shape.parameters,
        "curve": curve,
    }


_LOSSES = ("val_loss", "val_bits_per_byte", "test_loss", "test_bits_per_byte")


def _stages_until(config: configuration.Config, tokens: float) -> list[tuple[float, float]]:
    """(sparsity, tokens) of the stretches of a run until it had read so many tokens."""
    stages: list[tuple[float, float]] = []
    for sparsity, size in schedule.amounts(config):
        here = min(tokens, size)
        stages.append((sparsity, here))
        tokens -= here
    return stages


def _paired(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The difference a − b of the test losses, seed by seed, on the seeds that both have finished.

    `at_equal` has the differences of validation losses while training, where both had spent what the shorter one spent
    in all, between evaluations.
    """
    theirs = {run["seed"]: run for run in b["runs"] if run["test_loss"] is not None}
    both = [(run, theirs[run["seed"]]) for run in a["runs"] if run["test_loss"] is not None and run["seed"] in theirs]
    differences = [mine["test_loss"] - other["test_loss"] for mine, other in both]
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
        "at_equal": {axis.name: _at_equal(both, axis) for axis in MAIN_AXES} if both else {},
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


def write(results: dict[str, Any], root: Path) -> None:
    """Writes `results.json`, `results.csv` and `comparison.html`."""
    write_whole(root / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(root / "results.csv", table(results))
    write_whole(root / "comparison.html", render(results))


def table(results: dict[str, Any]) -> str:
    """A line of CSV for each run."""
    rows: list[dict[str, Any]] = []
    for arm in results["arms"]:
        for run in arm["runs"]:
            rows.append({
                "study": results["study"], "arm": arm["name"],
                "tuned": " ".join(f"{key}={value}" for key, value in (arm["tuned"] or {}).items()),
                **{key: run[key] for key in ("seed", *_LOSSES, "tokens", "seconds", "load_average")},
                **{f"flops_{column}": run["flops"][column] for column in COLUMNS},
                **{f"flops_{name}": total for name, total in (run["flops_by_convention"] or {}).items()},
                "order": run["order"][:16], "jobs": results["jobs"], "cpu": results["hardware"]["cpu"],
                **results["versions"],
            })  # fmt: skip
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know beside the figures."""
    said = []
    if not results["complete"]:
        done = sum(len(arm["runs"]) for arm in results["arms"])
        said.append(
            f"Not complete: {done} of {len(results['arms']) * len(results['seeds'])} runs are done; means are over "
            "the seeds that are."
        )
    tuned_arms = {arm["name"]: arm["tuned"] for arm in results["arms"] if arm["tuned"]}
    if tuned_arms:
        words = (f"{name} {', '.join(f'{k}={v}' for k, v in values.items())}" for name, values in tuned_arms.items())
        said.append(f"Tuned on validation text: {'; '.join(words)}.")
    said.append(
        "Weight-FLOPs and executed FLOPs are relative to the first arm. Intervals: Student's t over seeds; of a "
        "difference, over the differences of runs that read the same tokens in the same order. Each interval stands "
        "for itself: of twenty, one is expected to miss."
    )
    for arm in results["arms"]:
        if arm["at_the_edge"]:
            said.append(
                f"{arm['name']}: the best {', '.join(arm['at_the_edge'])} was the least or greatest tried; a better "
                "one may lie outside."
            )
        for run in arm["runs"]:
            if "diverged" in run:
                said.append(f"{arm['name']}, seed {run['seed']}: {run['diverged']}")
    loads = [run["load_average"] for arm in results["arms"] for run in arm["runs"] if run["load_average"] is not None]
    if not results["same_machine"]:
        said.append("The runs were made on different machines or with different versions: seconds do not compare.")
    cores = results["hardware"]["cores"] or 1
    if loads and max(loads) > cores + 0.5:
        said.append(
            f"The machine was busy with other work (load up to {max(loads):.1f} on {cores} cores): losses do not "
            "depend on it, seconds do, and are not to be quoted."
        )
    return said


# -- the page ---------------------------------------------------------------------------------------------------------


def render(results: dict[str, Any]) -> str:
    """The page of a study, from its results alone."""
    done = sum(len(arm["runs"]) for arm in results["arms"])
    badge = ("done", "complete") if results["complete"] else ("open", "not complete")
    head = (
        f"<header><h1>{escape(results['study'])}</h1>"
        f'<p><span class="badge {badge[0]}">{badge[1]}</span> {len(results["arms"])} arms, {done} runs, '
        f"seeds {escape(', '.join(map(str, results['seeds'])))}</p><p>{escape(results['about'])}</p></header>"
    )
    sections = [_losses(results), _differences(results)]
    if any(run["curve"] for arm in results["arms"] for run in arm["runs"]):
        sections.append(_curves(results))
    sections += [_tuning(results), _runs(results), _facts(results)]
    return report.page(results["study"], [head, *sections])


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], attributes: str = "") -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="scroll"><table{attributes}><tr>{heads}</tr>{body}</table></div>'


def number(value: float | None, form: str = ".4f") -> str:
    """A figure in words; a dash where it is not known."""
    return "–" if value is None else f"{value:{form}}"


def between(body: dict[str, Any], form: str = ".4f") -> str:
    """The interval of a mean in words."""
    return "–" if body["low"] is None else f"{body['low']:{form}} to {body['high']:{form}}"


def _losses(results: dict[str, Any]) -> str:
    rows = []
    for i, arm in enumerate(results["arms"]):
        stages = ", ".join(f"{phase['sparsity']:.0%}: {phase['steps']:,}" for phase in arm["phases"])
        relative = arm["relative_flops"] or {}
        rows.append((
            f'<i class="c{i % 8}"></i> {escape(arm["name"])}', escape(stages),
            number(arm["test_loss"]["mean"]), between(arm["test_loss"]),
            number(_mean(arm, "val_loss")), number(_mean(arm, "test_bits_per_byte")), str(len(arm["runs"])),
            f"{arm['runs'][0]['tokens']:,}" if arm["runs"] else "–",
            *(number(relative.get(name), ".1%") for name in ("linear", "spdf", "executed")),
            number(_mean(arm, "seconds"), ".0f"),
        ))  # fmt: skip
    head = (
        "arm", "sparsity: steps", "test loss", "95 % interval of the mean", "validation loss",
        "test bits/byte", "seeds", "tokens", "weight-FLOPs", "all FLOPs (spdf)", "executed", "seconds",
    )  # fmt: skip
    return report.section("Losses", _html_table(head, rows), escape(" ".join(notes(results))))


def _mean(arm: dict[str, Any], key: str) -> float | None:
    known = [run[key] for run in arm["runs"] if run[key] is not None]
    return statistics.fmean(known) if known else None


def _differences(results: dict[str, Any]) -> str:
    pairs = [pair for pair in results["paired"] if pair["mean"] is not None]
    if not pairs:
        return report.section("Paired differences", "<p>No two arms have finished runs of the same seed yet.</p>")
    rows, bars = [], []
    for pair in pairs:
        equal = [pair["at_equal"][axis.name] for axis in MAIN_AXES]
        rows.append((
            f"{escape(pair['a'])} − {escape(pair['b'])}", f"{pair['mean']:+.4f}", between(pair, "+.4f"),
            str(len(pair["seeds"])), f"{escape(pair['a'])}: {pair['verdict']}",
            *(f"{number(at['mean'], '+.4f')}<br><small>{between(at, '+.4f')}</small>" for at in equal),
        ))  # fmt: skip
        span = None if pair["low"] is None else (pair["low"], pair["high"])
        bars.append((f"{pair['a']} − {pair['b']}", pair["mean"], span))
    head = ["pair", "test loss, mean", "95 % interval", "seeds", "verdict"]
    head += [f"at equal {axis.name}" for axis in MAIN_AXES]
    chart = interval_chart(bars, title="Paired differences", x_label="difference of test losses (nats a token)")
    return report.section(
        "Paired differences", f'<div class="grid2">{report.figure(chart)}</div>{_html_table(head, rows)}',
        "Below zero: the first of the two has the lower loss. A verdict is given only where the interval leaves out "
        "zero. At equal tokens, FLOPs or time: validation loss while training, where both had spent what the shorter "
        "run spent in all; the longer one is in the middle of its learning rate schedule there.",
    )  # fmt: skip


def _curves(results: dict[str, Any]) -> str:
    head = legend([(arm["name"], i) for i, arm in enumerate(results["arms"])])
    main, other = (
        "".join(report.figure(_chart(results["arms"], axis)) for axis in axes) for axes in (MAIN_AXES, OTHER_AXES)
    )
    more = (
        "<details><summary>Against other counts of FLOPs</summary>"
        f'{head}<div class="grid3">{other}</div></details>'
    )  # fmt: skip
    return report.section(
        "Loss while training", f'{head}<div class="grid3">{main}</div>{more}',
        "Validation loss on a part of the validation text, means over seeds. Training time is that of the steps alone.",
    )  # fmt: skip


def _mean_curve(arm: dict[str, Any], axis: Axis) -> tuple[list[float], list[float]]:
    """Means over seeds, evaluation by evaluation."""
    curves = [run["curve"] for run in arm["runs"]]
    points = list(zip(*curves, strict=False)) if curves else []
    return (
        [statistics.fmean(axis.value(point) for point in at) for at in points],
        [statistics.fmean(point["val_loss"] for point in at) for at in points],
    )


def _chart(arms: Sequence[dict[str, Any]], axis: Axis) -> str:
    curves = [_mean_curve(arm, axis) for arm in arms]
    divisor, unit = report.scale(max(x for xs, _ in curves for x in xs), axis.unit)
    series = [
        Series(arm["name"], [x / divisor for x in xs], ys, i, dots=True)
        for i, (arm, (xs, ys)) in enumerate(zip(arms, curves, strict=True))
    ]
    shown = [y for _, ys in curves for y in ys[len(ys) // 5 :]]  # the first fall would flatten the rest
    return line_chart(
        series, title=f"loss against {axis.name}", x_label=f"{axis.name} ({unit})", y_label="validation loss",
        y_limits=(min(shown), max(shown)),
    )  # fmt: skip


def _tuning(results: dict[str, Any]) -> str:
    rows = []
    for arm in results["arms"]:
        for trial in arm["trials"]:
            values = ", ".join(f"{key} = {value}" for key, value in trial["values"].items())
            losses = ", ".join(number(loss) for loss in trial["val_loss"])
            chosen = arm["tuned"] is not None and all(arm["tuned"][k] == v for k, v in trial["values"].items())
            rows.append((escape(arm["name"]), escape(values), losses, "chosen" if chosen else ""))
    if not rows:
        return ""
    return report.section(
        "Tuning", _html_table(("arm", "tried", "validation loss", ""), rows),
        f"On the validation text, seeds {', '.join(map(str, results['tuning_seeds']))}; one setting after the other. "
        "The test text was not read.",
    )  # fmt: skip


def _runs(results: dict[str, Any]) -> str:
    lines = list(csv.reader(io.StringIO(table(results))))
    if not lines:
        return ""
    keep = [i for i, name in enumerate(lines[0]) if name not in ("study", "cpu", *results["versions"])]
    head, *rows = ([escape(line[i]) for i in keep] for line in lines)
    body = _html_table(head, rows, ' id="figures"') + '<button id="copy" type="button">Copy table</button>'
    return report.section("All runs", f"<details><summary>{len(rows)} runs</summary>{body}</details>")


def _facts(results: dict[str, Any]) -> str:
    corpus = results["corpus"] or {}
    text = {
        part: f"{corpus[part]['documents']:,} documents, {corpus[part]['bytes']:,} bytes"
        for part in ("train", "validation", "test")
        if corpus
    }
    source = corpus.get("corpus", {})
    facts = {
        "command": results["command"], "runs at a time": results["jobs"], "corpus": source.get("name"),
        "corpus sha256": source.get("sha256"), **text, **results["hardware"], **results["versions"],
    }  # fmt: skip
    orders = {run["seed"]: run["order"][:16] for arm in results["arms"] for run in arm["runs"]}
    facts |= {f"data order of seed {seed}": order for seed, order in orders.items()}
    rows = [(escape(str(key)), escape(_words(value))) for key, value in facts.items()]
    return report.section("Details", _html_table((), rows, ' class="facts"'))


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def plot(results: dict[str, Any], path: Path) -> None:
    """Mean validation loss over tokens and executed FLOPs, and the paired differences, as a picture for a document.

    Raises
    ------
    UserError
        If matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("a plot needs the package 'matplotlib': pip install 'vspdf[plot]'.") from None
    pairs = [pair for pair in results["paired"] if pair["mean"] is not None]
    drawing, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axis, panel in zip(MAIN_AXES[:2], axes, strict=False):
        shown = []
        for arm in results["arms"]:
            xs, ys = _mean_curve(arm, axis)
            panel.plot(xs, ys, marker=".", markersize=3, linewidth=1.3, label=f"{arm['name']} ({len(arm['runs'])})")
            shown.extend(ys[len(ys) // 5 :])
        if shown:
            panel.set_ylim(min(shown) - 0.02, max(shown))
        panel.set(xlabel=axis.name, ylabel="validation loss (nats a token)")
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=8, title="arm (seeds)", title_fontsize=8)
    for i, pair in enumerate(reversed(pairs)):
        clear = pair["low"] is not None and not pair["low"] <= 0 <= pair["high"]
        tone = "tab:blue" if clear else "tab:gray"
        if pair["low"] is not None:
            axes[2].plot((pair["low"], pair["high"]), (i, i), color=tone)
        axes[2].plot(pair["mean"], i, "o", color=tone)
    axes[2].axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes[2].set_yticks(range(len(pairs)), [f"{pair['a']} − {pair['b']}" for pair in reversed(pairs)], fontsize=8)
    axes[2].set(xlabel="difference of test losses, 95 % interval")
    try:
        drawing.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"the plot cannot be written to '{path}': {error}.") from None
    finally:
        pyplot.close(drawing)
