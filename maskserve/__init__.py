"""maskserve computes on tensors with missing values; what is undefined comes back masked.

The public names are loaded when they are first used, so that `import maskserve` imports no torch.
"""

from __future__ import annotations

import sys
from typing import Any

from maskserve.errors import MaskserveError
from maskserve.ops import OPS, instead_of

_HOMES = {
    "MaskedTensor": "tensor",
    "masked_tensor": "making",
    "as_masked_tensor": "making",
    "from_lengths": "making",
    "grad": "autograd",
    "value_and_grad": "autograd",
    "vjp": "autograd",
    "jvp": "autograd",
    "policy": "masks",
    "using": "execution",
    "Pair": "functions",
    "clumps": "runs",
    "edges": "runs",
    "load": "inout",
    "save": "inout",
    "compute": "inout",
    "convert_file": "convert.files",
    "__version__": "version",
}
"""Where each name that is no op lives."""

_MODULES = ("optim",)
"""Modules that are public as a whole."""


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from maskserve.version import version

        return version()
    if name in _MODULES:
        return importlib.import_module(f"maskserve.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"maskserve.{_HOMES[name]}"), name)
    elif name in OPS:
        value = importlib.import_module("maskserve.functions").public(name)
    else:
        raise AttributeError(f"module 'maskserve' has no attribute {name!r}{instead_of(name)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["OPS", "MaskserveError", *(name for name in _HOMES if name != "__version__"), *_MODULES, *OPS]

if sys.modules.get("torch"):  # which then knows what a MaskedTensor in a file, or in a batch, is
    import maskserve.tensor  # noqa: F401
