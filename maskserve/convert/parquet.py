"""Parquet: a column is a variable, null is masked."""

from __future__ import annotations

from maskserve.convert.arrow import chosen, dataset_of, refuse_rows, table_of
from maskserve.convert.dataset import Dataset, Reading, Writing
from maskserve.convert.formats import library
from maskserve.convert.sizes import refuse_beyond


def read(path: str, reading: Reading) -> Dataset:
    """The columns of numbers; rows and pages are counted, as the footer declares them, before they are read."""
    with library("pyarrow.parquet").ParquetFile(path) as file:
        schema, footer = file.schema_arrow, file.metadata
        names, notes = chosen(schema, reading)
        refuse_rows(footer.num_rows, schema, names, reading.memory)
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        unpacked = sum(c.total_uncompressed_size for c in columns if c.path_in_schema in names)
        refuse_beyond(unpacked, reading.memory, "the columns, unpacked,")
        # select: to Parquet, the name a.b is also the field b of a column a
        return dataset_of(file.read(columns=names).select(names), notes)


def write(dataset: Dataset, path: str, writing: Writing) -> list[str]:
    """Writes every variable as a column; lines about what was decided."""
    table, notes = table_of(dataset, ".parquet")
    library("pyarrow.parquet").write_table(table, path)
    return notes
