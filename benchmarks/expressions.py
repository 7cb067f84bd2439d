"""python -m benchmarks.expressions: five elementwise ops as one expression, beside the same five calls of torch, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

import maskserve as ms
from maskserve.evaluation import Declared, evaluated, planned
from maskserve.expression import parse
from maskserve.tensor import MaskedTensor
from maskserve.torch_dtypes import dtype_of

TEXT = "exp(-(x * x)) / y + 1"
SIZES = {1_000: 201, 1_000_000: 51, 20_000_000: 9}
"""Cells, and rounds."""


def contenders(n: int, is_masked: bool) -> tuple[Callable[[], MaskedTensor], Callable[[], torch.Tensor]]:
    """The expression, parsed and planned once, and the calls; torch computes on the cells below the mask too."""
    cells, y = torch.randn(n), torch.rand(n) + 0.5
    variables = {"x": ms.masked_tensor(cells, torch.rand(n) > 0.3 if is_masked else None), "y": ms.masked_tensor(y)}
    declared = {
        name: Declared(shape=tuple(v.shape), dtype=dtype_of(v._data), is_masked=v._mask is not None)
        for name, v in variables.items()
    }
    term = planned(parse(TEXT).root, declared)
    return lambda: evaluated(term, variables), lambda: torch.exp(-(cells * cells)) / y + 1


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    print(f"{TEXT}, f32, {torch.get_num_threads()} threads; times of torch's calls on cells without a mask\n")
    print("| cells | mask | expression | torch | times |\n| ---: | --- | ---: | ---: | ---: |")
    for n, rounds in SIZES.items():
        for is_masked in (False, True):
            ours, theirs = contenders(n, is_masked)
            valid = ours().get_mask()
            assert torch.equal(ours().get_data()[valid], theirs()[valid]), "the results differ"
            taken = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
            one, other = (median(times) * 1e3 for times in zip(*taken, strict=True))
            mask = "30 % masked" if is_masked else "none"
            print(f"| {n:,} | {mask} | {one:.3g} ms | {other:.3g} ms | {one / other:.2g} |")


if __name__ == "__main__":
    main()
