"""Builds the one compiled part, `vspdf._C`; everything else is in pyproject.toml.

One portable binary: translation units with such a name as `*_avx2.cpp` are compiled for that instruction set and
chosen at run time, so that a wheel runs on any machine of its architecture.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

X86 = ["-mpopcnt"]  # every processor that torch runs on counts bits
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", *AVX2]
ISA_FLAGS = {
    "_avx512.cpp": AVX512,
    "_avx512bf16.cpp": [*AVX512, "-mavx512bf16"],
    "_avx2.cpp": AVX2,
}


def find_compiler() -> list[str]:
    """The C++ compiler that will be used, or a clear end of the build."""
    command = (os.environ.get("CXX") or "").split() or ["c++"]
    if shutil.which(command[0]) is None:
        sys.exit(
            f"vspdf: no C++ compiler: '{command[0]}' is not on PATH, and the sparse kernels need one (C++17).\n"
            "vspdf: install it (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
            "macOS: xcode-select --install) or name one with CXX=..., then install again."
        )
    return command


def openmp_flags(compiler: list[str]) -> tuple[list[str], list[str]]:
    """(compile, link) flags with which OpenMP works here; empty if it does not: the kernels then run on one thread."""
    candidates = [(["-fopenmp"], ["-fopenmp"])]
    if platform.system() == "Darwin":
        candidates.append((["-Xpreprocessor", "-fopenmp"], ["-lomp"]))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        for compile_flags, link_flags in candidates:
            command = [*compiler, *compile_flags, str(source), "-o", str(Path(folder, "probe")), *link_flags]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return compile_flags, link_flags
    print(
        "vspdf: OpenMP was not found: the kernels are built for one thread and `vspdf info` will say so "
        "(Debian/Ubuntu: apt install libgomp1; macOS: brew install libomp).",
        file=sys.stderr,
    )
    return [], []


class BuildKernels(build_ext):
    """build_ext that adds instruction-set flags by file name and finds the compiler and OpenMP first."""

    def build_extension(self, ext) -> None:
        compiler = find_compiler()
        compile_flags, link_flags = openmp_flags(compiler)
        ext.extra_compile_args += compile_flags
        ext.extra_link_args += link_flags
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, suffix, cc_args, extra, pp_opts):
            isa = [flag for ending, flags in ISA_FLAGS.items() if src.endswith(ending) for flag in flags]
            compile_one(obj, src, suffix, cc_args, [*extra, *(X86 + isa if x86 else [])], pp_opts)

        self.compiler._compile = compile_with_isa
        with ParallelCompile("VSPDF_BUILD_JOBS", default=0):
            super().build_extension(ext)


setup(
    ext_modules=[
        Pybind11Extension(
            "vspdf._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.hpp") + glob("csrc/*.inl")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas"],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
