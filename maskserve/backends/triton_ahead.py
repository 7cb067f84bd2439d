"""Kernels compiled for a kind of device, without one: what `recording` saw, down to machine code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from maskserve.backends.triton_launches import LAUNCH, Call
from maskserve.backends.triton_tables import interprets, kernels
from maskserve.errors import BackendError

CAPABILITIES = (80, 90)
"""A100 and its kin, H100 and its kin."""
POINTERS: Mapping[torch.dtype, str] = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.bool: "*i1",
}  # fmt: skip


def signature_of(value: Any) -> Any:
    """The type of an argument, in the compiler's words."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(map(signature_of, value))
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_ahead(calls: Iterable[Call], capability: int) -> list[Any]:
    """The compiled kernel of each call, for CUDA devices of this compute capability."""
    if interprets():
        raise BackendError("with TRITON_INTERPRET=1 nothing is compiled; unset it", parameter="backend")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    target = GPUTarget("cuda", capability, 32)
    made = []
    for call in calls:
        kernel = getattr(kernels(call.module), call.name)
        names = kernel.arg_names
        signature = dict(zip(names, map(signature_of, call.args), strict=False))
        signature |= dict.fromkeys(call.constants, "constexpr")
        source = ASTSource(kernel, signature=signature, constexprs=dict(call.constants))
        made.append(compile(source, target=target, options=dict(LAUNCH)))
    return made
