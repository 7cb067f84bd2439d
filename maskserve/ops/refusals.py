"""Functions of torch that have no rule for a mask, and what to do instead: a row each, for the line of the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Names of torch's functions, and the calls that do what was meant."""

    functions: tuple[str, ...]
    instead: str


REFUSALS: Final = (
    Refusal(
        functions=("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv_tbc"),
        instead="convolve m.to_tensor(0), in which masked cells add nothing; the same of m.get_mask().float() and a kernel of "
        "ones counts the cells that did",
    ),
    Refusal(
        functions=("scatter_add", "index_add", "scatter_reduce", "index_reduce"),
        instead="add source.to_tensor(0), in which masked cells add nothing; the same of source.get_mask().long() counts those "
        "that did",
    ),
    Refusal(
        functions=("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        instead="give the module m.to_packed_sequence(), of sequences whose valid cells come first, and its output to "
        "as_masked_tensor",
    ),
    Refusal(
        functions=("one_hot",),
        instead="as_masked_tensor(one_hot(m.to_tensor(0), n), m.get_mask().unsqueeze(-1))",
    ),
    Refusal(
        functions=tuple(f"{kind}max_pool{n}d_with_indices" for kind in ("", "adaptive_", "fractional_") for n in (1, 2, 3)),
        instead="give return_indices=False; argmax of a part of the tensor tells where its largest valid cell stands",
    ),
    Refusal(functions=("unfold",), instead="m.unfold(dim, size, step) gives windows along one dim"),
    Refusal(functions=("lp_pool1d", "lp_pool2d", "lp_pool3d"), instead="norm of the windows of m.unfold(dim, size, step)"),
    Refusal(functions=("bilinear",), instead='einsum("...i,oij,...j->...o", x1, weight, x2), and add the bias'),
    Refusal(
        functions=("multi_margin_loss", "multilabel_margin_loss", "ctc_loss", "triplet_margin_with_distance_loss"),
        instead="call it for the samples that are valid as a whole, x.get_data()[x.get_mask().all(1)]; cross_entropy, "
        "multilabel_soft_margin_loss and triplet_margin_loss have rules for masked cells",
    ),
)  # fmt: skip
