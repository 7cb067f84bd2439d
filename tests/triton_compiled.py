"""python -m tests.triton_compiled: every Triton kernel of every row down to machine code, without a device.

Prints a line for each row: how many kernels, and the seconds. Fails where one does not compile, or contracts a product.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from maskserve import dtypes
from maskserve.backends.triton import TritonBackend
from maskserve.backends.triton_ahead import CAPABILITIES, compile_ahead
from maskserve.backends.triton_launches import Call, recording
from maskserve.backends.triton_tables import PULLS
from maskserve.dtypes import DType
from maskserve.ops.rows import Row
from maskserve.params import names_of
from tests.samples import Masked, cells, plan_of
from tests.triton_rows import OWN, PAIRS, taken

SHAPES = (((300, 40), 0), ((9000,), 0), ((40, 70), 1))
"""Slices beside each other and one after the other, in one tile and in several."""


def calls_of(row: Row, dtype: DType) -> Iterator[Call]:
    """What would be launched for a row, its gradient too."""
    for shape, dim in SHAPES:
        sample = cells(dtype, shape, 1, row=row)
        of = plan_of(row, sample.data, **taken(row, dim=dim))
        with recording() as calls:
            TritonBackend().run(of, sample.data, sample.mask)
            if of.row.vjp in PULLS and dtype.is_float:
                reach = torch.empty(shape, dtype=torch.bfloat16)
                above = (sample.data, sample.data, sample.mask)
                TritonBackend().pull(of, sample.data, sample.mask, *above, torch.empty_like(sample.data), reach)
        yield from calls
        yield from weighed(row, sample, dim)


def weighed(row: Row, sample: Masked, dim: int) -> Iterator[Call]:
    """What would be launched for the states of cells with weights, where the row takes them."""
    if "weights" not in names_of(row):
        return
    given = {"correction": 0} if "correction" in names_of(row) else {}
    of = plan_of(row, sample.data, dim=dim, weights=dtypes.f32, **given)
    data, mask = sample.data.reshape(of.fold), sample.mask.reshape(of.fold)
    with recording() as calls:
        TritonBackend().lift(of, data, mask, torch.ones(of.fold))
    yield from calls


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.triton_compiled", description=__doc__)
    parser.add_argument("--dtypes", default="f32", help="with commas; all with many minutes")
    parser.add_argument("--capability", type=int, action="append", default=[], help="80, 90; both where none is given")
    given = parser.parse_args(arguments)
    wanted = [dtypes.parse(word) for word in given.dtypes.split(",")]
    for row, dtype in PAIRS:
        if dtype not in wanted or row not in OWN:
            continue
        start = time.perf_counter()
        calls = list(calls_of(row, dtype))
        made = [
            kernel for capability in given.capability or CAPABILITIES for kernel in compile_ahead(calls, capability)
        ]
        if any("fma.rn.f64" in kernel.asm["ptx"] for kernel in made):
            print(f"{row.name} of {dtype.name}: a product is contracted", file=sys.stderr)
            return 1
        print(f"{row.name} of {dtype.name}: {len(made)} kernels in {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
