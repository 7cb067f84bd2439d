"""Builds the kernels without Python and runs each on every dtype, layout and kind of mask (native/selftest.cpp).

    python -m tests.kernel_selftest                    every instruction set of this processor, the same bits
    python -m tests.kernel_selftest --sanitize         the same under AddressSanitizer and UBSan
    python -m tests.kernel_selftest --emulate x86_64   on a processor without AVX, by qemu-x86_64
    python -m tests.kernel_selftest --emulate aarch64  compiled for ARM, by qemu-aarch64
    python -m tests.kernel_selftest --large            the lifts on more than 2^31 cells
    python -m tests.kernel_selftest --instructions     how many instructions a cell takes, by valgrind's callgrind

Exit status 1 where one line differs from the first run's, or a run fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from math import prod
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILDS = ROOT / "build" / "selftest"
SETS = ("baseline", "avx2", "avx512")
SANITIZED = (
    "-DCMAKE_BUILD_TYPE=None",
    "-DMASKSERVE_OPTIMIZATION=-O1",  # -O3 takes an hour to compile
    "-DMASKSERVE_BASELINE_ONLY=ON",  # the loops are the same for every instruction set
    "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all -g1",
)
FOR_ARM = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)
NO_AVX = ("qemu-x86_64", "-cpu", "Nehalem")
ARM = ("qemu-aarch64",)
COUNTED = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
COUNTED_KERNELS = (
    "count", "total", "largest", "moments", "powers", "product", "exponentials", "softmax", "log_softmax", "cumulative_sum",
)  # fmt: skip
COUNTED_SHAPES = {
    "last": (8, 8192, 1),
    "first": (1, 256, 256),
    "n 3": (1 << 14, 3, 1),
    "n 64": (1024, 64, 1),
    "inner 3": (4, 5461, 3),
}
"""(outer, n, inner), about 65,536 cells each."""
PACKAGES = {
    "cmake": "cmake",
    "valgrind": "valgrind",
    "qemu-x86_64": "qemu-user",
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
}


def need(*programs: str) -> None:
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        packages = " ".join(sorted({PACKAGES[program] for program in missing}))
        sys.exit(f"{missing[0]} is not there: apt-get install {packages}")


def built(name: str, *options: str) -> Path:
    """The self-test's program, built with these options of CMake."""
    need("cmake")
    folder = BUILDS / name
    began = time.monotonic()
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, "-DMASKSERVE_SELFTEST=ON", *options], check=True, capture_output=True
    )
    subprocess.run(
        ["cmake", "--build", folder, "--parallel", str(os.cpu_count())], check=True, stdout=subprocess.DEVNULL
    )
    print(f"{name}: built in {time.monotonic() - began:.0f} s")
    return folder / "selftest"


def lines(program: Path, *arguments: str, under: tuple[str, ...] = (), isa: str = "") -> list[str]:
    began = time.monotonic()
    ran = subprocess.run(
        [*under, program, *arguments], env={**os.environ, "MASKSERVE_ISA": isa}, capture_output=True, text=True
    )
    if ran.returncode:
        sys.exit(f"{isa or program.parent.name}: exit {ran.returncode}\n{ran.stderr[-4000:]}")
    found = ran.stdout.splitlines()
    print(
        f"{' '.join(under) or program.parent.name} {ran.stderr.strip()}: {len(found)} lines, {time.monotonic() - began:.0f} s"
    )
    return found


def print_instructions() -> None:
    """A row a kernel, a column a shape: instructions a cell of f32 with 70 % valid, AVX2 / baseline."""
    need("valgrind")
    program = built("plain")
    print("| kernel | " + " | ".join(COUNTED_SHAPES) + " |\n| --- |" + " ---: |" * len(COUNTED_SHAPES))
    for kernel in COUNTED_KERNELS:
        figures = (
            " / ".join(f"{instructions(program, isa, kernel, shape):.1f}" for isa in ("avx2", "baseline"))
            for shape in COUNTED_SHAPES.values()
        )
        print(f"| {kernel} | " + " | ".join(figures) + " |", flush=True)


def instructions(program: Path, isa: str, kernel: str, shape: tuple[int, ...]) -> float:
    """Instructions a cell: what a second run of the kernel adds. (valgrind knows no AVX-512.)"""

    def counted(repeats: int) -> int:
        ran = subprocess.run(
            [*COUNTED, program, "--again", kernel, *map(str, shape), str(repeats)],
            env={**os.environ, "MASKSERVE_ISA": isa}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(ran.stderr.split("Collected :")[1].split()[0])

    return (counted(2) - counted(1)) / prod(shape)


def sets() -> list[str]:
    """The instruction sets of this processor that the kernels are built for."""
    from maskserve.backends.cpu import native

    return list(SETS[: SETS.index(native().isa()) + 1])


def differing(expected: list[str], found: list[str]) -> list[str]:
    return [f"{a} | {b}" for a, b in zip(expected, found, strict=True) if a != b]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--emulate", choices=("x86_64", "aarch64"))
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer sizes; what emulation runs in any case")
    parser.add_argument("--instructions", action="store_true")
    asked = parser.parse_args()
    if asked.instructions:
        print_instructions()
        return 0
    sizes = ["--large"] if asked.large else ["--quick"] if asked.quick or asked.emulate else []
    if asked.emulate:
        need(*({"qemu-x86_64"} if asked.emulate == "x86_64" else {"qemu-aarch64", "aarch64-linux-gnu-g++"}))
    plain = built("plain")
    expected = lines(plain, *sizes)
    if asked.emulate == "x86_64":
        runs = [lines(plain, *sizes, under=NO_AVX)]
    elif asked.emulate == "aarch64":
        runs = [lines(built("aarch64", *FOR_ARM), *sizes, under=ARM)]
    else:
        program = built("sanitized", *SANITIZED) if asked.sanitize else plain
        runs = [lines(program, *sizes, isa=isa) for isa in (["baseline"] if asked.sanitize else sets())]
    wrong = [line for found in runs for line in differing(expected, found)]
    print("\n".join(wrong) or "the same bits everywhere")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
