"""A conservative model of what the paths cost on GPUs, for where nothing was measured.

Counted bytes and multiply-adds over sustained rates: published peaks times `SUSTAINED`, and for the gather kernels the
bandwidth of L1 times `GATHER`. Nothing here was fitted to a measurement of this project; a tuned table overrules it.
"""

from __future__ import annotations

from typing import NamedTuple

SUSTAINED = 0.8  # of a published peak that cuBLAS and streaming kernels reach on large shapes
GATHER = 0.4  # of the L1 bandwidth: idle rows of a panel, lines that come from L2, instructions beside the loads
L1_BYTES = 128  # per clock and multiprocessor
TRITON_GEMM = 0.8  # of cuBLAS
SPARSE_CORES = 1.2  # 2:4 over dense through cuSPARSELt, as others measured on H100 (cutlass#2229)
SECTOR = 32  # bytes that the smallest access to memory moves
GAIN = 1.15  # a sparse path is chosen unmeasured only if it is predicted so much faster than dense


class Device(NamedTuple):
    """Published figures of a class of GPUs: multiply-adds per second (half of the FLOP/s), bytes per second."""

    half: float  # float16 and bfloat16 tensor cores, accumulation in float32, without 2:4
    tf32: float
    fp32: float  # outside tensor cores
    bandwidth: float
    multiprocessors: int
    clock: float  # Hz


# By a part of the name that torch gives, the longer first where one holds the other. Source: the vendor's data sheets.
DEVICES = {
    "H200": Device(495e12, 247e12, 33.5e12, 4.8e12, 132, 1.83e9),
    "H100 PCIe": Device(378e12, 189e12, 25.6e12, 2.0e12, 114, 1.62e9),
    "H100": Device(495e12, 247e12, 33.5e12, 3.35e12, 132, 1.83e9),
    "A100": Device(156e12, 78e12, 9.7e12, 1.55e12, 108, 1.41e9),
    "L40S": Device(181e12, 91e12, 45.8e12, 0.86e12, 142, 2.52e9),
    "RTX 5090": Device(105e12, 52e12, 52.4e12, 1.79e12, 170, 2.41e9),
    "RTX 4090": Device(82.6e12, 41.3e12, 41.3e12, 1.01e12, 128, 2.52e9),
    "RTX 3090": Device(35.6e12, 17.8e12, 17.8e12, 0.94e12, 82, 1.70e9),
}


def find(name: str) -> Device | None:
    """The class of a device by the name that torch gives; None if it has none here."""
    return next((device for part, device in DEVICES.items() if part in name), None)


def predict(
    device: Device, product: str, shape: tuple[int, int], nnz: int, tokens: int, precision: str
) -> dict[str, float]:
    """Seconds of a product by path: "dense", "triton", and "sampled" or "2:4" where there is such a path.

    Parameters
    ----------
    shape : (out_features, in_features)
    precision : {"fp32", "tf32", "fp16", "bf16"}
    """
    numel, features = shape[0] * shape[1], shape[0] + shape[1]
    size = 2 if precision in ("fp16", "bf16") else 4
    rate = {"fp32": device.fp32, "tf32": device.tf32}.get(precision, device.half) * SUSTAINED
    bandwidth = device.bandwidth * SUSTAINED
    gemm = max(tokens * numel / rate, tokens * features * size / bandwidth)
    scatter = (numel * size + nnz * (size + 4)) / bandwidth  # materialise W, or sample grad_values
    gather = tokens * nnz / (device.multiprocessors * device.clock * L1_BYTES / size * GATHER)
    seconds = {"dense": gemm + scatter}
    if product == "grad_values":  # both operands are packed; the gather reads both
        seconds["triton"] = 2 * tokens * features * size / bandwidth + 2 * gather
        if precision != "fp32":
            seconds["sampled"] = gemm / TRITON_GEMM
        return seconds
    inside, outside = (shape[1], shape[0]) if product == "forward" else shape
    moved = tokens * (2 * inside + outside) * size + nnz * 3 * (size + 2)
    seconds["triton"] = moved / bandwidth + gather
    if size == 2:
        rest = _beyond_two(nnz / numel) * numel
        touched = min(rest, outside) * tokens * 2 * SECTOR + (rest > 0) * tokens * 2 * inside * size
        seconds["2:4"] = gemm / SPARSE_CORES + nnz * (size + 8) / bandwidth + touched / bandwidth
    return seconds


def _beyond_two(density: float) -> float:
    """Share of all positions of a random mask that are a third or fourth of their group of four: (P3 + 2·P4) / 4."""
    three, four = 4 * density**3 * (1 - density), density**4
    return (three + 2 * four) / 4
