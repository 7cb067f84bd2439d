"""Reductions: one row each."""

from __future__ import annotations

import math

from maskserve.dtypes import COMPLEX, NUMERIC, boolean, i64, u64
from maskserve.ops import passes
from maskserve.ops.parameters import (
    CORRECTION,
    DIMS,
    DTYPE,
    EMPTY,
    KEEPDIM,
    KEYWORD_DTYPE,
    MIN_COUNT,
    NAN,
    ORD,
    REQUIRED,
    UNBIASED,
    WEIGHTS,
    Parameter,
    Params,
    Type,
)
from maskserve.ops.results import always, floated, same, spread, summed, summed_or_weighted
from maskserve.ops.rows import Reduction

OURS = (MIN_COUNT, EMPTY, NAN)
ORDERED = NUMERIC | {u64}
SUMMED = ORDERED | COMPLEX
NUMBERS = NUMERIC - {boolean}
QUANTILE = Parameter(
    name="q", type=Type.NUMBERS, default=REQUIRED, help="which quantile, from 0 to 1; several give a new first dim"
)
INTERPOLATION = Parameter(
    name="interpolation", type=Type.CHOICE, default="linear", keyword_only=True,
    choices=("linear", "lower", "higher", "midpoint", "nearest"), help="what a quantile between two cells is",
)  # fmt: skip


def shares(params: Params) -> tuple[float, ...] | None:
    """The quantiles that are asked for; None for one that is no list."""
    return params["q"] if isinstance(params["q"], tuple) else None


def checked_shares(params: Params) -> str | None:
    """Why the shares are none."""
    return None if all(0 <= q <= 1 for q in shares(params) or (params["q"],)) else "q must lie from 0 to 1"


