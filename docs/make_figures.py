"""Draws the figures of these pages with vspdf itself: `python docs/make_figures.py [NAME ...]`, all without a name.

Transparent, in colours that read on white and on dark pages. `switch` trains: half a minute. `evidence` also fills in
the tables that pages take from the results of studies.
"""

from __future__ import annotations

import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import vspdf
from vspdf import ledger, shapes
from vspdf.compare import definition
from vspdf.compare import results as of_studies
from vspdf.config import loading
from vspdf.draw import words
from vspdf.errors import UserError
from vspdf.plan import law
from vspdf.plan.planner import plan
from vspdf.report import bench_tables, study_page, tables, weights
from vspdf.runs.folder import read
from vspdf.train.trainer import train

IMAGES = Path(__file__).parent / "images"
GREY, BLUE, ORANGE, GREEN, PINK = "#808a94", "#2f84cc", "#e0701f", "#239a72", "#c25fa5"
LARGE = "cerebras-gpt-6.7b"

plt.rcParams.update({
    "svg.hashsalt": "vspdf",  # the same figure is the same file
    "savefig.transparent": True,
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 1.6, "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PINK]),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                     "ytick.color"), GREY),
})  # fmt: skip


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def stages() -> None:
    """Kept weights over tokens: the area is what the run's sparse layers cost."""
    runs = {
        "dense": plan(LARGE, sparsity=0.0),
        "SPDF, 75 %": plan(LARGE, sparsity=0.75),
        "Variable SPDF, add-on": plan(LARGE, sparsity=0.9, effective=0.75),
        "Variable SPDF, fixed budget": plan(LARGE, sparsity=0.9, effective=0.75, split="fixed-budget"),
    }
    figure, axes = plt.subplots(1, 4, figsize=(8.6, 1.9), sharex=True, sharey=True)
    for axis, (name, found) in zip(axes, runs.items(), strict=True):
        start = 0.0
        for phase in found.phases:
            end = start + phase.tokens / 1e9
            axis.fill_between([start, end], 100 * (1 - phase.sparsity), color=BLUE if phase.sparsity else ORANGE, lw=0)
            start = end
        axis.set_title(f"{name}\narea: {1 - found.effective_sparsity:.0%}", loc="left")
        axis.set_xlabel("billions of tokens")
    axes[0].set_ylabel("weights that exist, %")
    axes[0].set_ylim(0, 105)
    save(figure, "stages")


def products() -> None:
    """The three products of a layer on one mask: what is read and written."""
    pattern = vspdf.Pattern.random((10, 14), 0.75, seed=3)
    mask = pattern.mask().numpy()
    full = lambda rows, columns: np.ones((rows, columns))  # noqa: E731
    lines = [
        ("forward", [("X", full(8, 14), BLUE), ("Wᵀ", mask.T, ORANGE), ("Y", full(8, 10), GREEN)]),
        ("grad_input", [("grad_output", full(8, 10), BLUE), ("W", mask, ORANGE), ("grad_input", full(8, 14), GREEN)]),
        ("grad_values", [("grad_outputᵀ", full(10, 8), BLUE), ("X", full(8, 14), BLUE), ("grad_values", mask, GREEN)]),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 2.1))
    for axis, (name, parts) in zip(axes, lines, strict=True):
        left = 0.0
        for (label, cells, colour), sign in zip(parts, ("·", "=", ""), strict=True):
            rows, columns = cells.shape
            image = np.ma.masked_equal(cells, 0)
            axis.imshow(image, cmap=ListedColormap([colour]), extent=(left, left + columns, -rows, 0))
            axis.add_patch(plt.Rectangle((left, -rows), columns, rows, fill=False, ec=GREY, lw=0.8))
            axis.text(left + columns / 2, 1.1, label, ha="center", fontsize=7.5)
            axis.text(left + columns + 2.5, -rows / 2, sign, ha="center", va="center", fontsize=12)
            left += columns + 5
        axis.set(xlim=(-1, left), ylim=(-15, 4), title=name)
        axis.axis("off")
    save(figure, "products")


