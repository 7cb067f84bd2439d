"""Moves: one row each. Data and mask take the same way."""

from __future__ import annotations

from typing import Any

from maskserve.ops import layouts
from maskserve.ops.layouts import Rule
from maskserve.ops.parameters import REQUIRED, Parameter, Type
from maskserve.ops.rows import Cells, Move


def _placed(name: str, summary: str, layout: Rule, *parameters: Parameter, **more: Any) -> Move:
    """A move whose result is known from the shape, so that expressions may call it."""
    return Move(
        name=name, summary=summary, layout=layout, parameters=parameters, outline="maskserve.outlines:move", **more
    )


def _dim(name: str, help: str, default: Any = REQUIRED) -> Parameter:
    return Parameter(name=name, type=Type.DIM, default=default, help=help)


def _dims(name: str, help: str, default: Any = REQUIRED) -> Parameter:
    return Parameter(name=name, type=Type.DIMS, default=default, help=help)


def _sizes(name: str, help: str) -> Parameter:
    return Parameter(name=name, type=Type.SIZES, default=REQUIRED, help=help)


def _whole(name: str, help: str, default: Any = REQUIRED) -> Parameter:
    return Parameter(name=name, type=Type.WHOLE, default=default, help=help)


_HOME = "maskserve.sparse_moves:"
RESHAPED, PERMUTED, BY_CELL = _HOME + "reshaped", _HOME + "permuted", _HOME + "by_cell"
PICKED, NARROWED, JOINED, STACKED = _HOME + "picked", _HOME + "narrowed", _HOME + "joined", _HOME + "stacked"
"""What moves the positions of sparse tensors."""

PAIR = (_dim("dim0", "one of the dims"), _dim("dim1", "the other"))
REVERSED = _dims("dims", "the dims to turn round")
SIZE = _sizes("size", "the size of each dim; -1 leaves it")
DIAGONAL = _whole("diagonal", "which diagonal ends the triangle: 0 the main one, those above it 1, 2, ...", 0)

