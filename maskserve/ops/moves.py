"""Moves: one row each. Data and mask take the same way."""

from __future__ import annotations

from maskserve.ops.rows import Move

ROWS = (
    Move(name="reshape", summary="the cells in another shape"),
    Move(name="view", summary="the cells in another shape, sharing memory"),
    Move(name="flatten", summary="dims from start_dim to end_dim as one"),
    Move(name="unflatten", summary="one dim as several"),
    Move(name="transpose", summary="two dims exchanged", torch=("swapaxes", "swapdims")),
    Move(name="t", summary="a matrix with its two dims exchanged"),
    Move(name="permute", summary="dims in another order"),
    Move(name="movedim", summary="some dims at other places", torch=("moveaxis",)),
    Move(name="squeeze", summary="dims of size 1 left out"),
    Move(name="unsqueeze", summary="a new dim of size 1"),
    Move(name="expand", summary="dims of size 1 repeated without a copy"),
    Move(name="narrow", summary="a range of one dim"),
    Move(name="select", summary="one index of one dim"),
)
