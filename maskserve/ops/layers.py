"""Layers: one row each, made of other rows. torch.nn.functional's names and arguments, over the valid cells."""

from __future__ import annotations

from maskserve.ops.rows import Layer

ROWS = (
    Layer(name="layer_norm", summary="cells less the mean of their slice, by its spread: over the valid cells of the last dims",
          function="maskserve.layers:layer_norm"),
    Layer(name="rms_norm", summary="cells by the root of their slice's mean square: over the valid cells of the last dims",
          function="maskserve.layers:rms_norm"),
    Layer(name="group_norm", summary="cells less the mean of their group of channels, by its spread: over valid cells",
          function="maskserve.layers:group_norm"),
    Layer(name="batch_norm", summary="cells less the mean of their channel, by its spread: over the valid cells of the batch",
          function="maskserve.layers:batch_norm"),
    Layer(name="cosine_similarity", summary="cosine of the angle between two vectors, over the cells that are valid in both",
          function="maskserve.layers:cosine_similarity"),
    Layer(name="dropout", summary="cells of which a random part becomes 0 in training, the others by as much larger",
          function="maskserve.layers:dropout"),
    Layer(name="embedding", summary="rows of a table by their indices; a masked index gives a masked row",
          function="maskserve.layers:embedding"),
    Layer(name="scaled_dot_product_attention",
          summary="means of values, weighted by how well their keys meet each query; a query that meets no key is masked",
          function="maskserve.layers:scaled_dot_product_attention"),
    Layer(name="multi_head_attention_forward", summary="what torch.nn.MultiheadAttention computes, and its weights",
          function="maskserve.layers:multi_head_attention_forward"),
)  # fmt: skip
