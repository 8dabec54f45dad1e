"""The Triton kernels on torch tensors: float32, float16 and bfloat16, accumulation in float32.

They run on CUDA and HIP devices and, where ``TRITON_INTERPRET=1`` was set before the start, in Triton's interpreter on
the CPU. Triton itself is imported on first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vspdf.errors import BackendUnavailable
from vspdf.pattern import Pattern

KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
BLOCK_N = 32  # rows of a panel
BLOCK_E = 64  # kept weights of a program of the SDDMM
UNROLL = 2  # kept weights of a row in flight
PITCH = 64  # tokens that packed activations are padded to a multiple of
WIDE = 1 << 31  # elements of packed activations from which offsets take 64 bits
PROGRAMS = 4096  # enough to fill any device several times over: beyond it a program takes more panels
GEMM = {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_T": 32, "GROUP": 8}
OPTIONS = {
    "gather_spmm": {"num_warps": 4},
    "gather_sddmm": {"num_warps": 4},
    "sampled_gemm": {"num_warps": 8, "num_stages": 3},
}


def interpreted() -> bool:
    """Tells whether Triton interprets kernels on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Why the backend cannot run here; None if it can."""
    if find_spec("triton") is None:
        return "the package 'triton' is not installed (pip install triton; Linux only)"
    if not torch.cuda.is_available() and not interpreted():
        return "no CUDA or HIP device is visible to torch"
    return None


def kernels() -> Any:
    """The module of Triton kernels.

    Raises
    ------
    BackendUnavailable
        If they cannot run here.
    """
    reason = unavailable()
    if reason:
        raise BackendUnavailable(f"backend 'triton' cannot run: {reason}.")
    return import_module("vspdf.kernels.gpu.triton_kernels")


def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot work on such a tensor; None if they can."""
    if dtype not in KINDS:
        return f"no kernel for {dtype} (float32, float16 and bfloat16 have one)"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"no kernel for device '{device.type}' (CUDA and HIP devices have one)"
    return None


def device_name(device: torch.device | None = None) -> str:
    """The name of a GPU, as its driver tells it."""
    return torch.cuda.get_device_name(device)


@cache
def build() -> str:
    """Identifies the kernels, so that timings of another build are not believed."""
    folder = Path(__file__).parent
    sources = b"".join((folder / name).read_bytes() for name in ("launch.py", "triton_kernels.py", "two_four.py"))
    triton = import_module("triton").__version__
    return f"kernels {hashlib.blake2b(sources, digest_size=6).hexdigest()}; triton {triton}"


def tf32() -> bool:
    """Tells whether the user lets torch multiply float32 matrices in TF32; off by default."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):  # torch < 2.9
        return matmul.allow_tf32
    own = matmul.fp32_precision
    return (torch.backends.fp32_precision if own == "none" else own) == "tf32"  # type: ignore[attr-defined]


def precision(dtype: torch.dtype) -> str:
    """Names how torch multiplies matrices of this dtype here: "fp32", "tf32", "fp16" or "bf16"."""
    return "tf32" if dtype == torch.float32 and tf32() else KINDS[dtype]


def _up(n: int, block: int) -> int:
    return -(-n // block)


# --- Plans -----------------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """Kept weights by row of the product's output. ``source``: their places among the values, None if in order."""

    pointers: Tensor  # int32 [rows + 1]
    columns: Tensor  # uint16 or int32 [nnz], rising within a row
    order: Tensor | None  # int32 [rows]: row in each slot, longest first, where lengths are very uneven
    source: Tensor | None  # int32 [nnz]
    steps: int  # sum over panels of their longest row, rounded up to UNROLL


