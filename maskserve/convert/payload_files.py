"""safetensors, the payload itself: every mask is written as NAME.mask, every attribute into the metadata."""

from __future__ import annotations

from maskserve.convert.dataset import Dataset, Writing
from maskserve.convert.payloads import metadata_of, outputs_of
from maskserve.payload.metadata import KEY_VERSION
from maskserve.payload.writing import Output, encode
from maskserve.version import version


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes `dataset` to `path`; lines about what was decided."""
    metadata, notes = metadata_of(dataset)
    with open(path, "wb") as file:
        for chunk in encode(outputs(dataset), metadata | {KEY_VERSION: version()}).chunks:
            file.write(chunk)
    return notes


def outputs(dataset: Dataset) -> list[Output]:
    return [output for variable in dataset.variables for output in outputs_of(variable)]
