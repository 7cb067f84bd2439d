"""Layers: one row each, made of other rows. torch.nn.functional's names and arguments, over the valid cells."""

from __future__ import annotations

from maskserve.ops.families import ANY
from maskserve.ops.parameters import REQUIRED, Parameter, Type, Within
from maskserve.ops.rows import Layer

SCALED = ("input", "weight", "bias")
SHAPE = Parameter(
    name="normalized_shape",
    type=Type.SIZES,
    default=REQUIRED,
    help="the sizes of the last dims, which are normalized together",
)
EPS = Parameter(name="eps", type=Type.REAL, default=1e-5, help="added to the variance")
SQUARE_EPS = Parameter(
    name="eps", type=Type.REAL, help="added to the mean square; the smallest step at 1 of the dtype when not given"
)
GROUPS = Parameter(name="num_groups", type=Type.COUNT, default=REQUIRED, help="how many groups the channels make")
VECTORS = Parameter(name="dim", type=Type.DIM, default=1, help="the dim that vectors lie along")
LEAST = Parameter(
    name="eps", type=Type.REAL, default=1e-8, within=Within(least=0), help="the least length that a vector counts for"
)
CAUSAL = Parameter(name="is_causal", type=Type.FLAG, default=False, help="whether a query meets no later key")
SCALE = Parameter(
    name="scale", type=Type.REAL, help="what scores are multiplied by; 1 / sqrt(cells of a key) when not given"
)
WINDOWED = ((1, "dim"), (2, "2 dims"), (3, "3 dims"))

ROWS = (
    Layer(name="layer_norm", summary="cells less the mean of their slice, by its spread: over the valid cells of the last dims",
          function="maskserve.layers:layer_norm",
          outline="maskserve.outlines:normalized", operands=SCALED, n_optional=2, parameters=(SHAPE, EPS)),
    Layer(name="rms_norm", summary="cells by the root of their slice's mean square: over the valid cells of the last dims",
          function="maskserve.layers:rms_norm",
          outline="maskserve.outlines:normalized", operands=SCALED[:2], n_optional=1, parameters=(SHAPE, SQUARE_EPS),
          scales_by_any_float=True),
    Layer(name="group_norm", summary="cells less the mean of their group of channels, by its spread: over valid cells",
          function="maskserve.layers:group_norm",
          outline="maskserve.outlines:in_groups", operands=SCALED, n_optional=2, parameters=(GROUPS, EPS)),
    Layer(name="batch_norm", summary="cells less the mean of their channel, by its spread: over the valid cells of the batch",
          function="maskserve.layers:batch_norm"),
    Layer(name="prelu", summary="input, below 0 times weight: of one cell, or of one a channel (dim 1)",
          function="maskserve.layers:prelu", outline="maskserve.outlines:sloped", operands=SCALED[:2],
          in_torchs_methods=True),
    Layer(name="rrelu", summary="input, below 0 times a slope from lower to upper: a random one in training, else the middle",
          function="maskserve.layers:rrelu"),
    Layer(name="glu", summary="the first half of the cells along dim, times the sigmoid of the other half",
          function="maskserve.layers:glu"),
    Layer(name="cosine_similarity", summary="cosine of the angle between two vectors, over the cells that are valid in both",
          function="maskserve.layers:cosine_similarity",
          outline="maskserve.outlines:cosine", operands=("x1", "x2"), parameters=(VECTORS, LEAST)),
    Layer(name="pairwise_distance", summary="norm of the difference of two vectors, over the cells that are valid in both",
          function="maskserve.layers:pairwise_distance"),
    Layer(name="cdist", summary="distances of each row of x1 from each row of x2, over the cells that are valid in both",
          function="maskserve.layers:cdist"),
    Layer(name="dropout", summary="cells of which a random part becomes 0 in training, the others by as much larger",
          function="maskserve.layers:dropout"),
    Layer(name="embedding", summary="rows of a table by their indices; a masked index gives a masked row",
          function="maskserve.layers:embedding"),
    Layer(name="scaled_dot_product_attention",
          summary="means of values, weighted by how well their keys meet each query; a query that meets no key is masked",
          function="maskserve.layers:scaled_dot_product_attention",
          outline="maskserve.outlines:attention", operands=("query", "key", "value", "attn_mask"), n_optional=1,
          parameters=(CAUSAL, SCALE)),
    Layer(name="embedding_bag", summary="sums, means or largest cells of the rows that the valid indices of each bag mean",
          function="maskserve.layers:embedding_bag"),
    Layer(name="instance_norm", summary="cells less the mean of their sample's channel, by its spread: over its valid cells",
          function="maskserve.layers:instance_norm"),
    Layer(name="diff", summary="each cell less the one before it; masked where one of the two is", accepts=ANY,
          function="maskserve.layers:diff", in_torchs_methods=True),
    *(Layer(name=f"max_pool{n}d", summary=f"the largest valid cell of each window along the last {dims}",
            function=f"maskserve.pooling:max_pool{n}d") for n, dims in WINDOWED),
    *(Layer(name=f"avg_pool{n}d", summary=f"the mean of the valid cells of each window along the last {dims}",
            function=f"maskserve.pooling:avg_pool{n}d") for n, dims in WINDOWED),
    *(Layer(name=f"adaptive_max_pool{n}d", summary=f"the largest valid cell of windows that cover the last {dims}",
            function=f"maskserve.pooling:adaptive_max_pool{n}d") for n, dims in WINDOWED),
    *(Layer(name=f"adaptive_avg_pool{n}d", summary=f"the mean of the valid cells of windows that cover the last {dims}",
            function=f"maskserve.pooling:adaptive_avg_pool{n}d") for n, dims in WINDOWED),
    Layer(name="interpolate", summary="the nearest cell, masked or valid, at places of another size; or the mean of each area's",
          function="maskserve.pooling:interpolate"),
    Layer(name="multi_head_attention_forward", summary="what torch.nn.MultiheadAttention computes, and its weights",
          function="maskserve.layers:multi_head_attention_forward"),
)  # fmt: skip
