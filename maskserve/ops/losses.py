"""Losses: one row each. Each is computed cell by cell, or sample by sample, and then reduced over the valid ones."""

from __future__ import annotations

from dataclasses import replace

from maskserve.ops.families import FLOATS, REAL
from maskserve.ops.parameters import DIMS, Parameter, Type
from maskserve.ops.rows import Elementwise, Loss

PAIR = ("input", "target")
REDUCTION = Parameter(
    name="reduction", type=Type.CHOICE, default="mean", choices=("none", "mean", "sum"), keyword_only=True,
    help="none: each loss; mean, sum: over the valid ones",
)  # fmt: skip
BATCHMEAN = replace(
    REDUCTION,
    choices=(*REDUCTION.choices, "batchmean"),
    help=f"{REDUCTION.help}; batchmean: their sum, by rows with any",
)
DIM = replace(
    DIMS, keyword_only=True, help="dims of the losses to reduce over, such as all but the first; all when not given"
)
WEIGHT = Parameter(
    name="weight",
    type=Type.TENSOR,
    help="what each cell's loss counts for; a masked weight masks it; the mean is by their sum",
)
RESCALING = replace(WEIGHT, help="each cell's loss is multiplied by it; a masked weight masks it")
OF_CLASSES = replace(
    WEIGHT, help="what each class counts for, one weight a class; the mean is by the sum of those of the targets"
)
POSITIVE = Parameter(
    name="pos_weight", type=Type.TENSOR, keyword_only=True, help="what a target of 1 counts for, by class"
)
DELTA = Parameter(
    name="delta", type=Type.NUMBER, default=1.0, keyword_only=True, help="where the square becomes a line"
)
BETA = replace(DELTA, name="beta")
LOGARITHMS = Parameter(
    name="log_target", type=Type.FLAG, default=False, keyword_only=True, help="whether target holds logarithms"
)
IGNORED = Parameter(
    name="ignore_index", type=Type.NUMBER, default=-100, keyword_only=True, help="a target of this class is masked"
)
SMOOTHING = Parameter(
    name="label_smoothing", type=Type.NUMBER, default=0.0, keyword_only=True,
    help="the part of each target that is spread over the valid classes of its sample",
)  # fmt: skip


def _of_cells(
    name: str,
    summary: str,
    *parameters: Parameter,
    unsafe: bool = False,
    operands: tuple[str, ...] = PAIR,
    constants: tuple[str, ...] = (),
) -> Elementwise:
    return Elementwise(
        name=name, summary=summary, function=f".losses:{name}", operands=operands, parameters=parameters, accepts=REAL,
        unsafe_floats=unsafe, n_optional=len(operands) - len(PAIR), no_gradient_by=constants,
    )  # fmt: skip


ROWS = (
    Loss(name="mse_loss", summary="squares of the differences", parameters=(WEIGHT, REDUCTION, DIM), weighs_mean=True,
         cells=_of_cells("mse_loss", "square of the difference")),
    Loss(name="l1_loss", summary="absolute differences", parameters=(WEIGHT, REDUCTION, DIM), weighs_mean=True,
         cells=_of_cells("l1_loss", "absolute difference")),
    Loss(name="huber_loss", summary="squares of small differences, and delta times the absolute of large ones",
         parameters=(RESCALING, DELTA, REDUCTION, DIM), cells=_of_cells("huber_loss", "square, or line", DELTA)),
    Loss(name="smooth_l1_loss", summary="absolute differences, rounded off below beta", parameters=(BETA, REDUCTION, DIM),
         cells=_of_cells("smooth_l1_loss", "absolute difference, rounded off", BETA)),
    Loss(name="binary_cross_entropy", summary="cross entropies of probabilities with targets from 0 to 1",
         parameters=(RESCALING, REDUCTION, DIM),
         cells=_of_cells("binary_cross_entropy", "cross entropy of a probability", unsafe=True)),
    Loss(name="binary_cross_entropy_with_logits", summary="cross entropies of logits with targets from 0 to 1",
         parameters=(RESCALING, POSITIVE, REDUCTION, DIM), third="pos_weight",
         cells=_of_cells("binary_cross_entropy_with_logits", "cross entropy of a logit", operands=(*PAIR, "pos_weight"),
                        constants=("pos_weight",))),
    Loss(name="kl_div", summary="terms of the Kullback-Leibler divergence of log-probabilities from probabilities",
         parameters=(LOGARITHMS, BATCHMEAN, DIM), cells=_of_cells("kl_div", "term of the divergence", LOGARITHMS)),
    Loss(name="nll_loss", summary="-log-probabilities of the target classes, which lie along dim 1",
         parameters=(OF_CLASSES, IGNORED, REDUCTION, DIM), weighs_mean=True, accepts=FLOATS),
    Loss(name="cross_entropy", summary="-log-softmax of the target classes over the valid ones, which lie along dim 1",
         parameters=(OF_CLASSES, IGNORED, SMOOTHING, REDUCTION, DIM), weighs_mean=True, of_logits=True, accepts=FLOATS),
)  # fmt: skip
"""torch.nn.functional's names and meanings; its documentation has the formulas."""
