"""All that is to be known of a machine in one go: layers, steps, few tokens, masks, peers, memory, plans, ceilings.

The result is what README and docs draw their tables and plots from, one JSON file a machine; benchmarks/README.md
documents its form.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vspdf.bench import patterns, roofline
from vspdf.bench.candidates import why_missing
from vspdf.bench.linear import OPPONENT, SHAPES, SPARSITIES, bench_linear
from vspdf.bench.rounds import Budget, Timed
from vspdf.bench.step import bench_step
from vspdf.errors import UserError, did_you_mean
from vspdf.kernels import cpu, hardware
from vspdf.pattern import Pattern

SCHEMA = 1  # of the file; a reader refuses another
SECTIONS = ("layers", "peers", "masks", "few_tokens", "steps", "memory", "plans", "roofline")
FEW = (1, 4, 16, 64, 128, 256)
FEW_LAYERS = ((768, 3072), (3072, 768), (768, 768), (2048, 2048))
GPT2_LAYERS = 48  # sparse layers of a GPT-2 small: c_attn, c_proj, c_fc, c_proj of 12 blocks

_LEFT_OUT = ("summary", "break_even", "hardware", "versions")  # of a section: the rows tell, or the whole does

# Seconds of one problem at most, so that all sections take under 15 minutes on two cores.
LIMITS = {"layers": 3.0, "peers": 8.0, "masks": 3.0, "few_tokens": 0.6, "steps": 75.0}


def bench_suite(
    sections: Sequence[str] = SECTIONS,
    name: str | None = None,
    tiny: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures a machine.

    Parameters
    ----------
    sections : sequence of str
        Some of `SECTIONS`.
    name : str, optional
        What to call the machine; default: its processor's name.
    tiny : bool
        Everything on tiny layers, a round each: shows that it works, and says nothing of speeds.

    Returns
    -------
    dict
        ``schema``, ``machine`` (name, processor, cores, instruction sets, caches), ``versions``, ``date``, ``seconds``,
        ``tiny``, and ``sections``, each as its benchmark returns it.

    Raises
    ------
    UserError
        If a section is not known.
    """
    for section in sections:
        if section not in SECTIONS:
            raise UserError(f"section '{section}' is not known.{did_you_mean(section, SECTIONS)}")
    start, found = time.perf_counter(), {}
    for section in SECTIONS:
        if section in sections:
            progress(f"-- {section}, after {(time.perf_counter() - start) / 60:.1f} minutes")
            found[section] = {k: v for k, v in _MEASURES[section](tiny, progress).items() if k not in _LEFT_OUT}
    facts = hardware.hardware()
    name = name or cpu.cpu_name()
    return {
        "schema": SCHEMA,
        "machine": {
            "name": name, "id": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "machine", **facts,
            "caches": roofline.cache_bytes(), "memory": hardware.memory(),
        },
        "versions": hardware.versions(), "date": datetime.date.today().isoformat(),
        "seconds": time.perf_counter() - start, "tiny": tiny, "sections": found,
    }  # fmt: skip


def _budget(section: str, tiny: bool) -> Budget:
    return Budget(1) if tiny else Budget(seconds=LIMITS[section])


