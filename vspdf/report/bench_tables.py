"""Tables of a machine's benchmark, as README, docs, the page and the terminal show them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vspdf.draw import words
from vspdf.errors import UserError
from vspdf.files import read_json
from vspdf.report.tables import Table

SCHEMA = 1  # of `vspdf.bench.suite`
PRODUCTS = ("forward", "grad_input", "grad_values", "layer")
SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.99)
LABELS = {
    "vspdf": "vspdf", "auto": "auto", "dense_onednn": "dense by oneDNN", "dense_bf16": "dense bf16",
    "dense_mask": "dense x mask", "torch_csr": "torch.sparse CSR (MKL)", "torch_bsr": "torch.sparse BSR (MKL)",
    "scipy_csr": "scipy CSR (one thread)", "sparselab": "SparseLab",
}  # fmt: skip
DRAWN = tuple(name for name in LABELS if name != "auto")  # of pictures, in this order
_SPMM = ((1.4, 1.7), (2.7, 3.5), (5, 7), (7, 10), (12, 15))
GOALS = {  # must and aim by sparsity
    "forward": _SPMM,
    "grad_input": _SPMM,
    "grad_values": ((1.1, 1.5), (2, 2.8), (4, 5.5), (6, 8), (9, 12)),
    "layer": ((1.25, 1.6), (2.3, 3.2), (4.5, 6.2), (6.5, 9), (10, 13)),
}


class Noise(str):
    """A figure that is noise: grey where colours are."""

    grey = True


# -- files ------------------------------------------------------------------------------------------------------------


def read(file: Path) -> dict[str, Any]:
    """A machine's results, as `dump` wrote them.

    Raises
    ------
    UserError
        If the file is of another form.
    """
    body = read_json(file)
    if body.get("schema") != SCHEMA or not isinstance(body.get("sections"), dict):
        raise UserError(f"'{file}' is no result of vspdf bench suite (schema {SCHEMA}).")
    return body


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every machine's results in a folder, by the files' names."""
    return [read(file) for file in sorted(folder.glob("*.json"))]


def dump(result: dict[str, Any]) -> str:
    """Results as a file: figures in five digits, what is empty left out, a line for each row."""
    body = _short(result)
    rows: dict[str, str] = {}

    def kept(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: kept(value) for key, value in node.items()}
        if isinstance(node, list) and node and isinstance(node[0], dict):
            mark = f"@{len(rows)}@"
            rows[json.dumps(mark)] = "[\n" + ",\n".join(json.dumps(row) for row in node) + "\n]"
            return mark
        return node

    text = json.dumps(kept(body), indent=1)
    for mark, lines in rows.items():
        text = text.replace(mark, lines)
    return text + "\n"


def _short(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _short(value) for key, value in node.items() if value is not None and value is not False}
    if isinstance(node, list | tuple):
        return [_short(value) for value in node]
    return float(f"{node:.5g}") if isinstance(node, float) else node


# -- layers -----------------------------------------------------------------------------------------------------------


