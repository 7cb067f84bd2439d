"""What is installed runs on any x86-64, and what cannot be built says what to install."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from maskserve.backends.cpu import native

ROOT = Path(__file__).parent.parent
SYMBOL = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\t(\S+)(.*)$")
EVEX = re.compile(r"%zmm|\{%k|%[xy]mm(1[6-9]|2\d|3[01])")
NOT_VECTORS = {"verr", "verw"}


def disassembled() -> list[tuple[str, str, str]]:
    """(symbol, mnemonic, operands) of every instruction of the extension."""
    printed = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(native().__file__)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found, symbol = [], ""
    for line in printed.splitlines():
        if begins := SYMBOL.match(line):
            symbol = begins[1]
        elif of := INSTRUCTION.match(line):
            found.append((symbol, of[1], of[2]))
    return found


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs objdump and x86-64")
def test_only_the_dispatched_kernels_need_more_than_any_x86_64_has() -> None:
    vectors, sets = {}, {"avx2": 0, "avx512": 0}
    for symbol, mnemonic, operands in disassembled():
        if not mnemonic.startswith("v") or mnemonic in NOT_VECTORS:
            continue
        isa = next((isa for isa in sets if f"maskserve::{isa}::" in symbol), None)
        evex = EVEX.search(operands) is not None
        if isa is None or (evex and isa == "avx2"):
            vectors[symbol] = f"{mnemonic}{operands}"
        else:
            sets[isa] += evex if isa == "avx512" else 1
    assert not vectors, vectors
    assert min(sets.values()) > 1000, "the test sees the kernels"


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_without_a_compiler_the_build_names_one_to_install(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path], env={**os.environ, "CXX": "/bin/false"}, capture_output=True, text=True
    )
    assert ran.returncode
    assert "No C++17 compiler works" in ran.stderr
    assert "apt-get install g++" in ran.stderr
    with (ROOT / "pyproject.toml").open("rb") as file:
        said = tomllib.load(file)["tool"]["scikit-build"]["messages"]["after-failure"]
    assert "apt-get install g++" in said
