"""The encodings of generated kernels against an independent disassembler: binutils' objdump."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from vspdf import _C

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")


def disassemble(code: bytes, path) -> list[str]:
    """Instructions as `mnemonic operands`, sizes of memory left out and displacements in decimals."""
    path.write_bytes(code)
    command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel", "--no-show-raw-insn", str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    if "i386:x86-64" in run.stderr:
        pytest.skip("this objdump does not know x86-64")
    lines = re.findall(r"^ *[0-9a-f]+:\t(.*?) *$", run.stdout, re.MULTILINE)
    plain = (re.sub(r"(?:[a-z]?word|[xyz]mmword|BYTE|[DQXYZ]+[A-Z]*) (?:PTR|BCST) ", "", line) for line in lines)
    return [re.sub(r"0x([0-9a-f]+)", lambda m: str(int(m[1], 16)), " ".join(line.split())) for line in plain]


def expected(text: str) -> str:
    """As objdump writes it: no displacement of 0 where none is encoded, no {1to16} where BCST said it."""
    return text.replace("{1to16}", "")


def test_every_instruction_says_what_it_should(tmp_path):
    samples = _C.assembler_samples()
    found = disassemble(b"".join(code for code, _ in samples), tmp_path / "code")
    assert len(found) == len(samples) > 1000
    wrong = [(text, line) for (_, text), line in zip(samples, found, strict=True) if expected(text) != expected(line)]
    assert not wrong, wrong[:5]
    mnemonics = {text.split()[0] for _, text in samples}
    assert mnemonics >= {"vfmadd231ps", "vbroadcastss", "vmovups", "vxorps", "vpxord", "lea", "add"}


def test_embedded_broadcast_is_of_sixteen(tmp_path):
    """The normalised text above drops the broadcast: its bit in the encoding is what tells it from a whole vector."""
    samples = [(code, text) for code, text in _C.assembler_samples() if "{1to16}" in text]
    assert samples and all(code[3] & 0x10 for code, _ in samples)