ROWS = (
    _placed("reshape", "the cells in another shape", layouts.reshape,
            _sizes("shape", "the size of each dim; one may be -1: what is left"), copies=True, on_patterns=RESHAPED),
    Move(name="reshape_as", summary="the cells in the shape of another tensor", function=".moves:reshape_as"),
    Move(name="view", summary="the cells in another shape, sharing memory", on_patterns=RESHAPED),
    Move(name="view_as", summary="the cells in the shape of another tensor, sharing memory", function=".moves:view_as"),
    _placed("flatten", "dims from start_dim to end_dim as one", layouts.flatten,
            _dim("start_dim", "the first dim to join", 0), _dim("end_dim", "the last one", -1), copies=True,
            on_patterns=RESHAPED),
    _placed("ravel", "all dims as one", layouts.flatten, copies=True, on_patterns=RESHAPED),
    Move(name="unflatten", summary="one dim as several", on_patterns=RESHAPED),
    _placed("transpose", "two dims exchanged", layouts.transpose, *PAIR, torch=("swapdims",), on_patterns=PERMUTED),
    Move(name="swapaxes", summary="two dims exchanged, numpy's word", on_patterns=PERMUTED),
    _placed("t", "a matrix with its two dims exchanged", layouts.matrix, on_patterns=PERMUTED),
    _placed("adjoint", "the last two dims exchanged, and complex cells conjugated", layouts.last_two),
    _placed("permute", "dims in another order", layouts.permute, _dims("dims", "the dims in their new order"),
            on_patterns=PERMUTED),
    _placed("movedim", "some dims at other places", layouts.movedim,
            _dims("source", "the dims to move"), _dims("destination", "where each goes"), torch=("moveaxis",),
            on_patterns=PERMUTED),
    _placed("squeeze", "dims of size 1 left out", layouts.squeeze,
            _dims("dim", "the dims to leave out where their size is 1; all when not given", None), on_patterns=RESHAPED),
    _placed("unsqueeze", "a new dim of size 1", layouts.unsqueeze, _dim("dim", "where the new dim stands"), on_patterns=RESHAPED),
    Move(name="atleast_1d", summary="at least 1 dim, new ones of size 1", cells=Cells.ALL),
    Move(name="atleast_2d", summary="at least 2 dims, new ones of size 1", cells=Cells.ALL),
    Move(name="atleast_3d", summary="at least 3 dims, new ones of size 1", cells=Cells.ALL),
    _placed("expand", "dims of size 1 repeated without a copy", layouts.expand, SIZE),
    Move(name="expand_as", summary="dims of size 1 repeated to the shape of another tensor", function=".moves:expand_as"),
    _placed("broadcast_to", "dims of size 1 repeated to a shape", layouts.expand, SIZE),
    Move(name="broadcast_tensors", summary="tensors repeated to one shape", cells=Cells.ALL, several=True),
    Move(name="meshgrid", summary="grids of coordinates", cells=Cells.ALL, several=True),
    Move(name="repeat", summary="copies side by side"),
    Move(name="tile", summary="copies side by side, numpy's word"),
    Move(name="repeat_interleave", summary="each cell several times", function=".moves:repeat_interleave"),
    _placed("narrow", "a range of one dim", layouts.narrow,
            _dim("dim", "the dim to cut"), _whole("start", "the first index that is kept"),
            _whole("length", "how many are"), on_patterns=NARROWED),
    _placed("select", "one index of one dim", layouts.select,
            _dim("dim", "the dim to leave"), _whole("index", "which of its indices; negative ones count from the end"),
            on_patterns=PICKED),
    Move(name="unfold", summary="windows along one dim, as a new last dim", unlike=("nn.functional.unfold",)),
    _placed("diagonal", "the diagonal of two dims as the last dim", layouts.diagonal,
            _whole("offset", "which diagonal: 0 the main one", 0), _dim("dim1", "the dim of its rows", 0),
            _dim("dim2", "the dim of its columns", 1)),
    Move(name="diag", summary="the diagonal of a matrix, or the matrix with this diagonal and 0 beside it", zeros=True),
    Move(name="diagflat", summary="the matrix with all cells on its diagonal and 0 beside it", zeros=True),
    Move(name="diag_embed", summary="matrices with the last dim on their diagonal and 0 beside it", zeros=True),
    Move(name="block_diag", summary="the matrix with these matrices on its diagonal and 0 beside them", cells=Cells.ALL,
         zeros=True),
    _placed("tril", "the lower triangle, 0 above it", layouts.triangle, DIAGONAL, zeros=True, copies=True),
    _placed("triu", "the upper triangle, 0 below it", layouts.triangle, DIAGONAL, zeros=True, copies=True),
    _placed("flip", "some dims in reverse order", layouts.in_place, REVERSED, copies=True),
    Move(name="fliplr", summary="columns in reverse order"),
    Move(name="flipud", summary="rows in reverse order"),
    Move(name="rot90", summary="turned by quarter circles in the plane of two dims"),
    _placed("roll", "shifted along dims; what leaves at one end enters at the other", layouts.rolled,
            _sizes("shifts", "by how many places"),
            _dims("dims", "along which dims, one a shift; all cells in a row when not given", None), copies=True),
    Move(name="cat", summary="tensors one after the other along a dim", cells=Cells.LIST, torch=("concat", "concatenate"),
         on_patterns=JOINED),
    Move(name="stack", summary="tensors one after the other along a new dim", cells=Cells.LIST, on_patterns=STACKED),
    Move(name="hstack", summary="tensors side by side, column after column", cells=Cells.LIST),
    Move(name="vstack", summary="tensors below each other, row after row", cells=Cells.LIST, torch=("row_stack",)),
    Move(name="dstack", summary="tensors behind each other, along dim 2", cells=Cells.LIST),
    Move(name="column_stack", summary="vectors as the columns of a matrix", cells=Cells.LIST),
    Move(name="cartesian_prod", summary="every choice of one cell of each tensor", cells=Cells.ALL),
    Move(name="combinations", summary="every choice of r cells"),
    Move(name="unbind", summary="one tensor for each index of a dim", several=True),
    Move(name="split", summary="consecutive parts of a size, or of several sizes", several=True),
    Move(name="split_with_sizes", summary="consecutive parts of several sizes", several=True),
    Move(name="chunk", summary="a number of consecutive parts, the last one smaller", several=True),
    Move(name="tensor_split", summary="a number of consecutive parts of nearly one size", several=True),
    Move(name="hsplit", summary="consecutive parts along the columns", several=True),
    Move(name="vsplit", summary="consecutive parts along the rows", several=True),
    Move(name="dsplit", summary="consecutive parts along dim 2", several=True),
    Move(name="pad", summary="new cells at the ends of dims: masked, or valid with the value that is given",
         function=".moves:pad"),
    Move(name="gather", summary="cells along a dim by an index for each; a masked index gives a masked cell",
         function=".moves:gather"),
    Move(name="take_along_dim", summary="cells along a dim by an index that broadcasts; a masked index gives a masked cell",
         function=".moves:take_along_dim"),
    Move(name="index_select", summary="indices of a dim; a masked index gives masked cells", function=".moves:index_select",
         on_patterns=PICKED),
    Move(name="take", summary="cells by their flat index; a masked index gives a masked cell", function=".moves:take"),
    Move(name="masked_select", summary="the cells where a condition is valid and true, in one dim",
         function=".moves:masked_select"),
    Move(name="masked_fill", summary="a valid value where a condition is true; masked where the condition is",
         function=".moves:masked_fill"),
    Move(name="masked_scatter", summary="the next cells of source where a condition is true", function=".moves:masked_scatter"),
    Move(name="index_fill", summary="a valid value at indices of a dim", function=".moves:index_fill"),
    Move(name="index_copy", summary="indices of a dim with their cells taken from source", function=".moves:index_copy"),
    Move(name="scatter", summary="cells along a dim, by an index for each, taken from src", function=".moves:scatter"),
    Move(name="select_scatter", summary="one index of one dim with its cells taken from src", cells=Cells.TWO),
    Move(name="slice_scatter", summary="a range of one dim with its cells taken from src", cells=Cells.TWO),
    Move(name="diagonal_scatter", summary="a diagonal with its cells taken from src", cells=Cells.TWO),
    Move(name="real", summary="the real part, sharing memory", function=".moves:real", attribute=True),
    Move(name="imag", summary="the imaginary part, sharing memory", function=".moves:imag", attribute=True),
    Move(name="conj", summary="the complex conjugate, sharing memory", on_patterns=BY_CELL, keeps_places=True),
    Move(name="resolve_conj", summary="the cells with a pending conjugation done", on_patterns=BY_CELL, keeps_places=True),
    Move(name="resolve_neg", summary="the cells with a pending negation done", on_patterns=BY_CELL, keeps_places=True),
    Move(name="view_as_real", summary="real and imaginary parts as a new last dim, sharing memory",
         function=".moves:view_as_real"),
    Move(name="view_as_complex", summary="the last dim's two cells as a complex one, valid where both are, sharing memory",
         function=".moves:view_as_complex"),
    Move(name="pixel_shuffle", summary="channels as finer rows and columns"),
    Move(name="pixel_unshuffle", summary="finer rows and columns as channels"),
    Move(name="channel_shuffle", summary="channels of several groups in turn"),
    Move(name="clone", summary="a copy in memory of its own", on_patterns=BY_CELL, keeps_places=True),
    Move(name="contiguous", summary="the cells in one run of memory, copied where they are not", on_patterns=BY_CELL,
         keeps_places=True),
    Move(name="detach", summary="the same cells without gradient history", on_patterns=BY_CELL, keeps_places=True),
)  # fmt: skip
