"""A conservative model of what the paths cost on GPUs, for where nothing was measured.

Counted bytes and multiply-adds over sustained rates: published peaks times `SUSTAINED`. Nothing here was fitted to a
measurement of this project; a tuned table overrules it.

What bounds the gather is where its activations come from. A panel of 32 rows reads each column that any of them keeps,
1 - (1 - density)³² of all, from L2, and reads it again from L1 for every kept weight. Panels share nothing: a
multiprocessor has several at work, and their columns do not fit its L1 together.
"""

from __future__ import annotations

from typing import NamedTuple

from vspdf.kernels.gpu.gather import BLOCK_N

SUSTAINED = 0.8  # of a published peak that cuBLAS and streaming kernels reach on large shapes
GATHER = 0.4  # of the L1 bandwidth: idle rows of a panel, instructions beside the loads
L1_BYTES = 128  # per clock and multiprocessor
GAIN = 1.15  # a sparse path is chosen unmeasured only if it is predicted so much faster than dense


class Device(NamedTuple):
    """Published figures of a class of GPUs: multiply-adds per second (half of the FLOP/s), bytes per second."""

    half: float  # float16 and bfloat16 tensor cores, accumulation in float32, without 2:4
    tf32: float
    fp32: float  # outside tensor cores
    bandwidth: float
    multiprocessors: int
    clock: float  # Hz
    l2: float  # bytes per clock and multiprocessor, read
    two_four: float  # 2:4 over dense
    # Sparsity below which the gather is not chosen unmeasured where dense has tensor cores: on data-centre cards the
    # margin is thin, and every fault of this model costs the user more than the gather could gain.
    gather_from: float = 0.0


# By a part of the name that torch gives, the longer first where one holds the other. Source: the vendor's data sheets.
# L2: what others measured on H100 (5.5 TB/s), A100 and RTX 4090 (5 TB/s), for the others as their kin. 2:4: cuSPARSELt
# as others measured it, at the low end: H100 cutlass#2229, A100 pytorch#90119, consumer cards torchao#174.
DEVICES = {
    "H200": Device(495e12, 247e12, 33.5e12, 4.8e12, 132, 1.83e9, 23, 1.2, 0.994),
    "H100 PCIe": Device(378e12, 189e12, 25.6e12, 2.0e12, 114, 1.62e9, 23, 1.2, 0.994),
    "H100": Device(495e12, 247e12, 33.5e12, 3.35e12, 132, 1.83e9, 23, 1.2, 0.994),
    "A100": Device(156e12, 78e12, 9.7e12, 1.55e12, 108, 1.41e9, 23, 1.2, 0.994),
    "L40S": Device(181e12, 91e12, 45.8e12, 0.86e12, 142, 2.52e9, 15, 1.4, 0.994),
    "RTX 5090": Device(105e12, 52e12, 52.4e12, 1.79e12, 170, 2.41e9, 15, 1.4),
    "RTX 4090": Device(82.6e12, 41.3e12, 41.3e12, 1.01e12, 128, 2.52e9, 15, 1.6),
    "RTX 3090": Device(35.6e12, 17.8e12, 17.8e12, 0.94e12, 82, 1.70e9, 15, 1.6),
}


def find(name: str) -> Device | None:
    """The class of a device by the name that torch gives; None if it has none here."""
    return next((device for part, device in DEVICES.items() if part in name), None)


def predict(
    device: Device, product: str, shape: tuple[int, int], nnz: int, tokens: int, precision: str
) -> dict[str, float]:
    """Seconds of a product by path: "dense", "triton", and "2:4" where there is such a path.

    Parameters
    ----------
    shape : (out_features, in_features)
    precision : {"fp32", "tf32", "fp16", "bf16"}
    """
    numel, features, density = shape[0] * shape[1], shape[0] + shape[1], nnz / (shape[0] * shape[1])
    size = 2 if precision in ("fp16", "bf16") else 4
    rate = {"fp32": device.fp32, "tf32": device.tf32}.get(precision, device.half) * SUSTAINED
    bandwidth = device.bandwidth * SUSTAINED
    cycles = device.multiprocessors * device.clock
    gemm = max(tokens * numel / rate, tokens * features * size / bandwidth)
    spread = (numel * (size + 3 / 16) + nnz * size) / bandwidth  # W from its values, or its gradient to them
    from_l1 = tokens * nnz * size / (cycles * L1_BYTES * GATHER)
    seconds = {"dense": gemm + spread}
    if product == "grad_values":  # both operands are packed, and both are read for every kept weight
        from_l2 = tokens * nnz * size / (cycles * device.l2 * SUSTAINED)
        seconds["triton"] = 2 * tokens * features * size / bandwidth + max(2 * from_l1, from_l2)
        return seconds
    shared = (1 - (1 - density) ** BLOCK_N) / BLOCK_N  # rows of a panel share what they read
    from_l2 = tokens * numel * size * shared / (cycles * device.l2 * SUSTAINED)
    inside, outside = (shape[1], shape[0]) if product == "forward" else shape
    moved = tokens * (2 * inside + outside) * size + nnz * 3 * (size + 2)
    seconds["triton"] = moved / bandwidth + max(from_l1, from_l2)
    if size == 2:  # W is spread out, for grad_input turned round, and compressed
        compressed = numel * size * (1 + 9 / 16 + 2 * (product == "grad_input")) / bandwidth
        seconds["2:4"] = gemm / device.two_four + spread + compressed
    return seconds
