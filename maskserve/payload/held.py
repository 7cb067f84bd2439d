"""A payload of buffers that lie in memory apart, as other formats are read: nothing is joined. Imports no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping

from maskserve.errors import ParameterError
from maskserve.payload.files import Payload, _Ranges
from maskserve.payload.header import DEFAULT_LIMITS, Limits, check_shape, parse_header
from maskserve.payload.json import JsonPayload
from maskserve.payload.writing import Output, encode_header, in_order


class HeldPayload(_Ranges):
    """Outputs as a payload, checked as strictly as one that came as bytes; each output is one buffer.

    `format` names what it was read from; `has_own_masks`: its rules made the masks, and no request may read them otherwise;
    `has_nulls`: nulls made a mask; `notes` say what was left out or decided on the way, a line each.
    """

    def __init__(
        self,
        outputs: Iterable[Output],
        metadata: Mapping[str, str],
        *,
        format: str,
        has_own_masks: bool = False,
        has_nulls: bool = False,
        notes: tuple[str, ...] = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        ordered = in_order(outputs)
        head = encode_header(ordered, metadata)
        self.n_bytes = len(head) + sum(check_shape(o.name, o.dtype, o.shape) for o in ordered)
        self.header = parse_header(lambda offset, n: head[offset : offset + n], self.n_bytes, limits)
        self.format = format
        self.has_own_masks = has_own_masks
        self.has_nulls = has_nulls
        self.notes = notes
        filled = [output for output in ordered if self.info(output.name).n_bytes]
        self._starts = [self.header.data_start + self.info(output.name).begin for output in filled]
        self._views = [memoryview(output.chunks).cast("B") for output in filled]  # type: ignore[arg-type]  # one buffer each

    def _range(self, offset: int, n: int) -> memoryview:
        if n == 0:
            return memoryview(b"")
        at = bisect_right(self._starts, offset) - 1
        start = offset - self._starts[at]
        return self._views[at][start : start + n]


def refuse_other_masks(payload: Payload, mask: object, mask_means: object) -> None:
    """Raise where a request says how to read masks that a format's own rules made."""
    word = "mask" if mask is not None else "mask_means"
    if isinstance(payload, HeldPayload) and payload.has_own_masks and (mask is not None or mask_means is not None):
        raise ParameterError(
            f"{word}: {payload.format} says itself what is missing; {word} is for safetensors, npz and torch files",
            parameter=word,
        )
    if isinstance(payload, JsonPayload | HeldPayload) and payload.has_nulls and mask_means == "missing":
        raise ParameterError(
            "mask_means: null says itself what is missing; leave mask_means=missing out", parameter=word
        )
