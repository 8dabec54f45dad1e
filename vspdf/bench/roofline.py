"""The machine's ceilings, measured, and where each product lies below them.

A product that reads its operands once and writes its result once needs so many bytes; its useful FLOPs divided by them
are its intensity. It cannot be faster than the multiply-adds from registers, nor than its bytes at
the speed of the level that they come from (Williams et al., 2009).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vspdf.kernels import cpu

_SIZES = {"float32": 4, "bfloat16": 2}
_CACHES = {"L1": 32 << 10, "L2": 1 << 20}  # where the system does not tell
_MEMORY = 256 << 20  # bytes a thread, beyond any cache


def cache_bytes() -> dict[str, int]:
    """Bytes of each level of data cache, as one core sees it."""
    found = dict(_CACHES)
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with suppress(OSError, ValueError):
            if (folder / "type").read_text().strip() != "Instruction":
                size = re.fullmatch(r"(\d+)([KM]?)", (folder / "size").read_text().strip())
                if size:
                    scale = {"": 1, "K": 1 << 10, "M": 1 << 20}[size[2]]
                    found[f"L{int((folder / 'level').read_text())}"] = int(size[1]) * scale
    return dict(sorted(found.items()))


def ceilings(threads: int, seconds: float = 0.2) -> dict[str, Any]:
    """Multiply-adds from registers, and what is read a second from each level, with so many threads.

    Returns
    -------
    dict
        ``threads``, ``peak_gflops`` and ``gbytes_per_second`` by level ("L1", "L2", ..., "memory").
    """
    core = cpu.extension()
    # Half a level: what is read then comes from it and from none above or below.
    places = {level: size // 2 for level, size in cache_bytes().items()}
    last = max(places, key=lambda level: places[level])
    if last not in _CACHES:
        places[last] //= threads  # it is shared
    places["memory"] = _MEMORY
    return {
        "threads": threads, "peak_gflops": core.fma_peak(threads, seconds),
        "gbytes_per_second": {
            level: core.read_bandwidth(threads, nbytes, seconds) for level, nbytes in places.items()
        },
    }  # fmt: skip


def place(row: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """Where a row of `bench_linear` lies.

    Returns
    -------
    dict
        ``intensity`` (useful FLOPs a byte of operands and result, each counted once), ``roof_gflops`` (with operands
        from memory), ``roof_fraction`` of that, and ``level``: the farthest one that could feed it at the rate it had.
    """
    if not row["gflops_useful"]:
        return {"intensity": None, "roof_gflops": None, "roof_fraction": None, "level": None}
    tokens, n_in, n_out = row["tokens"], row["in_features"], row["out_features"]
    kept = round((1 - row["sparsity"]) * n_in * n_out)
    factor = 3 if row["product"] == "layer" else 1
    flops, nbytes = 2 * tokens * kept * factor, _SIZES[row["dtype"]] * (tokens * (n_in + n_out) + kept) * factor
    intensity, rate = flops / nbytes, row["gflops_useful"]
    speeds = machine["gbytes_per_second"]
    roof = min(machine["peak_gflops"], intensity * speeds["memory"])
    fed = [level for level, speed in speeds.items() if intensity * speed >= rate]
    return {
        "intensity": intensity,
        "roof_gflops": roof,
        "roof_fraction": rate / roof,
        "level": fed[-1] if fed else None,
    }


def add(result: dict[str, Any], threads: Sequence[int]) -> None:
    """Puts `ceilings` by threads into a result as ``roofline``, and into each row where it lies."""
    found = {str(count): ceilings(count) for count in threads}
    for row in result["rows"]:
        row.update(place(row, found[str(row["threads"])]))
    result["roofline"] = found
