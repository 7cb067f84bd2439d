"""Reductions: one row each."""

from __future__ import annotations

import math

from maskserve.dtypes import boolean, i64
from maskserve.ops import passes
from maskserve.ops.rows import (
    CORRECTION,
    DIMS,
    DTYPE,
    EMPTY,
    KEEPDIM,
    KEYWORD_DTYPE,
    MIN_COUNT,
    NAN,
    UNBIASED,
    Reduction,
    always,
    floated,
    same,
    summed,
)

OURS = (MIN_COUNT, EMPTY, NAN)

ROWS = (
    Reduction(
        name="sum",
        summary="sum of the valid cells",
        parameters=(DIMS, KEEPDIM, DTYPE, *OURS),
        result=summed, passes=(passes.TOTAL,), finalize=".reductions:finalize_sum", identity=0,
    ),
    Reduction(
        name="mean",
        summary="arithmetic mean of the valid cells",
        parameters=(DIMS, KEEPDIM, DTYPE, *OURS),
        result=floated, passes=(passes.TOTAL,), finalize=".reductions:finalize_mean",
    ),
    Reduction(
        name="var",
        summary="variance of the valid cells; masked where their count does not exceed `correction`",
        parameters=(DIMS, UNBIASED, KEEPDIM, CORRECTION, KEYWORD_DTYPE, *OURS),
        result=floated, passes=(passes.MOMENTS,), finalize=".reductions:finalize_var",
        needs=lambda params: params["correction"],
    ),
    Reduction(
        name="std",
        summary="standard deviation of the valid cells; masked where their count does not exceed `correction`",
        parameters=(DIMS, UNBIASED, KEEPDIM, CORRECTION, KEYWORD_DTYPE, *OURS),
        result=floated, passes=(passes.MOMENTS,), finalize=".reductions:finalize_std",
        needs=lambda params: params["correction"],
    ),
    Reduction(
        name="amax", aliases=("max",),
        summary="largest valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        result=same, passes=(passes.LARGEST,), finalize=".reductions:finalize_best",
    ),
    Reduction(
        name="amin", aliases=("min",),
        summary="smallest valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        result=same, passes=(passes.SMALLEST,), finalize=".reductions:finalize_best",
    ),
    Reduction(
        name="argmax",
        summary="index, within its slice, of the first largest valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        result=always(i64), passes=(passes.FIRST_LARGEST,), finalize=".reductions:finalize_at",
    ),
    Reduction(
        name="argmin",
        summary="index, within its slice, of the first smallest valid cell",
        parameters=(DIMS, KEEPDIM, *OURS),
        result=always(i64), passes=(passes.FIRST_SMALLEST,), finalize=".reductions:finalize_at",
    ),
    Reduction(
        name="count",
        summary="how many cells are valid; never masked",
        parameters=(DIMS, KEEPDIM, NAN),
        result=always(i64), passes=(passes.COUNT,), finalize=".reductions:finalize_count", identity=0, never_masked=True,
    ),
    Reduction(
        name="any",
        summary="whether any valid cell is nonzero",
        parameters=(DIMS, KEEPDIM, *OURS),
        result=always(boolean), passes=(passes.TRUTHS,), finalize=".reductions:finalize_any", identity=False,
    ),
    Reduction(
        name="all",
        summary="whether every valid cell is nonzero",
        parameters=(DIMS, KEEPDIM, *OURS),
        result=always(boolean), passes=(passes.TRUTHS,), finalize=".reductions:finalize_all", identity=True,
    ),
    Reduction(
        name="logsumexp",
        summary="log of the sum of exponentials of the valid cells",
        parameters=(DIMS, KEEPDIM, KEYWORD_DTYPE, *OURS),
        result=floated, passes=(passes.EXPONENTIALS,), finalize=".reductions:finalize_logsumexp", identity=-math.inf,
    ),
    Reduction(
        name="median",
        summary="middle valid cell, or the mean of the two middle ones (1, 2, 3, 4 -> 2.5)",
        parameters=(DIMS, KEEPDIM, KEYWORD_DTYPE, *OURS),
        result=floated, select=".selections:median",
        differs="torch.median gives the lower of two middle cells, maskserve.median their mean",
    ),
)  # fmt: skip