def _rows(result: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return result["sections"].get(section, {}).get("rows", [])


def _of(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _widest(rows: Sequence[dict[str, Any]]) -> str:
    """The product by which a candidate is shown: all three, or the forward product of one that has no more."""
    return "layer" if _of(rows, product="layer") else "forward"


def _possible(row: dict[str, Any]) -> bool:
    return row.get("possible", True) is not False and row.get("ratio_to_dense") is not None


def mean(rows: Sequence[dict[str, Any]]) -> float | None:
    """Geometric mean of the ratios of rows that are results."""
    ratios = [row["ratio_to_dense"] for row in rows if _possible(row)]
    return statistics.geometric_mean(ratios) if ratios else None


def _cell(rows: Sequence[dict[str, Any]], goal: tuple[float, float] | None = None) -> str:
    """The mean, with the least in brackets and what goal is met where one is given; grey where a row is noise."""
    found = mean(rows)
    if found is None:
        return "-" if rows else ""
    text = f"{found:.2f}x"
    if goal is not None:
        least = min(row["ratio_to_dense"] for row in rows if _possible(row))
        text += f" ({least:.2f})" if len(rows) > 1 else ""
        met = [bound for bound in goal if found >= bound and least >= 0.8 * goal[0]]
        text += " " + "\\*" * len(met) if met else ""
    return Noise(text) if any(row.get("noisy") for row in rows) else text


def sparsities(rows: Iterable[dict[str, Any]]) -> list[float]:
    """Those of rows, in order."""
    return sorted({row["sparsity"] for row in rows})


def layers_of_machines(results: Sequence[dict[str, Any]]) -> Table:
    """A whole layer on every machine, on one thread and on all, and below it dense in its other forms."""
    amounts, lines = sorted({s for result in results for s in sparsities(_rows(result, "layers"))}), []
    for result in results:
        for name in ("vspdf", "dense_onednn", "dense_bf16"):
            mine = _of(_rows(result, "layers"), candidate=name, product="layer")
            for threads in sorted({row.get("threads") or 0 for row in mine}):
                here = [row for row in mine if (row.get("threads") or 0) == threads]
                cells = [_cell(_of(here, sparsity=s)) for s in amounts]
                bold = [f"**{cell}**" if name == "vspdf" and cell else cell for cell in cells]
                lines.append((result["machine"]["name"], LABELS[name], str(threads or "-"), *bold))
    return Table("One linear layer", ("machine", "", "threads", *map(_percent, amounts)), lines)


def layers(result: dict[str, Any], goals: bool = False) -> Table | None:
    """Our kernels by product and threads over sparsity, geometric means over the shapes; other dense forms below."""
    rows = _rows(result, "layers")
    if not rows:
        return None
    amounts, lines = sparsities(rows), []
    candidates = [("vspdf", product) for product in PRODUCTS] + [("dense_onednn", "layer"), ("dense_bf16", "layer")]
    for candidate, product in candidates:
        mine = _of(rows, candidate=candidate, product=product)
        for threads in sorted({row.get("threads") or 0 for row in mine}):
            here = [row for row in mine if (row.get("threads") or 0) == threads]
            goal = GOALS[product] if goals and candidate == "vspdf" else None
            cells = []
            for s in amounts:
                aim = goal[SPARSITIES.index(s)] if goal and s in SPARSITIES else None
                cells.append(_cell(_of(here, sparsity=s), aim))
            name = product if candidate == "vspdf" else f"{LABELS[candidate]}, {product}"
            lines.append((name, str(threads or "-"), *cells))
    shapes = len({(row.get("tokens"), row.get("in_features"), row.get("out_features")) for row in rows})
    what = f"geometric mean over {shapes} layer shapes" if shapes > 1 else "one layer"
    return Table(f"One linear layer over dense float32, {what}", ("product", "threads", *map(_percent, amounts)), lines)


def peers(result: dict[str, Any]) -> Table | None:
    """Others on one layer: all three products, or the forward product of those that have no more."""
    rows = _rows(result, "peers")
    if not rows:
        return None
    amounts, lines = sparsities(rows), []
    for name in dict.fromkeys(row["candidate"] for row in rows if row["candidate"] not in ("dense", "auto")):
        mine = _of(rows, candidate=name)
        product = _widest(mine)
        cells = [_cell(_of(mine, product=product, sparsity=s)) for s in amounts]
        seconds = [row["prepare_seconds"] for row in mine if row.get("prepare_seconds")]
        prepared = f"{1e3 * max(seconds):.0f} ms" if seconds and max(seconds) > 5e-4 else ""
        lines.append((f"{LABELS.get(name, name)}, {product}", *cells, prepared))
    row = rows[0]
    size = f"{row['tokens']} tokens, {row['in_features']} -> {row['out_features']}, {row['threads']} threads"
    return Table(f"Peers: {size}", ("candidate", *map(_percent, amounts), "prepares"), lines)


def masks(result: dict[str, Any]) -> Table | None:
    """Masks of every kind: what they look like, and how much faster each product is."""
    rows, facts = _rows(result, "masks"), result["sections"].get("masks", {}).get("masks", {})
    lines = []
    for name in dict.fromkeys(row["mask"] for row in rows):
        mine, about = _of(rows, mask=name), facts[name]
        ours = [_cell(_of(mine, candidate="vspdf", product=product)) for product in PRODUCTS]
        lines.append(
            (
                name, f"{about['row_spread']:.2f}", f"{about['fullest_row']:.1f}x", str(about["empty_rows"]),
                f"{about['bandwidth']:.2f}", *ours, _cell(_of(mine, candidate="auto", product="layer")),
            )
        )  # fmt: skip
    if not lines:
        return None
    head = ("mask", "row spread", "fullest row", "empty rows", "bandwidth", *PRODUCTS, "auto, layer")
    row = rows[0]
    size = f"{row['tokens']} tokens, {row['in_features']} -> {row['out_features']}, {row['threads']} threads"
    return Table(f"Masks of every kind: {size}", head, lines)


def few_tokens(result: dict[str, Any]) -> Table | None:
    """Forward over dense by layer and tokens; in brackets the gradients of input and values."""
    rows = _of(_rows(result, "few_tokens"), candidate="vspdf")
    counts, lines = sorted({row["tokens"] for row in rows}), []
    for n_in, n_out in dict.fromkeys((row["in_features"], row["out_features"]) for row in rows):
        cells = []
        for tokens in counts:
            mine = _of(rows, in_features=n_in, out_features=n_out, tokens=tokens)
            found = [mean(_of(mine, product=product)) for product in PRODUCTS[:3]]
            forward, *others = ("-" if each is None else f"{each:.1f}" for each in found)
            noise = any(row.get("noisy") for row in mine)
            cells.append((Noise if noise else str)(f"{forward}x ({', '.join(others)})") if mine else "")
        lines.append((f"{n_in} -> {n_out}", *cells))
    title = "Few tokens, 90 %: forward (grad_input, grad_values)"
    return Table(title, ("layer", *map(str, counts)), lines) if lines else None


# -- steps, memory, plans, ceilings -----------------------------------------------------------------------------------


def steps(result: dict[str, Any]) -> Table | None:
    """Training steps: dense ones first, in every form that torch has."""
    rows, lines = _rows(result, "steps"), []
    for row in rows:
        what = "dense" if not row["sparsity"] else f"{row['sparsity']:.0%} sparse"
        form = [row.get("dtype", "float32")] + ["torch.compile"] * bool(row.get("compiled"))
        own = {"blocks": ["attention in blocks"], "own": ["as vspdf trains it"]}  # the former in earlier results
        form += own.get(row.get("attention", ""), []) if not row["sparsity"] else []
        form += ["by oneDNN"] * (row.get("dense_products") == "oneDNN" and not row["sparsity"])
        memory = row.get("memory")
        parts = ("sparsified", "model")
        shares = [f"{memory[key]['sparse'] / memory[key]['dense']:.0%}" if memory else "" for key in parts]
        seconds = f"{row['seconds_median']:.2f} s" if row.get("seconds_median") else ""
        lines.append((what, ", ".join(form), seconds, _cell([row]), _span(row), *shares))
    head = ("model", "in", "a step", "over dense float32", "95 % interval", "state of its layers", "of the model")
    return Table("A training step", head, lines) if lines else None


def _span(row: dict[str, Any]) -> str:
    return f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}" if row.get("ratio_low") else ""


def steps_of_machines(results: Sequence[dict[str, Any]]) -> Table:
    """One line for each machine and sparse model, and for the best dense opponent in each form."""
    lines = []
    for result in results:
        rows = _rows(result, "steps")
        dense = next((row for row in rows if not row["sparsity"]), {})
        for row in rows:
            form = row.get("dtype", "float32") + ", compiled" * bool(row.get("compiled"))
            form += ", by oneDNN" * (row.get("dense_products") == "oneDNN" and not row["sparsity"])
            if (not row["sparsity"] and form == "float32") or not _possible(row):
                continue
            memory = row.get("memory")
            share = f"{memory['sparsified']['sparse'] / memory['sparsified']['dense']:.0%} of dense" if memory else ""
            seconds = [f"{each['seconds_median']:.2f} s" if each.get("seconds_median") else "" for each in (dense, row)]
            what = f"{row['sparsity']:.0%} sparse" if row["sparsity"] else "dense"
            ratio = f"{row['ratio_to_dense']:.2f}x"
            bold = f"**{ratio}**" if row["sparsity"] and form == "float32" else ratio
            lines.append((result["machine"]["name"], f"{what}, {form}", *seconds, bold, share))
    head = ("machine", "model", "dense float32", "this", "faster", "training state of its layers")
    return Table("A whole training step", head, lines)


def memory(result: dict[str, Any]) -> Table | None:
    """Training state of a layer: values, gradient, both moments and plans against the same dense."""
    lines = [
        (_percent(row["sparsity"]), f"{row['dense_bytes'] / 2**20:.1f} MB", f"{row['sparse_bytes'] / 2**20:.1f} MB",
         f"{row['fraction']:.0%}", f"{row['plan_bytes_per_weight']:.0f}")
        for row in _rows(result, "memory")
    ]  # fmt: skip
    head = ("sparsity", "dense", "sparse, with plans", "of dense", "plan bytes a kept weight")
    return Table("Training state of a layer", head, lines) if lines else None


def plans(result: dict[str, Any]) -> Table | None:
    """How long plans take to build."""
    lines = [
        (
            _percent(row["sparsity"]), f"{1e3 * row['layer_seconds']:.0f} ms",
            f"{row['model_seconds']:.2f} s for {row['layers']}" if "model_seconds" in row else "", str(row["threads"]),
        )
        for row in _rows(result, "plans")
    ]  # fmt: skip
    return Table("Plans", ("sparsity", "a layer, one thread", "many layers", "on threads"), lines) if lines else None


def ceilings(result: dict[str, Any]) -> Table | None:
    """The machine's multiply-adds and bandwidths."""
    found = result["sections"].get("roofline", {})
    levels = list(dict.fromkeys(level for each in found.values() for level in each["gbytes_per_second"]))
    lines = [
        (threads, f"{each['peak_gflops']:.0f}", *(f"{each['gbytes_per_second'].get(level, 0):.0f}" for level in levels))
        for threads, each in found.items()
    ]
    return Table("Ceilings", ("threads", "GFLOP/s", *(f"{level}, GB/s" for level in levels)), lines) if lines else None


def _percent(sparsity: float) -> str:
    return f"{sparsity:.0%}"


ALL: dict[str, Callable[[dict[str, Any]], Table | None]] = {
    "layers": layers, "peers": peers, "masks": masks, "few_tokens": few_tokens, "steps": steps, "memory": memory,
    "plans": plans, "roofline": ceilings,
}  # fmt: skip


def tables(result: dict[str, Any]) -> list[Table]:
    """Every table of a machine's results that has rows."""
    return [table for make in ALL.values() if (table := make(result)) is not None]


def curve_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What a picture of a machine shows: the layer that peers were timed on where they were, on all threads."""
    rows = _rows(result, "peers") or _rows(result, "layers")
    most = max((row.get("threads") or 0 for row in rows), default=0)
    return [row for row in rows if (row.get("threads") or 0) == most]


def curve(rows: Sequence[dict[str, Any]], candidate: str) -> tuple[str, list[tuple[float, float]]]:
    """Points (sparsity, speed-up) of a candidate, and of which product: "layer", or "forward" where it has no more."""
    mine = _of(rows, candidate=candidate)
    product = _widest(mine)
    return product, [(s, ratio) for s in sparsities(mine) if (ratio := mean(_of(mine, product=product, sparsity=s)))]


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Speed-up of a layer over sparsity by candidate; of one without all products, of its forward product."""
    found = {}
    for name in DRAWN:
        product, points = curve(rows, name)
        if points:
            found[LABELS[name] + (", forward" if product == "forward" else "")] = points
    return found


def about(result: dict[str, Any], named: bool = False) -> str:
    """The machine in a line; with `named` in bold by its own name."""
    machine, versions = result["machine"], result.get("versions", {})
    parts = [f"**{machine['name']}**" if named else str(machine.get("cpu") or machine["name"])]
    if machine.get("cores"):
        parts.append(f"{machine['cores']} cores")
    if machine.get("isas"):
        parts.append(machine["isas"][0])
    if machine.get("memory"):
        parts.append(f"{words.size(machine['memory'])} of memory")
    if versions.get("torch"):
        parts.append(f"torch {versions['torch']}")
    return ", ".join(parts) + (f"; {machine['note']}" if machine.get("note") else "")
