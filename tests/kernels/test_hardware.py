"""How freed memory is kept, in processes of their own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from vspdf.kernels.hardware import keep_freed_memory

def kilobytes(file, name):
    return sum(int(line.split()[1]) for line in open(file) if line.startswith(name + ":"))

for _ in range(2):
    keep_freed_memory()
before = kilobytes("/proc/self/status", "VmRSS")
x = torch.ones(24 << 20)
huge = kilobytes("/proc/self/smaps", "AnonHugePages")
held = kilobytes("/proc/self/status", "VmRSS")
del x
print(before, huge, held, kilobytes("/proc/self/status", "VmRSS"))
"""


@pytest.fixture(scope="module")
def memory():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    return [int(word) for word in subprocess.check_output([sys.executable, "-c", CODE], text=True).split()]


def test_what_is_freed_stays(memory):
    before, _, held, after = memory
    assert held - before < 200 << 10  # what is reserved is not used: 96 MB are, and what comes with them
    assert after > held - (8 << 10)


def test_the_heap_is_in_huge_pages(memory):
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("the kernel gives no huge pages to who asks for them")
    assert memory[1] > 64 << 10
