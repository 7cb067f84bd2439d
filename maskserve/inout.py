"""Payloads from Python: variables of a file as MaskedTensors, and whole requests as the other doors run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskserve.answers import Answer, run
from maskserve.errors import ParameterError
from maskserve.making import as_masked_tensor
from maskserve.payload.files import StrPath
from maskserve.payload.format import Buffer, BytesPayload, Payload, encode, open_payload
from maskserve.payload.format import save as save_bytes
from maskserve.payload.tensors import load as load_parts
from maskserve.payload.tensors import output
from maskserve.payload.variables import MASK, MaskKind, resolve
from maskserve.requests import build
from maskserve.tensor import MaskedTensor
from maskserve.version import version

Source = StrPath | bytes | bytearray | memoryview


def opened(source: Source) -> Payload:
    """The payload of a file, by path, or of bytes."""
    return BytesPayload(source) if isinstance(source, Buffer) else open_payload(source)


def load(source: Source, *, mask: str | None = None) -> dict[str, MaskedTensor]:
    """Every variable and coordinate of a safetensors payload by name, each with its mask (None: all valid)."""
    with opened(source) as payload:
        variables = resolve(payload.header, mask=mask)
        return {
            variable.name: MaskedTensor._of(*load_parts(payload, variable))
            for variable in (*variables, *variables.coordinates.values())
        }


def save(path: StrPath, tensors: Mapping[str, MaskedTensor], *, exists: Any = "error") -> None:
    """Write the tensors and their masks (NAME and NAME.mask) as safetensors; what lies under a mask is written as 0."""
    from maskserve.engine import hidden_as_zero

    outputs = []
    for name, given in tensors.items():
        if name == MASK or name.rpartition(".")[2] in tuple(MaskKind):
            raise ParameterError(
                f"{name!r} is the name of a mask in a payload; call the tensor something else", parameter="tensors"
            )
        tensor = as_masked_tensor(given)
        mask = tensor.get_mask()
        outputs += [output(name, hidden_as_zero(tensor.get_data(), mask)), output(f"{name}.mask", mask)]
    save_bytes(path, encode(outputs, {"maskserve.version": version()}), exists=exists)


def compute(verb: str, source: Source, **words: Any) -> Answer:
    """The answer of `maskserve VERB --word ... SOURCE`; `.to_bytes()` is what the command line and the service give.

    >>> compute("reduce", "rain.safetensors", op="mean", dim="time")  # doctest: +SKIP
    """
    with opened(source) as payload:
        return run(build(verb, words), payload)