class Packed:
    """The parts of a pattern that kernels need on one device, each part built on first use; no weights.

    Bytes per kept weight: 2 (columns) + 2 (rows, for the SDDMM) + 6 (the transposed side), twice that where a side of
    the pattern is above 65,536.
    """

    def __init__(self, pattern: Pattern, device: torch.device) -> None:
        self.shape, self.nnz, self.device = pattern.shape, pattern.nnz, device
        self.rows_, self.columns_ = pattern.csr()
        self.mask_bits = pattern.bits

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        parts = [part for part in vars(self).values() if isinstance(part, (Tensor, Side, Epilogue))]
        tensors = [t for part in parts for t in ([part] if isinstance(part, Tensor) else part)]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def _index(self, indices: np.ndarray, size: int) -> Tensor:
        narrow = np.uint16 if size <= 1 << 16 else np.int32
        return torch.from_numpy(indices.astype(narrow)).to(self.device)

    def _side(self, pointers: np.ndarray, columns: np.ndarray, size: int, source: np.ndarray | None) -> Side:
        lengths = np.diff(pointers)
        longest = -np.sort(-lengths)
        order, steps = None, _panel_steps(lengths)
        # Sorted rows scatter the output: only where idle steps would cost more than that.
        if steps > 2 * (sorted_steps := _panel_steps(longest)):
            order, steps = np.argsort(-lengths, kind="stable"), sorted_steps
        as_int32 = lambda a: None if a is None else torch.from_numpy(a.astype(np.int32)).to(self.device)  # noqa: E731
        pointers_ = as_int32(pointers)
        assert pointers_ is not None
        return Side(pointers_, self._index(columns, size), as_int32(order), as_int32(source), steps)

    @cached_property
    def forward(self) -> Side:
        """Rows are out-features."""
        return self._side(self.rows_, self.columns_, self.shape[1], None)

    @cached_property
    def transposed(self) -> Side:
        """Rows are in-features."""
        source = np.argsort(self.columns_, kind="stable")
        pointers = np.zeros(self.shape[1] + 1, dtype=np.int64)
        np.cumsum(np.bincount(self.columns_, minlength=self.shape[1]), out=pointers[1:])
        return self._side(pointers, self._rows()[source], self.shape[0], source)

    def _rows(self) -> np.ndarray:
        return np.repeat(np.arange(self.shape[0]), np.diff(self.rows_))

    @cached_property
    def rows(self) -> Tensor:
        """Row of each kept weight, uint16 or int32 [nnz]."""
        return self._index(self._rows(), self.shape[0])

    @cached_property
    def epilogue(self) -> Epilogue:
        """Bitmap and counts for the GEMM that samples as it stores."""
        out_features, in_features = self.shape
        mask = np.unpackbits(self.mask_bits, count=out_features * in_features, bitorder="little")
        wide = np.zeros((out_features, _up(in_features, 32) * 32), dtype=np.uint8)
        wide[:, :in_features] = mask.reshape(self.shape)
        bits = np.packbits(wide, axis=1, bitorder="little").view(np.int32)
        ones = np.add.reduceat(wide, np.arange(0, wide.shape[1], 32), axis=1, dtype=np.int32)
        before = np.cumsum(ones, axis=1) - ones
        return Epilogue(torch.from_numpy(bits).to(self.device), self._index(before, in_features))


class Epilogue(NamedTuple):
    bits: Tensor  # int32 [rows, ceil(columns / 32)]
    before: Tensor  # uint16 or int32, likewise: kept weights ahead of each word in its row


