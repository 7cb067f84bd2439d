"""python -m benchmarks.sparse: reductions and softmax of CSR tensors beside strided ones and torch.sparse, in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median

import torch

import maskserve as ms

N = 4_000
SHARES = (0.001, 0.01, 0.1)
ROUNDS = 5


def sample(share: float) -> torch.Tensor:
    """A random (N, N) CSR tensor of which a share of the cells is stored."""
    places = torch.randint(0, N * N, (int(N * N * share),), generator=torch.Generator().manual_seed(1)).unique()
    values = torch.rand(len(places), generator=torch.Generator().manual_seed(2))
    indices = torch.stack([places // N, places % N])
    made: torch.Tensor = torch.sparse_coo_tensor(indices, values, (N, N), check_invariants=False, is_coalesced=True)
    return made.to_sparse_csr()


def contenders(share: float) -> dict[str, dict[str, Callable[[], object]]]:
    """By op: ours on what is stored, ours on every cell, torch.sparse where it has the op (there 0 stands for missing)."""
    csr = sample(share)
    ours: ms.MaskedTensor = ms.as_masked_tensor(csr)
    dense = ours.to_dense()
    coo = csr.to_sparse_coo()
    made: dict[str, dict[str, Callable[[], object]]] = {
        "sum of rows": {"torch.sparse": lambda: torch.sparse.sum(coo, 1)},
        "sum of columns": {"torch.sparse": lambda: torch.sparse.sum(coo, 0)},
        "largest of rows": {},
        "softmax of rows": {"torch.sparse": lambda: torch.sparse.softmax(coo, 1)},
    }
    ops: tuple[Callable[[ms.MaskedTensor], object], ...] = (
        lambda x: ms.sum(x, 1), lambda x: ms.sum(x, 0), lambda x: ms.amax(x, 1), lambda x: ms.softmax(x, 1),
    )  # fmt: skip
    for (name, others), op in zip(made.items(), ops, strict=True):
        made[name] = {"stored": lambda op=op: op(ours), "every cell": lambda op=op: op(dense)} | others
    return made


def seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median time of the processor that each takes on one thread, in turn: others may use the machine too."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            gc.collect()
            start = time.process_time()
            call()
            taken[name].append(time.process_time() - start)
    return {name: median(times) for name, times in taken.items()}


def main() -> None:
    torch.set_num_threads(1)
    with ms.using(threads=1):
        table()


def table() -> None:
    print(f"float32 ({N}, {N}) in CSR; times of the strided op as 1\n")
    print("| stored | op | stored cells | torch.sparse |\n|---|---|---|---|")
    for share in SHARES:
        for name, calls in contenders(share).items():
            took = seconds(calls)
            ratios = [took[who] / took["every cell"] if who in took else None for who in ("stored", "torch.sparse")]
            print(
                f"| {share:.1%} | {name} | " + " | ".join("--" if r is None else f"{r:.2f}" for r in ratios) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
