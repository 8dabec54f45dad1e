"""Compiles every kernel for GPUs that are not here; prints what each needs as one JSON object.

A process of its own: the interpreter's must not have imported Triton before. Run: `python tests/gpu/compile_only.py`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vspdf.kernels.gpu import launch, triton_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTER = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
INTEGERS = {"tokens", "features", "pitch", "rows", "columns", "count", "share", "x_token", "grad_token", "token_stride"}


def cases():
    """(name, kernel, signature, constants) of what the launchers start: columns of 16 bits, offsets of 32."""
    for kind, pointer in POINTER.items():
        wide = kind == "fp32"
        block_t = 32 if wide else 64
        yield f"pack_activations {kind}", triton_kernels.pack_activations, {
            "packed": pointer, "x": pointer, "tokens": "i32", "features": "i32", "pitch": "i32",
            "token_stride": "i32", "feature_stride": "i32",
        }, {"BLOCK_T": 64, "BLOCK_F": 64, "feature_stride": 1}  # fmt: skip
        if kind != "bf16":  # bits: fp16 and bf16 are the same
            yield f"pack_words {32 if wide else 16} bits", triton_kernels.pack_words, {
                "words": "*i64" if wide else "*i32", "bits": "*i32" if wide else "*i16", "columns": "*u16",
                "order": "*i32", "count": "i32",
            }, {"PERMUTED": True, "WIDE": wide, "BLOCK": 1024}  # fmt: skip
        for add in (False, True):
            yield f"gather_spmm {kind}{' add' * add}", triton_kernels.gather_spmm, {
                "y": pointer, "packed": pointer, "words": "*i64" if wide else "*i32", "pointers": "*i32",
                "order": "*i32", "bias": pointer, "tokens": "i32", "rows": "i32", "pitch": "i32", "token_stride": "i32",
            }, {"KIND": kind, "ORDERED": add, "BIAS": not add, "ADD": add, "WIDE": False, "PANELS": 4,
                "UNROLL": launch.UNROLL, "BLOCK_N": launch.BLOCK_N, "BLOCK_T": block_t}  # fmt: skip
        yield f"gather_sddmm {kind}", triton_kernels.gather_sddmm, {
            "out": "*fp32", "packed_grad": pointer, "packed_x": pointer, "rows": "*u16", "columns": "*u16",
            "count": "i32", "pitch": "i32", "share": "i32",
        }, {"WIDE": False, "BLOCK_E": launch.BLOCK_E, "BLOCK_T": block_t}  # fmt: skip
        for precision in ("ieee", "tf32") if wide else ("ieee",):
            name = "tf32" if precision == "tf32" else kind
            yield f"sampled_gemm {name}", triton_kernels.sampled_gemm, {
                "out": pointer, "grad": pointer, "x": pointer, "bits": "*i32", "before": "*u16", "pointers": "*i32",
                **dict.fromkeys(("tokens", "rows", "columns", "grad_token", "grad_feature", "x_token", "x_feature",
                                 "words_stride"), "i32"),
            }, {"PRECISION": precision, "UPCAST": False, "grad_feature": 1, "x_feature": 1, **launch.GEMM}  # fmt: skip


def compiled(kernel, signature, constants, target):
    """The compiled kernel, its pointers and sizes divisible by 16 as in aligned calls."""
    names = kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if name not in constants and (kind.startswith("*") or name in INTEGERS)
    }
    signature = {name: "constexpr" if name in constants else signature[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=target, options=launch.OPTIONS.get(kernel.fn.__name__, {"num_warps": 4}))


def resources(kernel, target):
    """Registers a thread, spilled bytes, shared memory, and tensor-core instructions."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        spills = max(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
        tensor = sorted(set(re.findall(r"\bv_mfma_\w+", text)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.cubin")
            file.write_bytes(kernel.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        registers = int(re.search(r"REG:(\d+)", text)[1])
        spills = int(re.search(r"STACK:(\d+)", text)[1])
        tensor = sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync[\w.]*", kernel.asm["ptx"])))
    return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared, "tensor": tensor}


if __name__ == "__main__":
    found = {}
    for label in sys.argv[1:] or TARGETS:
        found[label] = {
            name: resources(compiled(kernel, signature, constants, TARGETS[label]), TARGETS[label])
            for name, kernel, signature, constants in cases()
        }
    print(json.dumps(found))
