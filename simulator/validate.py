"""The simulator against every published measurement it knows, with the error of each."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from vspdf.errors import UserError
from vspdf.ledger import training_flops
from vspdf.shapes import Shape, named_shape
from vspdf.simulator import machine as machines
from vspdf.simulator import simulate
from vspdf.simulator.aggregate import step
from vspdf.simulator.aggregate.model import Model, Transformer
from vspdf.simulator.events import programs
from vspdf.simulator.events.fabric import vector_cycles
from vspdf.simulator.machine import Machine

DATA = Path(__file__).parent / "data"
STEP = "step-"  # of the ids of training steps
SECONDS = 2.0  # a case may take at the event level, unless that level is asked for
Say = Callable[[str], None]


def table(name: str) -> list[dict[str, str]]:
    """A table of measurements that ships with the package."""
    with (DATA / name).open() as file:
        return list(csv.DictReader(file))


def facts() -> dict[str, Any]:
    """Reads the cases, their tolerances, and which rows calibrated what."""
    return OmegaConf.to_container(OmegaConf.load(DATA / "cases.yaml"))  # type: ignore[return-value]


def _level(work: simulate.Work, level: str) -> str:
    if level != "auto":
        return level
    return "event" if work.seconds <= SECONDS else "aggregate"


def _figure(work: simulate.Work, level: str, key: str) -> tuple[str, float]:
    chosen = _level(work, level)
    return chosen, float((work.event()[1] if chosen == "event" else work.aggregate)[key])


def _within(about: dict[str, Any], case: str, key: Any, published: float, found: tuple[str, float]) -> dict[str, Any]:
    level, simulated = found
    error = simulated / published - 1
    set_by_it = about.get("calibrated", {}).get(key)
    role = "calibrated" if set_by_it else "predicted"
    return {
        "case": f"{about['title']}{case}", "published": published, "simulated": simulated, "error": error,
        "tolerance": about["tolerance"], "role": role, "level": level,
        "passed": bool(abs(error) <= about["tolerance"]), "calibrates": set_by_it or "",
    }  # fmt: skip


def _beyond(about: dict[str, Any], case: str, bound: dict[str, float], found: tuple[str, float]) -> dict[str, Any]:
    """A bound to keep instead of a figure to meet; the error is how far it is missed."""
    level, simulated = found
    low = "at_least" in bound
    published = bound["at_least"] if low else bound["at_most"]
    missed = max(0.0, published - simulated) if low else max(0.0, simulated - published)
    return {
        "case": f"{about['title']}{case}: at {'least' if low else 'most'}", "published": published,
        "simulated": simulated, "error": missed / published, "tolerance": 0.0, "role": "predicted", "level": level,
        "passed": missed == 0, "calibrates": "",
    }  # fmt: skip


def _step(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    """Samples a second of a dense training step at the first clock."""
    shape = Transformer.of(named_shape(about["model"]), predicted=about.get("predicted_positions", 1.0))
    systems = about.get("systems", 1)
    model = Model.uniform(shape.at(about["sequence"]), about["batch"], 0.0, systems)
    seconds = step.search(machine, machine.clock, model).seconds
    case = f", {about['model']}, {about['sequence']} tokens, batch {about['batch']}, systems: {systems}, samples/s"
    yield _within(about, case, "samples", float(about["published"]), ("aggregate", about["batch"] / seconds))


def _utilisation(machine: Machine, case: dict[str, Any]) -> float:
    """Useful FLOPs a second of one system."""
    model = Model.uniform(named_shape(case["model"]), case["batch"], 0.0, case["systems"])
    return model.flops() / step.search(machine, machine.clock, model).seconds / case["systems"]


def _relative(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    alone = machine.override({"step_overhead": 0.0})
    one = _utilisation(alone, about["reference"])
    for role in ("cases", "open"):
        for name, case in about[role].items():
            found = ("aggregate", _utilisation(alone, case) / one)
            yield _within(about, f", {name}", name, case["published"], found) | {"open": role == "open"}


def _scaling(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    """A trillion parameters, a sequence a system: weak scaling, by latency and the jitter that the machine has."""
    shape = Shape(n_layer=100, d_model=28_672, n_head=224, d_ff=4 * 28_672, vocab_size=50_257, sequence_length=2048)
    wafer = machine
    if machine.parameters["name"].value == machines.FIRST:  # the measurement is of CS-3: settings go on top of that one
        wafer = machines.load("cs3", {key: value for key, value in machine.settings.items() if key != "name"})
    seconds = [step.search(wafer, wafer.clock, Model.uniform(shape, n, 0.0, n)).seconds for n in (1, 16)]
    yield _beyond(about, "", about, ("aggregate", 16 * seconds[0] / seconds[1]))


def _sgemm(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    rate = simulate.gemm(machine, "summa", "750x750", 33_000).aggregate["tflops"]
    yield _within(about, "", None, about["published"], ("aggregate", next(iter(rate.values()))))


def _strides(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    length = 4096
    for stride, width in about["strides"].items():
        sums = (4, stride or 1)  # a word off, as the appendix advises; sums in one place would be no vector
        operands = (sums, sums, (0, stride))
        cycles = vector_cycles(machine, "fmac", *operands, length=length, half=True)
        yield _within(about, f", stride {stride}", None, width, ("event", length / cycles)) | {"role": "definition"}


def _vector(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    for row, line in enumerate(table(about["table"])):
        mode = {"2": "conflict", "1": "single", "0": "pair"}[line["cycles_per_element_mode"][0]]
        run = programs.vector_op(machine, int(line["length"]), mode)
        case = f", {line['length']} elements, {mode}"
        yield _within(about, case, row, float(line["measured_cycles"]), ("event", run.cycles))


def _reduce(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    for row, line in enumerate(table(about["table"])):
        work = simulate.reduce(machine, 512, 4096, int(line["group_size"]))
        found = _figure(work, level, "cycles")
        yield _within(about, f", groups of {line['group_size']}", row, float(line["measured_cycles"]), found)


def _kind(line: dict[str, str]) -> tuple[float, ...]:
    """A PE's tile, the columns of B and the density: what a product's cycles hang on."""
    n, k, width, height = (int(line[key]) for key in ("N", "K", "width", "height"))
    return n / height, k / width, int(line["M"]), float(line["density"])


def _product(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    names = about["table"] if isinstance(about["table"], list) else [about["table"]]
    for name in names:
        format = {"gemm.csv": "dense"}.get(name, name.removesuffix(".csv"))
        known = {_kind(table(name)[row]) for row in about.get("calibrated", {})}
        for row, line in enumerate(table(name)):
            n, k, m, nnz = (int(line[key]) for key in ("N", "K", "M", "nnz_per_pe"))
            grid = f"{line['width']}x{line['height']}"
            stored = (None, None) if format == "dense" else (float(line["density"]), nnz)
            work = simulate.spmm(machine, format, grid, n, k, m, *stored)
            found = _figure(work, level, "cycles_max")
            case = f", {format} {grid}, {n}x{k}x{m}, {line['density']} %"
            made = _within(about, case, row, float(line["max_cycles"]), found)
            if made["role"] == "predicted" and _kind(line) in known:
                made["role"] = "repeated"
            yield made


def _summa(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    a, b = (np.random.default_rng(seed).standard_normal((56, 56)).astype(np.float32) for seed in (0, 1))
    phases = programs.summa(machine, a, b, 4).phases
    yield _within(about, ", compute", "compute", float(about["compute"]), ("event", phases["compute"]))
    found = ("event", float(phases["broadcast_step"]))
    yield _within(about, ", both broadcasts of a step", "broadcast", float(about["broadcast"]), found)


def overhead(machine: Machine, sparsity: float, seed: int = 0) -> float:
    """Share of a streamed layer's time that multiplies nothing, on a small region with a real layer's tile."""
    columns, rows, features, outputs, tokens = 8, 2, 96, 48, 128
    generator = np.random.default_rng(seed)
    mask = generator.random((outputs, columns * features)) >= sparsity
    w = generator.standard_normal(mask.shape).astype(np.float32) * mask
    x = generator.standard_normal((columns * features, rows * tokens)).astype(np.float32)
    run = programs.stream_layer(machine, w, mask, x, columns, rows)
    return 1 - float(run.region.stats["fmacs"].mean()) / machine.fmac_fp16_rate / run.cycles


def _collapse(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    yield _beyond(about, "", about, ("event", overhead(machine, 0.999)))


def _mesh(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    for algorithm in ("meshgemm", "summa", "cannon"):
        work = simulate.gemm(machine, algorithm, "720x720", 2880)
        yield _beyond(about, f", {algorithm}", about[algorithm], ("aggregate", work.aggregate["efficiency"]))


def _flops(about: dict[str, Any], machine: Machine, level: str) -> Iterator[dict[str, Any]]:
    dense, sparse = (training_flops("gpt3-xl", tokens=1, sparsity=s, convention="spdf") for s in (0.0, 0.75))
    yield _within(about, "", None, about["published"], ("ledger", dense / sparse)) | {"role": "definition"}


CASES: dict[str, Callable[[dict[str, Any], Machine, str], Iterator[dict[str, Any]]]] = {
    "V1": _vector, "V2": _reduce, "V4": _product, "V5": _product, "V6": _product, "V7": _product, "V8": _summa,
    "V9": _collapse, "V10": _mesh, "V11": _flops, "V12": _relative, "V13": _sgemm, "V14": _strides, "V15": _scaling,
}  # fmt: skip


def validate(
    machine: Any = "cs2", settings: Any = (), level: str = "auto", only: list[str] | None = None, say: Say | None = None
) -> dict[str, Any]:
    """Computes every published case anew.

    Parameters
    ----------
    level : {"auto", "event", "aggregate"}
        "auto": the event level wherever that ends within a few seconds. "event" takes hours on the largest grids.
    only : list of str, optional
        Some of the cases, e.g. ["V1", "V4"].
    say : callable, optional
        Takes a line when a case is done.

    Returns
    -------
    dict
        ``cases``, each with id, case, published, simulated, error, tolerance, role, level, passed; ``passed`` of all.
        Role "calibrated": this row set a parameter. "repeated": its tile, columns and density are those of such a row.
        "predicted": neither. "definition": it checks the FLOP ledger or a published rule. ``known_misses`` are
        published figures that are not met and not tuned away; ``steps`` has the errors of the training steps (ids
        ``step-...``).

    Raises
    ------
    UserError
        For an unknown case, level or machine.
    """
    chosen = machines.load(machine, settings)
    simulate.check_level(level)
    known = facts()
    cases: list[dict[str, Any]] = []
    missed: list[dict[str, Any]] = []
    for asked in only or known:
        name = next((name for name in known if name.lower() == asked.lower()), asked)
        if name not in known:
            raise UserError(f"unknown case '{name}': expected some of {', '.join(known)}.")
        about = known[name]
        compute = _step if name.startswith(STEP) else CASES[name]
        found = [{"id": name, "title": about["title"]} | case for case in compute(about, chosen, level)]
        mine = [case for case in found if not case.pop("open", False)]
        missed += [case for case in found if case not in mine]
        cases += mine
        if say:
            passed = sum(case["passed"] for case in mine)
            how = f"within {about['tolerance']:.0%}" if "tolerance" in about else "kept"
            say(f"{name} {about['title']}: {passed} of {len(mine)} {how}")
    views = {name: about["view"] for name, about in known.items() if "view" in about}
    steps = [abs(case["error"]) for case in cases if case["id"].startswith(STEP)]
    errors = {"mean_error": sum(steps) / len(steps), "largest_error": max(steps)} if steps else {}
    return {
        **chosen.said(), "cases": cases, "passed": all(c["passed"] for c in cases),
        "chosen_in_view": views, "known_misses": missed,
        "steps": errors,
    }  # fmt: skip
