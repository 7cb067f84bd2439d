"""torch.compile and what is ours: it calls our functions as they are, and compiles what stands between them.

What is marked here is what torch.compiler.disable would mark; that imports the compiler, which takes a second or two.
"""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any, TypeVar

from torch._C import _dynamo

T = TypeVar("T")

REASON = "maskserve computes on data and mask in kernels of its own"


def uncompiled(what: T) -> T:
    """The function, or the class with its own methods, which no compiler looks into from now on."""
    if isinstance(what, type):
        for part in vars(what).values():
            for function in functions_in(part):
                mark(function)
    elif isinstance(what, FunctionType):
        mark(what)
    return what


def functions_in(part: Any) -> list[FunctionType]:
    """Those of an attribute of a class."""
    parts = (part, getattr(part, "__func__", None), *(getattr(part, name, None) for name in ("fget", "fset")))
    return [function for function in parts if isinstance(function, FunctionType)]


def mark(function: Any) -> None:
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = REASON
    skip(function.__code__)


def skip(code: CodeType) -> None:
    """Has frames of the code, and those that they call, run as they are, where a torch can say so."""
    frames = _dynamo.eval_frame
    action = getattr(frames, "_FrameAction", None)
    if action is not None:
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(action.SKIP, action.SKIP))