def _layers(tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Our kernels and dense in float32, and dense in its other forms, on one thread and on all."""
    shapes, sparsities = (((16, 32, 48),), (0.5, 0.9)) if tiny else (SHAPES, SPARSITIES)
    dense = [name for name in ("dense_onednn", OPPONENT) if not why_missing(name)]
    threads = [1] if tiny else None
    return bench_linear(
        shapes, sparsities, threads, _budget("layers", tiny), peers=False, candidates=dense, progress=progress
    )


def _peers(tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    shapes, sparsities = (((16, 32, 48),), (0.5, 0.9)) if tiny else (SHAPES[:1], SPARSITIES)
    threads = [1 if tiny else torch.get_num_threads()]
    return bench_linear(shapes, sparsities, threads, _budget("peers", tiny), progress=progress)


def _masks(tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Masks of every kind that ships, of one layer, at 75 and 90 %."""
    side, tokens, amounts = ((48, 32), 16, [0.75]) if tiny else ((3072, 768), 1024, [0.75, 0.9])
    kinds = [name for name in (*patterns.KINDS, "1:4", "1:8") if not tiny or name != "blocks"]
    drawn = [(name, p) for name in kinds for _, p in patterns.draw(name, [side], amounts)]
    given = [(f"{name} {p.sparsity:.0%}", p) for name, p in drawn]
    threads = [1 if tiny else torch.get_num_threads()]
    return bench_linear(
        threads=threads, budget=_budget("masks", tiny), peers=False, masks=given, tokens=[tokens], progress=progress
    )


def _few_tokens(tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    layers, counts = (((32, 48),), (1, 4)) if tiny else (FEW_LAYERS, FEW)
    shapes = [(tokens, n_in, n_out) for n_in, n_out in layers for tokens in counts]
    threads = [1 if tiny else torch.get_num_threads()]
    return bench_linear(shapes, [0.9], threads, _budget("few_tokens", tiny), peers=False, progress=progress)


def _steps(tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    size = (1, 16, 2, 8, 1) if tiny else (12, 768, 12, 512, 4)
    dtypes = ["float32"] + ([] if hardware.slow_bf16(torch.device("cpu")) else ["bfloat16"])
    return bench_step(
        *size,
        threads=1 if tiny else None,
        budget=_budget("steps", tiny),
        dtypes=dtypes,
        compiled=not tiny,
        progress=progress,
    )


def _memory(tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Bytes of a layer's training state by sparsity: values, gradient, moments, bits and plan."""
    side, rows = (48, 32) if tiny else (3072, 768), []
    for sparsity in SPARSITIES:
        pattern = Pattern.random(side, sparsity, seed=1)
        cpu.prepare([pattern])
        state = 16 * pattern.nnz  # float32: weight, gradient, both moments of AdamW
        plan = cpu.packed(pattern).nbytes + pattern.bits.nbytes
        rows.append(
            {
                "sparsity": sparsity, "out_features": side[0], "in_features": side[1],
                "dense_bytes": 16 * pattern.numel, "sparse_bytes": state + plan,
                "plan_bytes_per_weight": plan / pattern.nnz, "fraction": (state + plan) / (16 * pattern.numel),
            }
        )  # fmt: skip
    return {"rows": rows}


def _plans(tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Seconds to build the plans of all three products: of one layer on one thread, of a GPT-2 small on all."""
    side, rows, count = (48, 32) if tiny else (3072, 768), [], 4 if tiny else GPT2_LAYERS
    for sparsity in SPARSITIES:
        one = Pattern.random(side, sparsity, seed=2)
        many = [Pattern.random(side, sparsity, seed=10 + i) for i in range(count)]
        seconds = min(Timed.of(partial(_anew, [one])).seconds for _ in range(3))
        rows.append(
            {
                "sparsity": sparsity, "out_features": side[0], "in_features": side[1], "layer_seconds": seconds,
                "layers": count, "model_seconds": Timed.of(partial(_anew, many)).seconds,
                "threads": torch.get_num_threads(),
            }
        )  # fmt: skip
    return {"rows": rows}


def _anew(given: Sequence[Pattern]) -> None:
    for pattern in given:
        pattern.packed.pop("cpu", None)
    cpu.prepare(given)


def _roofline(tiny: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    cores = 1 if tiny else hardware.hardware()["cores"]
    return {str(n): roofline.ceilings(n, 0.02 if tiny else 0.3) for n in sorted({1, cores})}


_MEASURES: dict[str, Callable[[bool, Callable[[str], None]], dict[str, Any]]] = {
    "layers": _layers, "peers": _peers, "masks": _masks, "few_tokens": _few_tokens, "steps": _steps, "memory": _memory,
    "plans": _plans, "roofline": _roofline,
}  # fmt: skip
