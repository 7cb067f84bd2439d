"""Layers in torch's words, made of rows: what is masked takes no part, and what depends on nothing valid is masked.

Formulas: torch.nn.functional's own, whose means and sums are over valid cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maskserve import fitting
from maskserve.alignment import laid_together
from maskserve.attending import attended
from maskserve.errors import DataError, DtypeError, ParameterError, ShapeError, UncoveredFunctionError
from maskserve.fitting import headers
from maskserve.functions import public
from maskserve.making import as_masked_tensor, operand
from maskserve.ops import OPS
from maskserve.ops.layouts import number
from maskserve.ops.rows import Layer
from maskserve.params import resolve
from maskserve.sparse import refused
from maskserve.tensor import MaskedTensor
from maskserve.torch_dtypes import known


def layer(name: str) -> Layer:
    row = OPS[name]
    assert isinstance(row, Layer)
    return row


def of_rows(name: str, *args: Any, **params: Any) -> MaskedTensor:
    made: MaskedTensor = public(name)(*args, **params)
    return made


# -- norms --------------------------------------------------------------------------------------------------------


def layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> MaskedTensor:
    x = operand(input)
    dims = last_dims("layer_norm", x, normalized_shape, weight=weight, bias=bias)
    return scaled(standardized(x, dims, eps), weight, bias)


def rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> MaskedTensor:
    x = operand(input)
    dims = last_dims("rms_norm", x, normalized_shape, weight=weight)
    square = of_rows("mean", of_rows("square", x), dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return scaled(of_rows("mul", x, of_rows("rsqrt", of_rows("add", square, eps))), weight, None)


def group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> MaskedTensor:
    x = operand(input)
    fitting.check_groups(layer("group_norm"), headers(input=x, weight=weight, bias=bias), num_groups)
    groups: MaskedTensor = x.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    made: MaskedTensor = standardized(groups, (2,), eps).reshape(x.shape)
    return scaled(made, of_channels(weight, x), of_channels(bias, x))


def batch_norm(
    input: Any, running_mean: Tensor | None, running_var: Tensor | None, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> MaskedTensor:  # fmt: skip
    """In training the running statistics move where a channel has valid cells, and stay where it has none."""
    x = operand(input)
    if x.ndim < 2:
        raise ShapeError(f"batch_norm takes channels along dim 1; the input has shape {tuple(x.shape)}")
    given = headers(input=x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    fitting.check_channels(layer("batch_norm"), given)
    dtype = getattr(torch, given["input"].dtype.torch)
    dims = tuple(d for d in range(x.ndim) if d != 1)
    if training:
        if not eps > 0:
            raise ParameterError(f"batch_norm: eps is {eps}; in training it must be above 0", parameter="eps")
        for running, name in ((running_mean, "mean"), (running_var, "var")):
            if running is not None:
                move(running, of_rows(name, x.detach(), dims), momentum)
        made = standardized(x, dims, eps)
    elif running_mean is None or running_var is None:
        raise ParameterError("batch_norm: running_mean and running_var are needed where training is False")
    else:
        spread = of_rows("rsqrt", running_var + eps)
        made = of_rows("mul", of_rows("sub", x, of_channels(running_mean, x)), of_channels(spread, x))
    return scaled(made, of_channels(weight, x), of_channels(bias, x), dtype)


def instance_norm(
    input: Any, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> MaskedTensor:  # fmt: skip
    """The running statistics move by the mean over the samples that have valid cells."""
    x = operand(input)
    if not use_input_stats:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    if x.ndim < 3:
        raise ShapeError(f"instance_norm takes (batch, channels, ...); the input has shape {tuple(x.shape)}")
    given = headers(input=x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    fitting.check_channels(layer("instance_norm"), given)
    dims = tuple(range(2, x.ndim))
    for running, name in ((running_mean, "mean"), (running_var, "var")):
        if running is not None:
            move(running, of_rows("mean", of_rows(name, x.detach(), dims), 0), momentum)
    return scaled(standardized(x, dims, eps), of_channels(weight, x), of_channels(bias, x))


def move(running: Tensor, found: MaskedTensor, momentum: float) -> None:
    """An exponential average, where there is something to add."""
    new = (1 - momentum) * running + momentum * found.get_data().to(running.dtype)
    with torch.no_grad():
        running.copy_(torch.where(found.get_mask(), new, running))


def standardized(x: MaskedTensor, dims: Sequence[int], eps: float) -> MaskedTensor:
    """Cells less the mean of the valid cells along `dims`, by the root of their variance and `eps`."""
    mean = of_rows("mean", x, dims, keepdim=True)
    variance = of_rows("var", x, dims, correction=0, keepdim=True)
    return of_rows("mul", of_rows("sub", x, mean), of_rows("rsqrt", of_rows("add", variance, eps)))


def scaled(x: MaskedTensor, weight: Any, bias: Any, dtype: torch.dtype | None = None) -> MaskedTensor:
    """In this dtype or in that of its cells, whatever that of weights is."""
    made = x if weight is None else of_rows("mul", x, weight)
    made = made if bias is None else of_rows("add", made, bias)
    return made.to(dtype or x.dtype)


def of_channels(given: Any, x: MaskedTensor) -> Any:
    """One value a channel, along dim 1."""
    return None if given is None else given.reshape([-1 if d == 1 else 1 for d in range(x.ndim)])


def last_dims(op: str, x: MaskedTensor, normalized_shape: Sequence[int], **scales: Any) -> tuple[int, ...]:
    shape = tuple(normalized_shape)
    fitting.check_normalized(layer(op), headers(input=x, **scales), shape)
    return tuple(range(-len(shape), 0))


# -- activations --------------------------------------------------------------------------------------------------


def prelu(input: Any, weight: Any) -> MaskedTensor:
    x, slope = operand(input), operand(weight)
    fitting.check_slopes(layer("prelu"), headers(input=x, weight=slope))
    slope = slope.reshape(()) if slope.numel() == 1 else of_channels(slope, x)
    return sloped(x, slope)


def rrelu(
    input: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> MaskedTensor:
    """Each cell below 0 draws its slope in training."""
    x = operand(input)
    if not lower <= upper:
        raise ParameterError(f"rrelu: lower is {lower}, and upper {upper}; it must be at most upper", parameter="lower")
    if not training:
        return sloped(x, (lower + upper) / 2)
    if x.layout is not torch.strided:
        raise refused("rrelu", x.shape)
    return sloped(x, -functional.rrelu(torch.full_like(x.get_data().detach(), -1), lower, upper, training=True))


def sloped(x: MaskedTensor, slope: Any) -> MaskedTensor:
    """Cells, below 0 times a slope."""
    return of_rows("where", of_rows("gt", x, 0), x, of_rows("mul", x, slope))


def glu(input: Any, dim: int = -1) -> MaskedTensor:
    x = operand(input)
    if not x.ndim:
        raise ShapeError("glu takes cells along a dim; the input has none")
    dim = number(dim, x.ndim)
    half, odd = divmod(x.shape[dim], 2)
    if odd:
        raise ShapeError(f"glu: dim {dim} has size {x.shape[dim]}, which must be even: one half gates the other")
    return of_rows("mul", x.narrow(dim, 0, half), of_rows("sigmoid", x.narrow(dim, half, half)))


# -- vectors ------------------------------------------------------------------------------------------------------


def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> MaskedTensor:
    one, other = operand(x1), operand(x2)
    resolve(layer("cosine_similarity"), {"dim": dim, "eps": eps})
    given = headers(x1=one, x2=other)
    fitting.check_floats(layer("cosine_similarity"), given)
    shape, _, _ = laid_together("cosine_similarity", given)
    pair: list[MaskedTensor] = [one.expand(shape), other.expand(shape)]
    both = pair[0].get_mask() & pair[1].get_mask()
    units = []
    for x in pair:
        seen = of_rows("mask", x, valid=both)
        length = of_rows("clamp", of_rows("norm", seen, dim=dim, keepdim=True), min=eps)
        units.append(of_rows("div", seen, length))
    return of_rows("sum", of_rows("mul", *units), dim)


def pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> MaskedTensor:
    one, other = operand(x1), operand(x2)
    laid_together("pairwise_distance", headers(x1=one, x2=other))
    difference = of_rows("sub", one, other)
    return of_rows("norm", of_rows("add", difference, eps) if eps else difference, ord=p, dim=-1, keepdim=keepdim)


def cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: str = "") -> MaskedTensor:
    """(..., n, cells) and (..., m, cells) -> (..., n, m), by way of all n * m differences."""
    if compute_mode not in ("", *WAYS):
        raise ParameterError(
            f"cdist: compute_mode={compute_mode} must be one of {', '.join(WAYS)}",
            parameter="compute_mode",
            allowed=WAYS,
        )
    if not p >= 0:
        raise ParameterError(f"cdist: p is {p}, and must be at least 0", parameter="p")
    one, other = operand(x1), operand(x2)
    if min(one.ndim, other.ndim) < 2 or one.shape[-1] != other.shape[-1]:
        raise ShapeError(f"cdist takes rows of as many cells: x1 has shape {tuple(one.shape)}, x2 {tuple(other.shape)}")
    return pairwise_distance(one.unsqueeze(-2), other.unsqueeze(-3), p, 0.0)


WAYS = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")
"""torch's words for how it computes them; here all are one."""