def savings() -> None:
    """What "saved" means: by convention for the published recipe, and by size where attention and vocabulary stay."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 2.7), width_ratios=(1, 1.15))
    table = plan(f"{LARGE}-variable").by_convention()
    bars = left.barh(list(table), [100 * row["saved_fraction"] for row in table.values()], color=BLUE)
    left.bar_label(bars, fmt="%.1f %%", padding=3, color=GREY)
    left.invert_yaxis()
    left.set(xlim=(0, 95), xlabel="FLOPs saved by the 6.7B recipe, %")
    sparsity = np.linspace(0, 0.99, 100)
    for name in ("cerebras-gpt-111m", "cerebras-gpt-1.3b", "cerebras-gpt-13b"):
        shape = shapes.named_shape(name)
        cost = np.array([ledger.flops_per_token(shape, s) for s in sparsity])
        right.plot(sparsity, cost[0] / cost, label=name.removeprefix("cerebras-gpt-").upper())
    right.plot(sparsity, 1 / (1 - sparsity), "--", color=GREY, label="sparse layers alone")
    right.set(ylim=(1, 10), xlabel="sparsity", ylabel="times fewer FLOPs (vspdf)")
    right.legend(title="Cerebras-GPT")
    save(figure, "savings")


def switch() -> None:
    """A small real run through its switch: loss, and how far revived weights moved."""
    overrides = [
        "model={n_layer: 2, d_model: 128, n_head: 4, sequence_length: 128, init_std: 0.045}",
        "optimizer.lr=3.0e-3", "train.eval_every=50", "train.sample_tokens=0", "train.measure_dense=0",
        "phases=[{name: sparse, sparsity: 0.9, steps: 1000, lr_multiple: 3}, {name: dense, steps: 200}]",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(loading.load("quickstart", [*overrides, f"run_dir={folder}/run"]), say=lambda line: None)
        (run,) = read([Path(folder, "run")])
        assert run.checkpoint is not None
        kept, revived = weights.magnitudes(run.checkpoint / "model.safetensors", run.patterns)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 2.5))
    steps, losses = zip(*((line["step"], line["val_loss"]) for line in run.evaluations), strict=True)
    left.plot(steps, losses, marker="o", ms=3)
    left.axvline(1000, ls="--", lw=1, color=GREY)
    left.axvspan(0, 1000, color=BLUE, alpha=0.12, lw=0)
    left.text(1010, max(losses), " dense", va="top")
    left.set(xlabel="step", ylabel="validation loss, nats a byte", xlim=(0, 1200))
    for name, values in {"kept from the start": kept, "revived at step 1,000": revived}.items():
        share, edges = np.histogram(np.log10(values[values > 0]), bins=np.linspace(-5, 0, 81))
        right.stairs(100 * share / len(values), 10**edges, label=name, lw=1.6)
    right.set(xscale="log", xlabel="magnitude of a weight at the end", ylabel="% of weights")
    right.set_ylim(top=1.35 * right.get_ylim()[1])
    right.legend(loc="upper left")
    save(figure, "switch")


# A study's results between two comments: all of them ("results"), or the first table with a picture ("summary").
# Or a table of every machine that was benchmarked ("bench"), of what kept weights were worth ("worth"), or of who wins
# in equal time ("equal-time").
PLACE = re.compile(r"(<!-- (results|summary|bench|worth|equal-time): ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
DOCS = Path(__file__).parent
PAGES = (DOCS / "evidence.md", DOCS / "performance.md", DOCS.parent / "README.md")
MACHINES = DOCS.parent / "benchmarks" / "results"


@cache
def results_of(study: str) -> dict[str, Any]:
    """What is kept of a study that ships; every value of every arm is checked for it, which takes a while."""
    return of_studies.read(definition.load(study))


def kept(name: str | Path) -> dict[str, Any] | None:
    """Results of a study, if there are runs among them."""
    try:
        found = results_of(Path(name).stem)
    except UserError:
        return None
    return found if any(arm["runs"] for arm in found["arms"]) else None


def machines(table: str) -> str:
    """A table of `vspdf.report.bench_tables` for every machine that has one, in Markdown."""
    results = bench_tables.read_all(MACHINES)
    if table.endswith("-of-machines"):
        return getattr(bench_tables, table.replace("-", "_"))(results).markdown()
    make = {**bench_tables.ALL, "layers": lambda result: bench_tables.layers(result, goals=True)}[table]
    made = [(result, found) for result in results if (found := make(result)) is not None]
    return "\n".join(f"{bench_tables.about(result, named=True)}:\n\n{found.markdown()}\n" for result, found in made)


def worths() -> tables.Table:
    """What a kept weight was worth, study by study, and on the line through all of them."""
    lines = law.worth()
    rows = [
        (point.study, point.arm, f"{point.seen:.0f}", f"{point.m:.2f}", f"{lines[point.method].at(point.seen)[1]:.2f}")
        for point in sorted(law.points(), key=lambda point: (point.method, point.seen))
    ]
    return tables.Table("worth", ("study", "arm", "bytes a kept weight", "M", "on the line"), rows)


# What was to be best, the study, its sparse arm, and the best dense arm of it; None where a dense model of equal steps
# lies between arms.
EQUAL_TIME = (
    ("a model of 1.57M weights", "same-size", "set-75", "dense"),
    ("", "same-size", "ramp", "dense"),
    ("", "same-size", "variable", "dense"),
    ("any model, 10M bytes of text", "multiplier", "set-then-dense", None),
    ("", "multiplier", "set-75", None),
    ("any model of 0.41 MB", "size-cap", "set", "dense-l2"),
    ("any model, in bfloat16", "frontier-bf16", "set-then-dense-192", "dense-128"),
    ("any model", "frontier-5min", "set-then-dense-192", "dense-128"),
    ("", "frontier-5min", "set-then-dense-192", "dense-192-bf16"),
    ("", "frontier-256", "set-192", "dense-128"),
    ("", "frontier-longer", "set-then-dense-160", "dense-128"),
    ("", "frontier-20min", "set-then-dense-256", "dense-192"),
)


def equal_time() -> tables.Table:
    """Sparse models against the dense ones that one would train instead, given as much of a core."""
    rows = []
    for best, study, sparse, dense in EQUAL_TIME:
        results = results_of(study)
        took = tables.mean(next(arm for arm in results["arms"] if arm["name"] == sparse), "cpu_seconds")
        if dense is None:
            (each,) = (each for each in results["multipliers"] if each["method"] == sparse)
            pair = each["at_equal_time"] | {"seeds": each["seeds"]}
        else:
            (pair,) = (each for each in results["paired"] if (each["a"], each["b"]) == (sparse, dense))
        rows.append((
            best, study, f"{took / 60:.0f}", f"{sparse} − {dense or 'dense'}", words.number(pair["mean"], "+.3f"),
            words.between(pair, "+.3f"), str(len(pair["seeds"])), pair["verdict"],
        ))  # fmt: skip
    head = ("the best …", "study", "minutes", "a − b", "nats a byte", "95 % interval", "seeds", "a is")
    return tables.Table("equal time", head, rows)


def filled(page: Path) -> str:
    """A page with its places filled from the results that are kept; with a line where there are none."""

    def fill(place: re.Match[str]) -> str:
        begin, what, name, end = place.groups()
        if what == "bench":
            return f"{begin}{machines(name)}\n{end}"
        if what == "worth":
            return f"{begin}{worths().markdown()}\n{end}"
        if what == "equal-time":
            return f"{begin}{equal_time().markdown()}\n{end}"
        results = kept(name)
        if results is None:
            return f"{begin}No results are kept of this study yet.\n{end}"
        image = "" if page.parent.name == "docs" else "docs/"
        picture = f"![Losses and differences of study {name}]({image}images/study-{name}.svg)\n"
        if what == "results":
            return f"{begin}{tables.markdown(results)}\n{picture}{end}"
        return f"{begin}{tables.tables(results)[0].markdown()}\n\n{picture}{end}"

    return PLACE.sub(fill, page.read_text())


def evidence() -> None:
    """Losses and paired differences of the studies whose results are kept; their tables in the pages."""
    for path in loading.shipped("studies"):
        if results := kept(path):
            study_page.plot(results, IMAGES / f"study-{path.stem}.svg")
    for page in PAGES:
        page.write_text(filled(page))


def worth() -> None:
    """What a kept weight is worth over the text it has seen, and the lines that `vspdf plan --hours` takes."""
    figure, axis = plt.subplots(figsize=(5.6, 2.9))
    lines = law.worth()
    for method, colour in zip(law.METHODS, (ORANGE, BLUE, GREEN), strict=True):
        mine = [point for point in law.points() if point.method == method]
        axis.scatter([p.seen for p in mine], [p.m for p in mine], color=colour, s=18, label=f"{method}, by study")
        seen = np.geomspace(min(p.seen for p in mine) / 1.2, max(p.seen for p in mine) * 1.2, 50)
        axis.plot(seen, [lines[method].at(x)[1] for x in seen], color=colour)
        for point in mine:
            axis.annotate(f" {point.study}", (point.seen, point.m), fontsize=6.5, color=GREY)
    axis.set(xscale="log", yscale="log", xlabel="bytes of text a kept weight", ylabel="dense weights it counts for, M")
    for way in (axis.xaxis, axis.yaxis):
        way.set_major_formatter(lambda value, _: f"{value:g}")
        way.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axis.legend(loc="upper right")
    save(figure, "worth")


def performance() -> None:
    """Speed-up of a layer over sparsity on every machine, and the machines' tables in the pages."""
    results = [r for r in bench_tables.read_all(MACHINES) if r["sections"].get("layers", {}).get("rows")]
    columns = 2 if len(results) == 4 else min(3, len(results))
    rows_of = -(-len(results) // columns)
    size = (8.6, 0.3 + 2.9 * rows_of)
    figure, axes = plt.subplots(rows_of, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    names = [bench_tables.LABELS[name] for name in bench_tables.DRAWN]
    for axis, result in zip(axes.flat, results, strict=False):
        rows = bench_tables.curve_rows(result)
        amounts = bench_tables.sparsities(rows)
        axis.plot([100 * s for s in amounts], [1 / (1 - s) for s in amounts], "--", color=GREY, label="ideal 1/(1−s)")
        for label, points in bench_tables.curves(rows).items():
            x, y = zip(*points, strict=True)
            i = names.index(label.removesuffix(", forward"))
            style = {"color": (BLUE, ORANGE, GREEN, GREY, PINK, GREY, GREY, GREY)[i], "marker": "oosXv^D*"[i]}
            axis.plot([100 * s for s in x], y, ms=3.5, label=label, **style, lw=2 if label.startswith("vspdf") else 1.1)
        axis.axhline(1, color=GREY, lw=0.6)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}x")
        axis.set_title(result["machine"]["name"], loc="left")
        axis.set_xlabel("sparsity, %")
    axes[0][0].set_ylim(0.06, 110)
    for axis in axes[:, 0]:
        axis.set_ylabel("times as fast as dense float32")
    pairs = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.flat]
    entries = {label: handle for pair in pairs for handle, label in pair}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=4)
    save(figure, "speedup")
    for page in PAGES:
        page.write_text(filled(page))


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    drawings = {draw.__name__: draw for draw in (stages, products, savings, switch, evidence, worth, performance)}
    for name in sys.argv[1:] or drawings:
        drawings[name]()
        print(f"{name}: {drawings[name].__doc__}")
