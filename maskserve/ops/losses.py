"""Losses: one row each. Each is computed cell by cell, or sample by sample, and then reduced over the valid ones."""

from __future__ import annotations

from dataclasses import replace

from maskserve.ops.families import FLOATS, REAL
from maskserve.ops.parameters import DIMS, Parameter, Type, Within
from maskserve.ops.rows import Elementwise, Loss

PAIR = ("input", "target")
RANKED = ("input1", "input2", "target")
NORMAL = ("input", "target", "var")
TRIPLETS = ("anchor", "positive", "negative")
OF_TARGETS = "maskserve.losses:of_classes"
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
    name="delta",
    type=Type.NUMBER,
    default=1.0,
    keyword_only=True,
    within=Within(least=0, is_open=True),
    help="where the square becomes a line",
)
BETA = replace(DELTA, name="beta", within=Within(least=0))
LOGARITHMS = Parameter(
    name="log_target", type=Type.FLAG, default=False, keyword_only=True, help="whether target holds logarithms"
)
MARGIN = Parameter(
    name="margin", type=Type.NUMBER, default=1.0, help="by how much those that differ must differ to cost nothing"
)
SOME_MARGIN = replace(MARGIN, within=Within(least=0, is_open=True))
NO_MARGIN = replace(MARGIN, default=0.0)
LOG_INPUT = Parameter(
    name="log_input", type=Type.FLAG, default=True, help="whether input holds logarithms of the expected counts"
)
FULL = Parameter(name="full", type=Type.FLAG, default=False, help="whether terms count that no input changes")
ABOVE_0 = Parameter(name="eps", type=Type.NUMBER, default=1e-8, help="added to what a logarithm is taken of")
LEAST_VARIANCE = replace(ABOVE_0, default=1e-6, help="the least that var counts as")
ORDER = Parameter(name="p", type=Type.REAL, default=2.0, help="the order of the norm that distances are")
STEP = replace(ABOVE_0, default=1e-6, help="added to each difference")
SWAP = Parameter(
    name="swap", type=Type.FLAG, default=False, help="whether negative may be farther from positive than from anchor"
)
IGNORED = Parameter(
    name="ignore_index", type=Type.NUMBER, default=-100, keyword_only=True, help="a target of this class is masked"
)
SMOOTHING = Parameter(
    name="label_smoothing", type=Type.NUMBER, default=0.0, keyword_only=True, within=Within(least=0, most=1),
    help="the part of each target that is spread over the valid classes of its sample",
)  # fmt: skip


def _of_cells(
    name: str,
    summary: str,
    *parameters: Parameter,
    unsafe: bool = False,
    operands: tuple[str, ...] = PAIR,
    constants: tuple[str, ...] = (),
    n_optional: int = 0,
) -> Elementwise:
    return Elementwise(
        name=name, summary=summary, function=f".losses:{name}", operands=operands, parameters=parameters, accepts=REAL,
        unsafe_floats=unsafe, n_optional=n_optional, no_gradient_by=constants,
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
                        n_optional=1, constants=("pos_weight",))),
    Loss(name="kl_div", summary="terms of the Kullback-Leibler divergence of log-probabilities from probabilities",
         parameters=(LOGARITHMS, BATCHMEAN, DIM), cells=_of_cells("kl_div", "term of the divergence", LOGARITHMS)),
    Loss(name="soft_margin_loss", summary="log(1 + exp(-target * input)), where target is 1 or -1",
         parameters=(REDUCTION, DIM),
         cells=_of_cells("soft_margin_loss", "log(1 + exp(-target * input))", constants=("target",))),
    Loss(name="hinge_embedding_loss", summary="input where target is 1, and what it lacks of margin where target is -1",
         parameters=(MARGIN, REDUCTION, DIM),
         cells=_of_cells("hinge_embedding_loss", "input, or what it lacks of margin", MARGIN, constants=("target",))),
    Loss(name="margin_ranking_loss", summary="what input1 lacks of margin above input2, or below it where target is -1",
         operands=RANKED, parameters=(NO_MARGIN, REDUCTION, DIM),
         cells=_of_cells("margin_ranking_loss", "what one lacks of margin above the other", NO_MARGIN, operands=RANKED)),
    Loss(name="poisson_nll_loss", summary="-log-likelihoods of counts, of which the input is the expected number",
         parameters=(LOG_INPUT, FULL, ABOVE_0, REDUCTION, DIM),
         cells=_of_cells("poisson_nll_loss", "-log-likelihood of a count", LOG_INPUT, FULL, ABOVE_0)),
    Loss(name="gaussian_nll_loss", summary="-log-likelihoods of target, whose mean is the input and whose variance is var",
         operands=NORMAL, each_row="var", parameters=(FULL, LEAST_VARIANCE, REDUCTION, DIM),
         cells=_of_cells("gaussian_nll_loss", "-log-likelihood of a cell", FULL, LEAST_VARIANCE, operands=NORMAL,
                        unsafe=True)),
    Loss(name="multilabel_soft_margin_loss",
         summary="cross entropies of logits with targets from 0 to 1, in the mean over the classes of a sample: the last dim",
         parameters=(RESCALING, REDUCTION, DIM), is_mean_of_classes=True, outline="",
         cells=_of_cells("multilabel_soft_margin_loss", "cross entropy of a logit")),
    Loss(name="triplet_margin_loss",
         summary="how much farther anchor is, by vectors along the last dim, from positive than from negative, and margin",
         operands=TRIPLETS, parameters=(SOME_MARGIN, ORDER, STEP, SWAP, REDUCTION, DIM), accepts=FLOATS,
         samples="maskserve.losses:of_triplets", outline=""),
    Loss(name="cosine_embedding_loss",
         summary="1 - cosine of two vectors along the last dim where target is 1, and the cosine beyond margin where it is -1",
         operands=RANKED, parameters=(NO_MARGIN, REDUCTION, DIM), accepts=FLOATS,
         samples="maskserve.losses:of_angles", outline=""),
    Loss(name="nll_loss", summary="-log-probabilities of the target classes, which lie along dim 1",
         parameters=(OF_CLASSES, IGNORED, REDUCTION, DIM), weighs_mean=True, accepts=FLOATS,
         samples=OF_TARGETS),
    Loss(name="cross_entropy", summary="-log-softmax of the target classes over the valid ones, which lie along dim 1",
         parameters=(OF_CLASSES, IGNORED, SMOOTHING, REDUCTION, DIM), weighs_mean=True, of_logits=True, accepts=FLOATS,
         samples=OF_TARGETS),
)  # fmt: skip
"""torch.nn.functional's names and meanings; its documentation has the formulas."""