ROWS = (
    Reduction(
        name="sum",
        summary="sum of the valid cells",
        parameters=(DIMS, KEEPDIM, DTYPE, WEIGHTS, *OURS),
        accepts=SUMMED, on_complex=".complexes:by_parts",
        result=summed_or_weighted, passes=(passes.TOTAL,), finalize=".reductions:finalize_sum", identity=0,
        weighted=(passes.WEIGHTED_TOTAL,), finalize_weighted=".weighted:finalize_sum",
        vjp=".gradients:total", vjp_reads_cells=False, vjp_weighted=".gradients:weighted_total",
    ),
    Reduction(
        name="mean",
        summary="arithmetic mean of the valid cells",
        parameters=(DIMS, KEEPDIM, DTYPE, WEIGHTS, *OURS),
        accepts=SUMMED, on_complex=".complexes:by_parts",
        result=floated, passes=(passes.TOTAL,), finalize=".reductions:finalize_mean",
        weighted=(passes.WEIGHTED_TOTAL,), finalize_weighted=".weighted:finalize_mean",
        vjp=".gradients:mean", vjp_reads_cells=False, vjp_weighted=".gradients:weighted_mean",
    ),
    Reduction(
        name="var",
        summary="variance of the valid cells; masked where their count does not exceed `correction`",
        parameters=(DIMS, UNBIASED, KEEPDIM, CORRECTION, KEYWORD_DTYPE, WEIGHTS, *OURS),
        accepts=SUMMED, on_complex=".complexes:spread",
        result=spread, passes=(passes.MOMENTS,), finalize=".reductions:finalize_var",
        weighted=(passes.WEIGHTED_MOMENTS,), finalize_weighted=".weighted:finalize_var",
        needs=lambda params: params["correction"],
        vjp=".gradients:var", vjp_weighted=".gradients:weighted_var",
    ),
    Reduction(
        name="std",
        summary="standard deviation of the valid cells; masked where their count does not exceed `correction`",
        parameters=(DIMS, UNBIASED, KEEPDIM, CORRECTION, KEYWORD_DTYPE, WEIGHTS, *OURS),
        accepts=SUMMED, on_complex=".complexes:root_of_spread",
        result=spread, passes=(passes.MOMENTS,), finalize=".reductions:finalize_std",
        weighted=(passes.WEIGHTED_MOMENTS,), finalize_weighted=".weighted:finalize_std",
        needs=lambda params: params["correction"],
        vjp=".gradients:std", vjp_weighted=".gradients:weighted_std",
    ),
    Reduction(
        name="amax", aliases=("max",),
        summary="largest valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=ORDERED,
        result=same, passes=(passes.LARGEST,), finalize=".reductions:finalize_best",
        vjp=".gradients:extreme",
    ),
    Reduction(
        name="amin", aliases=("min",),
        summary="smallest valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=ORDERED,
        result=same, passes=(passes.SMALLEST,), finalize=".reductions:finalize_best",
        vjp=".gradients:extreme",
    ),
    Reduction(
        name="argmax",
        summary="index, within its slice, of the first largest valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=ORDERED,
        result=always(i64), passes=(passes.FIRST_LARGEST,), finalize=".reductions:finalize_at",
        steps=True,
    ),
    Reduction(
        name="argmin",
        summary="index, within its slice, of the first smallest valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=ORDERED,
        result=always(i64), passes=(passes.FIRST_SMALLEST,), finalize=".reductions:finalize_at",
        steps=True,
    ),
    Reduction(
        name="count",
        summary="how many cells are valid; never masked",
        parameters=(DIMS, KEEPDIM, NAN),
        accepts=SUMMED, on_complex=".complexes:magnitude",
        result=always(i64), passes=(passes.COUNT,), finalize=".reductions:finalize_count", identity=0, never_masked=True,
        steps=True,
    ),
    Reduction(
        name="any",
        summary="whether any valid cell is nonzero",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=SUMMED, on_complex=".complexes:magnitude",
        result=always(boolean), passes=(passes.TRUTHS,), finalize=".reductions:finalize_any", identity=False,
        steps=True,
    ),
    Reduction(
        name="all",
        summary="whether every valid cell is nonzero",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=SUMMED, on_complex=".complexes:magnitude",
        result=always(boolean), passes=(passes.TRUTHS,), finalize=".reductions:finalize_all", identity=True,
        steps=True,
    ),
    Reduction(
        name="logsumexp",
        summary="log of the sum of exponentials of the valid cells",
        parameters=(DIMS, KEEPDIM, KEYWORD_DTYPE, *OURS),
        accepts=NUMERIC | COMPLEX, on_complex=".complexes:logsumexp",
        result=floated, passes=(passes.EXPONENTIALS,), finalize=".reductions:finalize_logsumexp", identity=-math.inf,
        vjp=".gradients:logsumexp",
    ),
    Reduction(
        name="median",
        summary="middle valid cell, or the mean of the two middle ones (1, 2, 3, 4 -> 2.5)",
        parameters=(DIMS, KEEPDIM, KEYWORD_DTYPE, *OURS),
        accepts=ORDERED,
        result=floated, select=".selections:median",
        differs="torch.median gives the lower of two middle cells, maskserve.median their mean",
        vjp=".gradients_of_orders:median",
    ),
    Reduction(
        name="quantile",
        summary="value below which the share q of the valid cells lies",
        parameters=(QUANTILE, DIMS, KEEPDIM, INTERPOLATION, KEYWORD_DTYPE, *OURS),
        accepts=ORDERED,
        result=floated, select=".selections:quantile", leading=shares, leading_dim="quantile",
        check=checked_shares,
        vjp=".gradients_of_orders:quantile",
    ),
    Reduction(
        name="prod",
        summary="product of the valid cells",
        parameters=(DIMS, KEEPDIM, DTYPE, *OURS),
        accepts=NUMERIC | COMPLEX, on_complex=".complexes:product",
        result=summed, passes=(passes.PRODUCT,), finalize=".products:finalize_prod", identity=1,
        vjp=".gradients_of_products:prod",
    ),
    Reduction(
        name="norm",
        summary="(sum of |cell|^ord)^(1/ord) of the valid cells; for inf the largest |cell|, for 0 how many are nonzero",
        parameters=(ORD, DIMS, KEEPDIM, DTYPE, *OURS),
        accepts=NUMERIC | COMPLEX, on_complex=".complexes:magnitude",
        result=spread, passes=(passes.POWERS,), finalize=".norms:finalize_norm", identity=0,
        torch=("vector_norm",), torch_words={"p": "ord", "x": "input"}, torch_values={"fro": 2},
        unlike=("linalg.norm",),  # of a matrix it is the largest singular value, and the like
        vjp=".gradients_of_norms:norm",
    ),
    Reduction(
        name="max",
        summary="largest valid cell and, along a dim, its index",
        parameters=(DIMS, KEEPDIM, MIN_COUNT, NAN),
        verb=None, accepts=ORDERED, picks=True, indices=True, binary="maximum",
        result=same, passes=(passes.FIRST_LARGEST,), finalize=".reductions:finalize_at",
        vjp=".gradients_of_orders:extreme_or_picked",
    ),
    Reduction(
        name="min",
        summary="smallest valid cell and, along a dim, its index",
        parameters=(DIMS, KEEPDIM, MIN_COUNT, NAN),
        verb=None, accepts=ORDERED, picks=True, indices=True, binary="minimum",
        result=same, passes=(passes.FIRST_SMALLEST,), finalize=".reductions:finalize_at",
        vjp=".gradients_of_orders:extreme_or_picked",
    ),
    Reduction(
        name="mode",
        summary="most frequent valid cell, the smallest of several, and, along a dim, the index of its first",
        parameters=(DIMS, KEEPDIM, MIN_COUNT, NAN),
        accepts=ORDERED, picks=True, indices=True, sorts=True,
        result=same, select=".selections:mode", torch_defaults={"dim": -1},
        vjp=".gradients_of_orders:picked", vjp_reads_cells=False,
    ),
    Reduction(
        name="first",
        summary="first valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=ORDERED,
        result=same, passes=(passes.FIRST,), finalize=".reductions:finalize_best",
        vjp=".gradients_of_orders:first", vjp_reads_cells=False,
    ),
    Reduction(
        name="last",
        summary="last valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=ORDERED,
        result=same, passes=(passes.LAST,), finalize=".reductions:finalize_best",
        vjp=".gradients_of_orders:last", vjp_reads_cells=False,
    ),
    Reduction(
        name="ptp",
        summary="range of the valid cells: the largest less the smallest",
        parameters=(DIMS, KEEPDIM, *OURS),
        accepts=NUMBERS,
        result=same, passes=(passes.EXTENT,), finalize=".places:finalize_ptp",
        vjp=".gradients:extent",
    ),
    Reduction(
        name="count_distinct",
        summary="how many different values the valid cells have, NaN being one; never masked",
        parameters=(DIMS, KEEPDIM, NAN),
        accepts=ORDERED, sorts=True,
        result=always(i64), select=".selections:count_distinct", never_masked=True,
        steps=True,
    ),
)  # fmt: skip
