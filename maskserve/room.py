"""How the memory of a request is shared out, and what is said where it does not do. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from maskserve.cgroup import memory_limit
from maskserve.errors import OutOfMemoryError, ParameterError

RESULT_SHARE = 4
"""The part of the memory that a streamed result may take, to be held; a larger one is written as it comes."""
MEGABYTE = 10**6
WIDEST = 9
"""The bytes of a float64 cell with its mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What must be in memory at once: `memory` is the least that does, `why` what takes it, `instead` what else helps."""

    memory: int
    why: str
    instead: str = ""


def budget_of(memory: int) -> int:
    """What cells and states may take beside a result."""
    return memory - memory // RESULT_SHARE


def memory_for(budget: int) -> int:
    """The least memory that leaves such a budget.

    >>> [budget_of(memory_for(n)) >= n > budget_of(memory_for(n) - 1) for n in (1, 2, 3, 4, 75, 76, 1000)]
    [True, True, True, True, True, True, True]
    """
    return max(budget - 1, 0) * RESULT_SHARE // (RESULT_SHARE - 1) + 1


def megabytes(n_bytes: int) -> int:
    """Whole megabytes that hold so many bytes."""
    return -(-n_bytes // MEGABYTE)


def enough(lacking: Callable[[int], int], memory: int) -> int:
    """The least memory from `memory` on, in whole megabytes, in which `lacking` says that no byte is."""
    while more := lacking(memory):
        memory = megabytes(memory + more) * MEGABYTE
    return memory


def held(sizes: Iterable[int], memory: int) -> Iterator[tuple[bool, int]]:
    """For results of such sizes, whether each is held beside those before it, and how many bytes more would let it."""
    room = memory
    for size in sizes:
        short = RESULT_SHARE * size - room
        yield short <= 0, max(short, 0)
        room = max(room - size if short <= 0 else room, memory // RESULT_SHARE)


def beyond(need: Need, allowed: int, would_do: int) -> OutOfMemoryError:
    """The error where `allowed` bytes are less than what is needed, and others would do."""
    return OutOfMemoryError(
        f"{need.why}: that takes {megabytes(need.memory)} MB, and {allowed / MEGABYTE:g} MB are allowed; give --memory "
        f"{megabytes(would_do)}MB or more{need.instead}"
    )


def check_room(op: str, n_cells: int, instead: str, parameter: str | None = None) -> None:
    """Raise where a result of so many cells, which a parameter or one cell decides, is more than this machine holds."""
    allowed = memory_limit() // WIDEST
    if n_cells > allowed:
        raise ParameterError(
            f"{op}: the result would have {n_cells} cells, and the memory here holds {allowed}: {instead}",
            parameter=parameter,
        )
