"""A table as text, its cells between tabs."""

from __future__ import annotations

from maskserve.convert.dataset import Dataset, Reading, Writing
from maskserve.convert.delimited import read_table, write_table

DELIMITER = "\t"


def read(path: str, reading: Reading) -> Dataset:
    """The columns of numbers; the first line names them."""
    return read_table(path, reading, DELIMITER)


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes every variable as a column; lines about what was decided."""
    return write_table(dataset, path, DELIMITER, ".tsv")
