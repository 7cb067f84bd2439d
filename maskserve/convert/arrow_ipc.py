"""Arrow IPC, which Feather is too: a column is a variable, null is masked."""

from __future__ import annotations

from typing import Any

from maskserve.convert.arrow import chosen, dataset_of, refuse_rows, table_of
from maskserve.convert.dataset import Dataset, Reading, Writing
from maskserve.convert.formats import library

FILE_MAGIC = b"ARROW1"
FEATHER_V1 = b"FEA1"


def read(path: str, reading: Reading) -> Dataset:
    """The columns of numbers of a file or a stream, a batch at a time, counted as they come."""
    pa = library("pyarrow")
    with open(path, "rb") as file:
        first = file.read(len(FILE_MAGIC))
    if first.startswith(FEATHER_V1):
        table = library("pyarrow.feather").read_table(path, memory_map=False)
        names, notes = chosen(table.schema, reading)
        return dataset_of(table.select(names), notes)
    with pa.OSFile(path) as source:
        reader = pa.ipc.open_file(source) if first == FILE_MAGIC else pa.ipc.open_stream(source)
        names, notes = chosen(reader.schema, reading)
        batches, n_rows = [], 0
        for batch in batches_of(reader):
            n_rows += batch.num_rows
            refuse_rows(n_rows, reader.schema, names, reading.memory)
            batches.append(batch.select(names))
        schema = pa.schema([reader.schema.field(name) for name in names])
    return dataset_of(pa.Table.from_batches(batches, schema), notes)


def batches_of(reader: Any) -> Any:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return reader


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes every variable as a column; lines about what was decided."""
    pa = library("pyarrow")
    table, notes = table_of(dataset, ".arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return notes