def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> MaskedTensor:
    """The valid cells draw as those of a plain tensor of this shape would."""
    check_share("dropout", "p", p)
    x = as_masked_tensor(input)
    if not training or not p:
        return x
    if x.layout is not torch.strided:
        raise refused("dropout", x.shape)
    return of_rows("mul", x, functional.dropout(torch.ones_like(x.get_data().detach()), p))


def check_share(op: str, name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ParameterError(f"{op}: {name} is {p}; it must be a number from 0 to 1", parameter=name)


def embedding(
    input: Any, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> MaskedTensor:  # fmt: skip
    """Rows of a plain table; its gradient is dense, and 0 for a row that only masked indices meant."""
    if isinstance(weight, MaskedTensor):
        raise UncoveredFunctionError(
            "embedding takes a plain table, and this one has a mask: table[index] gives rows with their masks"
        )
    index, padding_idx = operand(input), row_of("embedding", padding_idx, weight)
    if index._data.is_floating_point() or index._data.is_complex() or index._data.dtype is torch.bool:
        raise DtypeError(f"embedding: indices are whole numbers, not {index.dtype}")
    valid = index.get_mask()
    wrong = valid & ((index._data < 0) | (index._data >= len(weight)))
    if bool(wrong.any()):
        raise DataError(
            f"embedding: an index is {int(index._data[wrong][0])}; the table has {len(weight)} rows, from 0"
        )
    if not len(weight):
        return as_masked_tensor(weight.new_zeros(*index.shape, *weight.shape[1:]), valid.unsqueeze(-1))
    rows = functional.embedding(
        torch.where(valid, index._data.long(), 0 if padding_idx is None else padding_idx), weight, padding_idx, max_norm,
        norm_type, scale_grad_by_freq, sparse,
    )  # fmt: skip
    return as_masked_tensor(rows, valid.unsqueeze(-1))


def row_of(op: str, padding_idx: int | None, weight: Tensor) -> int | None:
    """Which row of a table pads, from 0."""
    if padding_idx is None:
        return None
    if not -len(weight) <= padding_idx < len(weight):
        raise ParameterError(
            f"{op}: padding_idx is {padding_idx}, and the table has {len(weight)} rows: give one of them, or leave it out",
            parameter="padding_idx",
        )
    return padding_idx % len(weight)


def embedding_bag(
    input: Any, weight: Tensor, offsets: Any = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False, per_sample_weights: Any = None,
    include_last_offset: bool = False, padding_idx: int | None = None,
) -> MaskedTensor:  # fmt: skip
    """(bags, indices) -> (bags, cells); a bag without a valid index is masked, where torch's is 0."""
    index = operand(input)
    if index.ndim != 2 or offsets is not None:
        raise ShapeError(
            "embedding_bag takes (bags, indices) with a mask, as from_lengths makes them, and no offsets; the input has shape "
            f"{tuple(index.shape)}"
        )
    if mode not in BAGS:
        raise ParameterError(f"embedding_bag: mode={mode} must be one of {', '.join(BAGS)}", parameter="mode")
    if per_sample_weights is not None and mode != "sum":
        raise ParameterError('embedding_bag: per_sample_weights are for mode="sum"', parameter="per_sample_weights")
    padding = row_of("embedding_bag", padding_idx, weight)
    if padding is not None:
        index = of_rows("mask", index, valid=index.get_data() != padding)
    rows = embedding(index, weight, None, max_norm, norm_type, scale_grad_by_freq, sparse)
    if per_sample_weights is not None:
        weights = operand(per_sample_weights)
        if weights.shape != index.shape:
            raise ShapeError(
                f"embedding_bag: per_sample_weights have shape {tuple(weights.shape)}, the indices {tuple(index.shape)}: give "
                "one for each"
            )
        rows = of_rows("mul", rows, weights.unsqueeze(-1))
    return of_rows(BAGS[mode], rows, 1)


BAGS = {"mean": "mean", "sum": "sum", "max": "amax"}
"""torch's words, and the rows that they mean."""


# -- along a dim --------------------------------------------------------------------------------------------------


def diff(input: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> MaskedTensor:
    """(..., cells - n): what comes before or after is joined first, as in torch."""
    x = operand(input)
    if n < 0:
        raise ParameterError(f"diff: n is {n}, and must be at least 0", parameter="n")
    if not x.ndim:
        raise ShapeError("diff takes cells along a dim; the input has none")
    dim = number(dim, x.ndim)
    if not n:
        same: MaskedTensor = x.clone()  # without what comes before or after, as in torch
        return same
    beside = [part for part in (prepend, x, append) if part is not None]
    x = of_rows("cat", [operand(part) for part in beside], dim) if len(beside) > 1 else x
    op = "logical_xor" if x.dtype is torch.bool else "sub"
    for _ in range(min(n, x.shape[dim])):
        x = of_rows(op, x.narrow(dim, 1, x.shape[dim] - 1), x.narrow(dim, 0, x.shape[dim] - 1))
    return x


# -- attention ----------------------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> MaskedTensor:  # fmt: skip
    """A masked cell of a key, a value or a query takes no part.

    A bool `attn_mask` is True where a key is met, as in torch; of floats, which are added, it is not met at -inf.
    """
    q, k, v = (operand(given) for given in (query, key, value))
    if enable_gqa:
        k, v = (in_groups(q, x, word) for word, x in (("key", k), ("value", v)))
    given = headers(query=q, key=k, value=v, attn_mask=attn_mask)
    fitting.of_attention(layer("scaled_dot_product_attention"), given, is_causal)
    check_share("scaled_dot_product_attention", "dropout_p", dropout_p)
    if is_causal:
        attn_mask = earlier(q, k)
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale  # of no cells every query is masked
    made = None if dropout_p or not are_bools([attn_mask]) else attended(q, k, v, [attn_mask], scale)
    if made is not None:
        return made
    weights = weights_of(q, k, [attn_mask], scale)
    return of_rows("matmul", dropout(weights, dropout_p), v)


def in_groups(q: MaskedTensor, x: MaskedTensor, word: str) -> MaskedTensor:
    """Keys or values, each as often as there are heads of the query for it."""
    if min(q.ndim, x.ndim) < 3 or not x.shape[-3] or q.shape[-3] % x.shape[-3]:
        raise ShapeError(
            f"scaled_dot_product_attention: query has shape {tuple(q.shape)}, {word} {tuple(x.shape)}; with enable_gqa the "
            "heads (dim -3) of the query are a multiple of the others"
        )
    made: MaskedTensor = x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)
    return made


def are_bools(masks: Sequence[Any]) -> bool:
    return all(mask is None or (isinstance(mask, Tensor) and mask.dtype is torch.bool) for mask in masks)


def earlier(q: MaskedTensor, k: MaskedTensor) -> Tensor:
    return torch.ones((q.shape[-2], k.shape[-2]), dtype=torch.bool, device=q.device).tril()


def weights_of(q: MaskedTensor, k: MaskedTensor, masks: Sequence[Any], scale: float) -> MaskedTensor:
    """Of each query, what each key that it meets counts for."""
    scores = of_rows("matmul", of_rows("mul", q, scale), k.transpose(-2, -1))
    for mask in masks:
        if mask is None:
            continue
        added = operand(mask)
        is_bool = added.dtype is torch.bool
        met = added.get_mask() & (added.get_data() if is_bool else added.get_data() != -torch.inf)
        if met.ndim > scores.ndim or any(
            n not in (1, m) for n, m in zip(met.shape[::-1], scores.shape[::-1], strict=False)
        ):
            raise ShapeError(
                f"attn_mask has shape {tuple(met.shape)}, the scores {tuple(scores.shape)}: it must broadcast to them"
            )
        scores = of_rows("mask", scores, valid=met.expand(scores.shape))
        if not is_bool:
            scores = of_rows("add", scores, of_rows("mask", added, valid=met))
    return of_rows("softmax", scores, -1)


def multi_head_attention_forward(
    query: Any, key: Any, value: Any, embed_dim_to_check: int, num_heads: int, in_proj_weight: Any, in_proj_bias: Any,
    bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float, out_proj_weight: Any, out_proj_bias: Any,
    training: bool = True, key_padding_mask: Any = None, need_weights: bool = True, attn_mask: Any = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Any = None, k_proj_weight: Any = None, v_proj_weight: Any = None,
    static_k: Any = None, static_v: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[MaskedTensor, MaskedTensor | None]:  # fmt: skip
    """(L, N, E) of queries, (S, N, E) of keys and values -> (L, N, E), and the weights (N, L, S), or those of each head."""
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise UncoveredFunctionError(
            "multi_head_attention_forward: bias_k, bias_v, add_zero_attn and static_k have no rule for a MaskedTensor: make "
            "the module without add_bias_kv and add_zero_attn, and join a word to key and value first, a learned one or zeros: "
            "key = maskserve.cat([key, word.expand(len(key), 1, -1)], 1) where the batch is first"
        )
    q, k, v = (operand(x) for x in (query, key, value))
    is_batched = q.ndim == 3
    row, given = layer("multi_head_attention_forward"), headers(query=q, key=k, value=v)
    fitting.one_dtype(row, given)
    q, k, v = (x if is_batched else x.unsqueeze(1) for x in (q, k, v))
    if not q.ndim == k.ndim == v.ndim == 3 or k.shape[:2] != v.shape[:2] or q.shape[1] != k.shape[1]:
        shapes = ", ".join(f"{word} {g.shape}" for word, g in given.items())
        raise ShapeError(f"{row.name}: {shapes}: they must be of as many samples, and key and value of as many words")
    n, width = q.shape[1], embed_dim_to_check // num_heads
    weights_in = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)

    def heads(x: MaskedTensor, weight: Any, bias: Any) -> MaskedTensor:
        made: MaskedTensor = of_rows("linear", x, weight, bias).reshape(-1, n, num_heads, width).permute(1, 2, 0, 3)
        return made

    q, k, v = (heads(x, weight, bias) for x, weight, bias in zip((q, k, v), weights_in, biases, strict=True))
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.reshape(n, num_heads, *attn_mask.shape[1:])
    elif attn_mask is None and is_causal:
        attn_mask = earlier(q, k)
    padding = key_padding_mask if key_padding_mask is None or is_batched else key_padding_mask.unsqueeze(0)
    if padding is not None:  # of bools, True is a key to leave out; of floats it is added
        padding = (~padding if padding.dtype is torch.bool else padding)[:, None, None, :]
    scores = (n, num_heads, q.shape[-2], k.shape[-2])
    for word, met in headers(attn_mask=attn_mask, key_padding_mask=padding).items():
        fitting.check_met(row, word, met, known(q.dtype), scores)
    masks, scale, told = [attn_mask, padding], 1 / math.sqrt(width), None
    is_plain = not need_weights and not (training and dropout_p) and are_bools(masks)
    mixed = attended(q, k, v, masks, scale) if is_plain else None
    if mixed is None:
        weights = weights_of(q, k, masks, scale)
        mixed = of_rows("matmul", dropout(weights, dropout_p, training), v)
        told = (of_rows("mean", weights, 1) if average_attn_weights else weights) if need_weights else None
    joined = mixed.permute(2, 0, 1, 3).reshape(-1, n, embed_dim_to_check)
    made = of_rows("linear", joined, out_proj_weight, out_proj_bias)
    if is_batched:
        return made, told
    return made.squeeze(1), None if told is None else told.squeeze(0)
