"""JSON in its explicit form: dtype, shape, dims and values, null where masked."""

from __future__ import annotations

from maskserve.convert.dataset import Dataset, Writing
from maskserve.convert.payload_files import outputs
from maskserve.convert.payloads import metadata_of
from maskserve.payload.json import encode


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes `dataset` to `path`; lines about what was decided."""
    metadata, notes = metadata_of(dataset)
    with open(path, "wb") as file:
        for chunk in encode(outputs(dataset), metadata, "explicit"):
            file.write(chunk)
    return notes