def _panel_steps(lengths: np.ndarray) -> int:
    padded = np.zeros(_up(len(lengths), BLOCK_N) * BLOCK_N, dtype=np.int64)
    padded[: len(lengths)] = lengths
    longest = padded.reshape(-1, BLOCK_N).max(axis=1)
    return int((-(-longest // UNROLL) * UNROLL).sum())


def packed(pattern: Pattern, device: torch.device) -> Packed:
    """A pattern packed for a device, kept with the pattern."""
    key = f"triton {device}"
    found = pattern.packed.get(key)
    if found is None:
        found = pattern.packed.setdefault(key, Packed(pattern, device))
    return found


# --- Products --------------------------------------------------------------------------------------------------------


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _packed(x: Tensor) -> Tensor:
    """[features, pitch] of [tokens, features], any strides."""
    tokens, features = x.shape
    pitch = _up(tokens, PITCH) * PITCH
    packed = x.new_empty(features, pitch)
    grid = (pitch // 64, _up(features, 64))
    kernels().pack_activations[grid](packed, x, tokens, features, pitch, *x.stride(), BLOCK_T=64, BLOCK_F=64)
    return packed


def _words(values: Tensor, side: Side) -> Tensor:
    """Values beside their columns, in the order of a side."""
    wide = values.element_size() == 4
    bits = values.contiguous().view(torch.int32 if wide else torch.int16)
    words = torch.empty(len(side.columns), dtype=torch.int64 if wide else torch.int32, device=values.device)
    order = side.pointers if side.source is None else side.source
    kernels().pack_words[(_up(len(words), 1024),)](
        words, bits, side.columns, order, len(words), PERMUTED=side.source is not None, WIDE=wide, BLOCK=1024
    )
    return words


def _gather(
    x: Tensor, values: Tensor, bias: Tensor | None, side: Side, into: Tensor | None = None
) -> tuple[Tensor, int]:
    """Product of one side; adds to `into` where it is given."""
    tokens, rows = x.shape[0], len(side.pointers) - 1
    y = x.new_empty(tokens, rows) if into is None else into
    if not tokens:
        return y, 0
    kind = KINDS[x.dtype]
    if side.columns.dtype == torch.int32:  # a column takes more than half a word: float32 words hold both
        values, kind = values.float(), "fp32"
    block_t = 32 if x.element_size() == 4 else 64  # 128 bytes: a line
    with _on(x.device):
        words, packed = _words(values, side), _packed(x)
        blocks, panels = _up(tokens, block_t), _up(rows, BLOCK_N)
        per_program = min(max(blocks * panels // PROGRAMS, 1), 16)
        bias = None if bias is None else bias.contiguous()
        kernels().gather_spmm[(blocks * _up(panels, per_program),)](
            y, packed, words, side.pointers, side.pointers if side.order is None else side.order,
            side.pointers if bias is None else bias, tokens, rows, packed.stride(0), y.stride(0),
            KIND=kind, ORDERED=side.order is not None, BIAS=bias is not None, ADD=into is not None,
            WIDE=packed.numel() >= WIDE, PANELS=per_program, UNROLL=UNROLL, BLOCK_N=BLOCK_N, BLOCK_T=block_t,
            **OPTIONS["gather_spmm"],
        )  # fmt: skip
    return y, side.steps * BLOCK_N * blocks * block_t


def forward(x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern) -> tuple[Tensor, int]:
    """``x @ W.T + bias`` and the multiply-adds executed."""
    return _gather(x, values, bias, packed(pattern, x.device).forward)


def add_forward(x: Tensor, values: Tensor, pattern: Pattern, into: Tensor) -> tuple[Tensor, int]:
    """``into += x @ W.T``, in place, and the multiply-adds executed; `into` has contiguous rows."""
    return _gather(x, values, None, packed(pattern, x.device).forward, into)


def grad_input(grad_output: Tensor, values: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """``grad_output @ W`` and the multiply-adds executed."""
    return _gather(grad_output, values, None, packed(pattern, grad_output.device).transposed)


def grad_values(grad_output: Tensor, x: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """``grad_output.T @ x`` at kept positions and the multiply-adds executed."""
    tokens, count = x.shape[0], pattern.nnz
    if not tokens or not count:
        return x.new_zeros(count), 0
    here = packed(pattern, x.device)
    block_t = 32 if x.element_size() == 4 else 64
    with _on(x.device):
        packed_grad, packed_x = _packed(grad_output), _packed(x)
        pitch, programs = packed_x.stride(0), _up(count, BLOCK_E)
        splits = max(1, min(PROGRAMS // 4 // programs, pitch // 512))  # of the tokens, where weights are few
        share = _up(_up(pitch, splits), block_t) * block_t
        splits = _up(pitch, share)
        sums = torch.empty(splits, count, dtype=torch.float32, device=x.device)
        kernels().gather_sddmm[(programs, splits)](
            sums, packed_grad, packed_x, here.rows, here.forward.columns, count, pitch, share,
            WIDE=max(packed_grad.numel(), packed_x.numel()) >= WIDE, BLOCK_E=BLOCK_E, BLOCK_T=block_t,
            **OPTIONS["gather_sddmm"],
        )  # fmt: skip
    return sums.sum(0).to(x.dtype), programs * BLOCK_E * _up(pitch, block_t) * block_t


def sampled_grad_values(grad_output: Tensor, x: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """Computes `grad_values` by a dense GEMM whose epilogue keeps what the pattern keeps."""
    (tokens, rows), columns, count = grad_output.shape, x.shape[1], pattern.nnz
    if not tokens or not count:
        return x.new_zeros(count), 0
    here = packed(pattern, x.device)
    bits, before = here.epilogue
    values = x.new_empty(count)
    tiles = _up(rows, GEMM["BLOCK_N"]) * _up(columns, GEMM["BLOCK_K"])
    with _on(x.device):
        kernels().sampled_gemm[(tiles,)](
            values, grad_output, x, bits, before, here.forward.pointers, tokens, rows, columns,
            *grad_output.stride(), *x.stride(), bits.stride(0),
            PRECISION="tf32" if precision(x.dtype) == "tf32" else "ieee", UPCAST=interpreted(),
            **GEMM, **OPTIONS["sampled_gemm"],
        )  # fmt: skip
    return values, tiles * GEMM["BLOCK_N"] * GEMM["BLOCK_K"] * _up(tokens, GEMM["BLOCK_T"]) * GEMM["BLOCK_T"]
