"""python -m benchmarks.attention: attention over padded sequences, beside torch's own with the padding as an explicit mask."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional

import maskserve as ms

SHAPES = ((8, 8, 128, 64), (2, 8, 512, 64), (1, 8, 1024, 64), (4, 8, 1024, 64))
"""Sequences, heads, words, cells of a head."""
ROUNDS = 9


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    print(f"f32, {torch.get_num_threads()} threads; a third to all of the words are there\n")
    print(
        "| sequences, heads, words, cells | gradient | maskserve | torch | times |\n| --- | --- | ---: | ---: | ---: |"
    )
    for shape in SHAPES:
        plain = [torch.randn(shape) for _ in range(3)]
        n_sequences, _, n_words, _ = shape
        valid = torch.arange(n_words) < torch.linspace(n_words / 3, n_words, n_sequences).long()[:, None]
        rows = valid[:, None, :, None].expand(shape)
        for wants_gradient in (False, True):
            leaves = [x.clone().requires_grad_(wants_gradient) for x in plain]
            masked = [ms.as_masked_tensor(x, rows) for x in leaves]

            def ours(masked: list[ms.MaskedTensor] = masked, backward: bool = wants_gradient) -> object:
                made = functional.scaled_dot_product_attention(*masked)  # type: ignore[arg-type]
                return made.sum().backward(retain_graph=True) if backward else made

            def theirs(
                q: list[torch.Tensor] = leaves, met: torch.Tensor = valid, backward: bool = wants_gradient
            ) -> object:
                made = functional.scaled_dot_product_attention(q[0], q[1], q[2], attn_mask=met[:, None, None, :])
                return made.sum().backward() if backward else made

            ours()
            theirs()
            taken = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
            one, other = (median(times) * 1e3 for times in zip(*taken, strict=True))
            asked = "yes" if wants_gradient else "no"
            print(f"| {shape} | {asked} | {one:.3g} ms | {other:.3g} ms | {one / other:.2g} |")


if __name__ == "__main__":
    main()
