"""Dense products in float32 by whichever of torch's two libraries knows the processor: MKL, or oneDNN.

torch multiplies float32 matrices by MKL, which leaves half of AMD's 512-bit units idle; oneDNN, which torch ships too,
is then twice as fast. The choice follows from the processor, not from timing, so that a run that resumes stays equal to
the last bit. Products of fewer than a few million multiply-adds lose by it: oneDNN looks one up for 10 us.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

_WIDE = 26  # the first family of AMD's with 512-bit units


@cache
def library() -> str:
    """ "oneDNN" or "MKL": who is the faster with dense float32 matrices on this CPU.

    oneDNN on AMD's processors with 512-bit units, family 26 (Zen 5) and later, where it keeps all digits: a Zen 4 has
    AVX-512 on 256-bit units, which MKL fills. ``ATEN_CPU_CAPABILITY=avx2``, which holds torch to AVX2, and
    ``VSPDF_ISA=avx2``, which holds the sparse kernels, hold this to MKL.
    """
    there = torch.backends.mkldnn.is_available() and hasattr(torch.backends.mkldnn, "matmul")  # torch >= 2.9
    held = torch.backends.cpu.get_cpu_capability() != "AVX512" or (os.environ.get("VSPDF_ISA") or "avx512") != "avx512"
    vendor, family = processor()
    known = there and not held and vendor == "AuthenticAMD" and family >= _WIDE
    return "oneDNN" if known and _keeps_digits() else "MKL"


@cache
def processor() -> tuple[str, int]:
    """Vendor and family; "" and 0 where the system does not tell."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return facts.get("vendor_id", ""), int(facts.get("cpu family", 0))


@contextlib.contextmanager
def faster() -> Iterator[None]:
    """Inside, torch multiplies float32 matrices on CPUs by `library`, single ones and batches; else by MKL.

    Equal up to rounding. It is a setting of the process, as it was before when the context ends, the last one of all
    threads'.
    """
    if library() == "MKL":
        yield
    else:
        with _onednn:
            yield


class _OneDNN:
    """torch asks oneDNN where bfloat16 is allowed within a product. oneDNN has such a one for AMX alone, and multiplies
    in full float32 elsewhere, which is tried before it is believed.

    The setting is the process's, contexts are the threads': the first to enter notes what was set, the last to leave
    restores it. Were each to save and restore by itself, the one that entered second and left last would leave it set.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, "none"

    def __enter__(self) -> None:
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        with self.lock:
            if self.inside == 0:
                self.before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                torch.backends.mkldnn.matmul.fp32_precision = self.before  # type: ignore[attr-defined]


_onednn = _OneDNN()


def _keeps_digits() -> bool:
    x = torch.linspace(-1, 1, 2 * 64 * 64).view(2, 64, 64)
    with _onednn:
        found = torch.bmm(x, x)
    exact = x.double() @ x.double()
    return bool((found - exact).abs().max() < 1e-5 * exact.abs().max())  # bfloat16 would be off by 4e-3
