"""python -m benchmarks.expressions: five elementwise ops as one expression, beside the same five calls of torch, in turn.

Then what expressions hold at most, beside what was told before they ran (Linux: the high-water mark of the process).
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

import maskserve as ms
from maskserve.answers import explain, run
from maskserve.evaluation import Declared, evaluated, planned
from maskserve.expression import parse
from maskserve.payload.format import BytesPayload, to_bytes
from maskserve.payload.tensors import output
from maskserve.requests import build
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


HELD = (TEXT, "x + 1", "softmax(x + 1, dim=0)", "(x - mean(x, dim=0)) / std(x, dim=0)", "median(x * 2, dim=0)", "mode(x)",
        "quantile(abs(x), q=(0.1, 0.5, 0.9), dim=1)", "cummax(x, dim=0) + cumsum(x, dim=1)", "rank(x, dim=0) * y")  # fmt: skip
PULLED = ("sum(exp(-(x * x)) / y)", "var(x * 2)", "sum(softmax(x, dim=1) * x)", "median(x)")
CELLS = 20_000_000


def held(call: Callable[[], object]) -> int:
    """The most bytes that the process holds during a call, beyond those before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is held now
    before = high_water()
    result = call()
    after = high_water()
    del result
    return after - before


def high_water() -> int:
    return int(re.findall(r"VmHWM:\s+([0-9]+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def memory() -> None:
    """Tables of what is told and what is held."""
    x, y = torch.rand(CELLS // 10, 10), torch.rand(10) + 0.5
    outputs = [output("x", x), output("x.mask", torch.rand(x.shape) > 0.3), output("y", y)]
    payload, small = (
        BytesPayload(to_bytes(outputs, {})),
        BytesPayload(to_bytes([output("x", x[:9]), output("y", y)], {})),
    )
    print(f"\n{CELLS:,} f32 cells, 30 % masked; bytes in MB beside the question's\n")
    print("| verb | expression | told | held | held / told |\n| --- | --- | ---: | ---: | ---: |")
    for verb, texts in (("eval", HELD), ("grad", PULLED)):
        for text in texts:
            request = build(verb, {"expr": text})
            run(request, small)  # imports
            told = sum(step.bytes_held for step in explain(request, payload))
            most = held(partial(run, request, payload))
            print(f"| {verb} | `{text}` | {told / 1e6:.0f} | {most / 1e6:.0f} | {most / told:.2f} |")
    print(
        f"\ntorch's five calls on the cells alone, `{TEXT}`: {held(lambda: torch.exp(-(x * x)) / y + 1) / 1e6:.0f} MB"
    )


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
    memory()


if __name__ == "__main__":
    main()
