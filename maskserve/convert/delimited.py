"""Tables as text: what is spelled as pandas spells a missing value is masked, whole numbers stay whole."""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from maskserve.convert.arrow import check_names, dataset_of, kind_of, table_of
from maskserve.convert.dataset import Dataset, DataVariable, Reading, left_out, widened
from maskserve.convert.formats import library
from maskserve.convert.sizes import refuse_beyond
from maskserve.errors import MaskserveError, NanError, PayloadError
from maskserve.payload.header import shown

MISSING = (
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip
"""What pandas.read_csv takes for missing by default (pandas 3.1, `pandas._libs.parsers.STR_NA_VALUES`)."""

TRUE, FALSE = ("True", "TRUE", "true"), ("False", "FALSE", "false")
BLOCK_BYTES = 1 << 24  # a row must fit into one
GROWTH = 5  # a cell of two characters, "1,", takes 8 bytes and its mask, beside the text
ROWS = 1 << 16  # written at a time
WIDE = 2.0**63
WHOLE = r"^\s*-?[0-9]+\s*$"
HEX = r"^\s*-?0[xX]"
BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_table(path: str, reading: Reading, delimiter: str) -> Dataset:
    """The columns of numbers as 1-D variables; the others are named in a note, or an error where they were asked for."""
    refuse_beyond(GROWTH * os.path.getsize(path), reading.memory, "the table")
    check_names(header_of(path, delimiter), reading)
    refuse_open_quote(path, delimiter)
    table = parsed(path, delimiter, columns=reading.columns)
    kinds = {name: kind_of(table.schema.field(name).type) for name in table.column_names}
    kinds |= dict.fromkeys(hexadecimal(table, path, delimiter), "hexadecimal text")
    others = {name: kind for name, kind in kinds.items() if kind is not None}
    if reading.columns and others:
        raise no_number(path, delimiter, next(iter(others)))
    table = table.drop_columns(list(others)) if others else table
    table, notes = with_wide_integers(table, path, delimiter)
    return dataset_of(table, (*left_out(others), *notes))


def header_of(path: str, delimiter: str) -> list[str]:
    """The names of the columns: the first line that is not empty."""
    with open(path, "rb") as file:
        if file.read(2) in BOMS:
            raise PayloadError("the text is UTF-16; save it as UTF-8")
    try:
        names = next(rows(path, delimiter, errors="strict"), (0, []))[1]
    except UnicodeDecodeError as cause:
        raise PayloadError("the text is not UTF-8; save it as UTF-8") from cause
    if not names:
        raise PayloadError("the file is empty: a table begins with a line of column names")
    return names


def refuse_open_quote(path: str, delimiter: str) -> None:
    """Raise where a quote is not closed: Arrow takes all that follows it for one cell, and says nothing."""
    n_quotes = 0
    with open(path, "rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            n_quotes += chunk.count(b'"')
    if n_quotes % 2 == 0:
        return
    line = 1
    try:  # an odd number may also be inches in a plain cell; csv tells, slowly
        for begin, _ in rows(path, delimiter):
            line = begin
    except csv.Error as cause:
        raise PayloadError(f"a quote is open at the end; it begins after line {line}") from cause


def hexadecimal(table: Any, path: str, delimiter: str) -> list[str]:
    """The columns of integers of which Arrow read some as hexadecimal: it takes 0xFFFFFFFFFFFFFFFF for -1."""
    if not holds_any(path, (b"0x", b"0X")):
        return []
    pa, pc = library("pyarrow"), library("pyarrow.compute")
    whole = tuple(name for name in table.column_names if table.schema.field(name).type == pa.int64())
    if not whole:
        return []
    texts = parsed(path, delimiter, columns=whole, as_text=True)
    return [name for name in whole if pc.any(pc.match_substring_regex(texts.column(name), HEX)).as_py()]


def holds_any(path: str, words: tuple[bytes, ...]) -> bool:
    """Whether one of `words`, of two bytes each, stands in a file."""
    last = b""
    with open(path, "rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            if any(word in last + chunk for word in words):
                return True
            last = chunk[-1:]
    return False


def rows(path: str, delimiter: str, errors: str = "replace") -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row: the line of the file on which it begins, from 1; empty lines are none."""
    with open(path, encoding="utf-8-sig", errors=errors, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        begin = 1
        for cells in reader:
            if cells:
                yield begin, cells
            begin = reader.line_num + 1


def parsed(path: str, delimiter: str, columns: tuple[str, ...] | None, as_text: bool = False) -> Any:
    """The Arrow table; with `as_text`, every cell as it stands."""
    pa, pa_csv = library("pyarrow"), library("pyarrow.csv")
    types = {name: pa.string() for name in columns or ()} if as_text else None
    try:
        return pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(block_size=BLOCK_BYTES),
            parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                null_values=list(MISSING), true_values=list(TRUE), false_values=list(FALSE),
                strings_can_be_null=True, quoted_strings_can_be_null=True,
                include_columns=None if columns is None else list(columns), column_types=types,
            ),
        )  # fmt: skip
    except pa.ArrowInvalid as cause:
        raise ragged(path, delimiter) or PayloadError(
            "it is no table: a quote is open, or a row is too long"
        ) from cause


def ragged(path: str, delimiter: str) -> PayloadError | None:
    """The error that names the first row with more or fewer cells than there are columns."""
    try:
        every = rows(path, delimiter)
        _, names = next(every)
        for line, cells in every:
            if len(cells) != len(names):
                return PayloadError(f"line {line} has {len(cells)} cells, and the first line {len(names)} names")
    except csv.Error:
        return None
    return None


def no_number(path: str, delimiter: str, name: str) -> MaskserveError:
    """The error that says where a column that was asked for holds something else."""
    column = parsed(path, delimiter, columns=(name,), as_text=True).column(name)
    for at, text in enumerate(column.to_pylist()):
        if text is not None and not is_number(text):
            start = shown(text) if len(text) <= 12 else f"{shown(text[:12])}…"
            line = next((line for i, (line, _) in enumerate(rows(path, delimiter)) if i == at + 1), 0)
            return PayloadError(
                f"line {line}, column {shown(name)}: '{start}' is no number; correct it, leave the column out "
                f"of --columns, or write NA where a value is missing",
                parameter="columns",
            )
    return PayloadError(f"the column {shown(name)} mixes numbers with true and false", parameter="columns")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def with_wide_integers(table: Any, path: str, delimiter: str) -> tuple[Any, list[str]]:
    """The table with whole numbers from 2^63 up as u64, where Arrow rounds to doubles; a line where none can hold them."""
    pa, pc = library("pyarrow"), library("pyarrow.compute")
    rounded = []
    for i, name in enumerate(table.column_names):
        if table.column(i).type != pa.float64() or not beyond_int64(table.column(i)):
            continue
        text = parsed(path, delimiter, columns=(name,), as_text=True).column(name)
        if not pc.all(pc.match_substring_regex(text, WHOLE)).as_py():
            continue
        try:
            table = table.set_column(i, name, pc.cast(pc.utf8_trim_whitespace(text), pa.uint64()))
        except pa.ArrowInvalid:  # beyond 2^64, or below 0
            rounded.append(shown(name, 40))
    return table, [f"whole numbers beyond 64 bits, rounded to f64: {', '.join(rounded)}"] if rounded else []


def beyond_int64(column: Any) -> bool:
    pc = library("pyarrow.compute")
    ends = pc.min_max(pc.drop_null(column)).as_py()
    least, largest = ends["min"], ends["max"]
    return largest is not None and (WIDE <= largest < np.inf or -np.inf < least <= -WIDE)


def write_table(dataset: Dataset, path: str, delimiter: str, target: str) -> list[str]:
    """Writes every variable as a column, nothing where it is masked; floats with the digits that read back alike."""
    for variable in dataset.variables:
        refuse_nan(variable, target)
    table, notes = table_of(dataset, target)
    empty = '""' if len(table.column_names) == 1 else ""  # a line with nothing on it would be no row
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerow(table.column_names)
        for start in range(0, table.num_rows, ROWS):
            columns = [texts_of(column, empty) for column in table.slice(start, ROWS).combine_chunks().columns]
            lines = library("pyarrow.compute").binary_join_element_wise(*columns, delimiter).to_pylist()
            file.write("\n".join(lines) + "\n")
    return notes


def refuse_nan(variable: DataVariable, target: str) -> None:
    if not variable.dtype.is_float:
        return
    [as_float], _ = widened([variable], target)
    n = int(np.isnan(as_float.valid_cells()).sum())
    if n:
        raise NanError(
            f"{shown(variable.name)} has {n} valid NaN, and in {target} NaN spells a missing value; write .parquet or "
            ".npz, which tell them apart"
        )


def texts_of(column: Any, empty: str) -> Any:
    """The cells as text; a float has a point or an exponent, so that it is read as a float."""
    pa, pc = library("pyarrow"), library("pyarrow.compute")
    texts = pc.cast(column, pa.string())
    if pa.types.is_floating(column.type):
        is_whole = pc.match_substring_regex(texts, r"^-?[0-9]+$")
        texts = pc.if_else(is_whole, pc.binary_join_element_wise(texts, ".0", ""), texts)
    return pc.fill_null(texts, empty)
