"""One module's bits under each instruction set: the extension reads MASKSERVE_ISA once, so each needs a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETS = ("baseline", "avx2", "avx512")


def assert_same_bits_by_every_set(module: str) -> None:
    """`module.print_bits()` prints the name of the set, then lines that are the same from each set that the processor has."""
    from maskserve.backends import _native

    widest = _native.isa() if "MASKSERVE_ISA" not in os.environ else SETS[-1]
    if widest == SETS[0]:
        pytest.skip("this processor has no AVX2")
    _, *baseline = printed(module, SETS[0])
    for isa in SETS[1 : SETS.index(widest) + 1]:
        first, *found = printed(module, isa)
        assert first == isa
        for line, expected in zip(found, baseline, strict=True):
            assert line == expected, isa


def printed(module: str, isa: str) -> list[str]:
    program = f"import sys; sys.path.insert(0, '.'); from {module} import print_bits; print_bits()"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MASKSERVE_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()
