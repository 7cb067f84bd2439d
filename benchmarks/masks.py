"""python -m benchmarks.masks: masks held as lengths and as bits beside the same mask in bools, forward and back, in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import maskserve as ms

SHAPES = ((64, 1024, 512), (4096, 8192))
"""128 MB of float32: beyond the caches."""
ROUNDS = 5
FORMS = ("bool", "lengths", "packed")
OPS: dict[str, Callable[[Any], Any]] = {
    "sum, last dim": lambda m: ms.sum(m, -1),
    "sum, dim 1 of 3, or 0": lambda m: ms.sum(m, 1 if m.ndim == 3 else 0),
    "sum of all": ms.sum,
    "mean, last dim": lambda m: ms.mean(m, -1),
    "std, last dim": lambda m: ms.std(m, -1),
    "amax, last dim": lambda m: ms.amax(m, -1),
    "amax, dim 1 of 3, or 0": lambda m: ms.amax(m, 1 if m.ndim == 3 else 0),
    "count, last dim": lambda m: ms.count(m, -1),
    "first, dim 1 of 3, or 0": lambda m: ms.first(m, 1 if m.ndim == 3 else 0),
    "cumsum, last dim": lambda m: ms.cumsum(m, -1),
    "softmax, last dim": lambda m: ms.softmax(m, -1),
    "m * m": lambda m: m * m,
    "mse_loss": lambda m: ms.mse_loss(m, m),
}
BACK: dict[str, Callable[[Any], Any]] = {
    "gradient of mean": lambda m: ms.mean(m, -1).sum(),
    "gradient of softmax": lambda m: ms.softmax(m, -1).sum(),
}


def samples(shape: tuple[int, ...]) -> dict[str, ms.MaskedTensor]:
    """Prefixes of a tenth to all of dim 1, in each form."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shape[1] // 10, shape[1] + 1, shape[:1], generator=generator)
    held = ms.from_lengths(torch.randn(shape, generator=generator), lengths, 1)
    made = {form: held.to_mask_layout(form) for form in FORMS}
    made["bool"] = ms.as_masked_tensor(held.get_data(), held.get_mask())  # a byte a cell, not a broadcast row
    return made


def with_gradient(op: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def back(m: ms.MaskedTensor) -> None:
        leaf = m.detach().requires_grad_()
        op(leaf).backward()

    return back


def seconds(op: Callable[[Any], Any], made: dict[str, ms.MaskedTensor]) -> dict[str, float]:
    """The median time of the processor that each form takes on one thread, in turn: others may use the machine too."""
    taken: dict[str, list[float]] = {form: [] for form in made}
    for round_ in range(ROUNDS + 1):
        for form, tensor in made.items():
            gc.collect()
            start = time.process_time()
            op(tensor)
            if round_:  # the first one brings pages and plans
                taken[form].append(time.process_time() - start)
    return {form: median(times) for form, times in taken.items()}


def main() -> None:
    torch.set_num_threads(1)
    with ms.using(threads=1):
        table()


def table() -> None:
    print("float32, one thread; a mask of bools has a byte a cell; times of it as 1\n")
    print("| shape | op | bool, ms | lengths | packed |\n|---|---|---:|---:|---:|")
    for shape in SHAPES:
        made = samples(shape)
        for name, op in (OPS | {name: with_gradient(op) for name, op in BACK.items()}).items():
            took = seconds(op, made)
            print(
                f"| {shape} | {name} | {took['bool'] * 1e3:.1f} | {took['lengths'] / took['bool']:.2f} | "
                f"{took['packed'] / took['bool']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
