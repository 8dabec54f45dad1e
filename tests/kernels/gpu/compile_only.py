"""Compiles every kernel for GPUs that are not here; prints what each needs as one JSON object.

A process of its own: the interpreter's must not have imported Triton before. Run:
`python tests/kernels/gpu/compile_only.py [TARGET ...]`; `--budget` prints tests/kernels/gpu/budget.json anew.
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

from vspdf.kernels.gpu import bitmap, gather, launch, triton_kernels

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
POINTER = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
# Sizes that are multiples of 16 in aligned calls; those that are not specialised (tokens, panels_each) are none.
SIZES = {"features", "pitch", "rows", "columns", "count", "token_stride", "words", "share"}


def cases(hard):
    """(name, kernel, signature, constants) of what the launchers start.

    Hard ones have nothing that helps a compiler: no alignment, strides, indices of 32 bits and offsets of 64.
    """
    for kind, pointer in POINTER.items():
        wide = kind == "fp32"
        block_t = 32 if wide else 64
        index = "*i32" if hard else "*u16"
        words = "*i64" if wide or hard else "*i32"
        yield f"pack_activations {kind}", triton_kernels.pack_activations, {
            "packed": pointer, "x": pointer, **dict.fromkeys(("tokens", "features", "pitch"), "i32"),
            **dict.fromkeys(("token_stride", "feature_stride"), "i64" if hard else "i32"),
        }, {"BLOCK_T": 64, "BLOCK_F": 64, **({} if hard else {"feature_stride": 1})}  # fmt: skip
        if kind != "bf16":  # bits: fp16 and bf16 are the same
            for permuted in (False, True):
                yield f"pack_words {32 if wide else 16} bits{' permuted' * permuted}", triton_kernels.pack_words, {
                    "words": "*i64" if wide else "*i32", "bits": "*i32" if wide else "*i16", "columns": index,
                    "order": "*i32", "count": "i32",
                }, {"PERMUTED": permuted, "WIDE": wide, "BLOCK": 1024}  # fmt: skip
        for ordered in (False, True):
            yield f"gather_spmm {kind}{' ordered' * ordered}", triton_kernels.gather_spmm, {
                "y": pointer, "packed": pointer, "words": words, "pointers": "*i32", "order": "*i32", "bias": pointer,
                **dict.fromkeys(("tokens", "rows", "pitch", "token_stride", "panels_each"), "i32"),
            }, {"KIND": "fp32" if hard else kind, "ORDERED": ordered, "BIAS": not ordered, "WIDE": hard,
                "UNROLL": gather.UNROLL, "BLOCK_N": gather.BLOCK_N, "BLOCK_T": block_t}  # fmt: skip
        yield f"gather_sddmm {kind}", triton_kernels.gather_sddmm, {
            "out": "*fp32", "packed_grad": pointer, "packed_x": pointer, "rows": index, "columns": index,
            **dict.fromkeys(("count", "pitch", "share"), "i32"),
        }, {"WIDE": hard, "BLOCK_E": gather.BLOCK_E, "BLOCK_T": block_t}  # fmt: skip
        for kernel, one, other in (
            (triton_kernels.expand, "weight", "values"), (triton_kernels.sample, "values", "dense"),
        ):  # fmt: skip
            yield f"{kernel.fn.__name__} {kind}", kernel, {
                one: pointer, other: "*fp32", "bits": "*i32", "before": index, "pointers": "*i32", "columns": "i32",
                "words": "i32",
            }, {"BLOCK": bitmap.BLOCK}  # fmt: skip


def compiled(kernel, signature, constants, target, aligned):
    """The compiled kernel; where `aligned`, its pointers and sizes are divisible by 16."""
    names = kernel.arg_names
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if aligned and name not in constants and (kind.startswith("*") or name in SIZES)
    }
    signature = {name: "constexpr" if name in constants else signature[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    return triton.compile(source, target=target, options=launch.OPTIONS)


def resources(kernel, target):
    """Registers a thread, spilled bytes, shared memory."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        spills = max(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.cubin")
            file.write_bytes(kernel.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        registers = int(re.search(r"REG:(\d+)", text)[1])
        spills = int(re.search(r"STACK:(\d+)", text)[1])
    return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}


def measured(label):
    """Resources of every kernel on a target, in plain calls and in hard ones."""
    target = TARGETS[label]
    return {
        name + " hard" * hard: resources(compiled(kernel, signature, constants, target, not hard), target)
        for hard in (False, True)
        for name, kernel, signature, constants in cases(hard)
        if not hard or name.endswith(("fp32", "fp32 ordered", "32 bits permuted", "bf16"))
        if "fp16" not in name or label == "sm_80"  # as bf16 but for how words are unpacked
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["--budget"]:
        lines = [f'"triton": "{triton.__version__}"']
        for label in TARGETS:
            rows = (
                f'  "{name}": {{"registers": {-(-r["registers"] // 8) * 8 + 8}, "shared": {r["shared"]}'
                + f', "spills": {r["spills"]}' * bool(r["spills"])
                + "}"
                for name, r in measured(label).items()
            )
            lines.append(f'"{label}": {{\n' + ",\n".join(rows) + "\n}")
        print("{\n" + ",\n".join(lines) + "\n}")
    else:
        print(json.dumps({label: measured(label) for label in sys.argv[1:] or TARGETS}))
