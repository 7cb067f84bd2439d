"""Tables: CSV, TSV, Parquet and Arrow, compared with pandas."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

import maskserve as ms
from maskserve.convert.delimited import MISSING
from maskserve.convert.files import open_foreign
from maskserve.errors import (
    ConversionWarning,
    MaskserveError,
    NanError,
    NotComputableError,
    ParameterError,
    PayloadError,
    UnknownTensorError,
)
from tests.convert_cases import payload


def table(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def lists(path: Path, **words: object) -> dict[str, list[object]]:
    """Every column as a list, None where masked."""
    with open_foreign(path, **words):  # type: ignore[arg-type]  # columns or memory
        pass
    return {name: column.tolist() for name, column in ms.load(path).items()}


def refused(path: Path, **words: object) -> str:
    with pytest.raises(MaskserveError) as caught:
        open_foreign(path, **words)  # type: ignore[arg-type]  # columns or memory
    return caught.value.message


# -- text ---------------------------------------------------------------------------------------------------------


def test_every_spelling_that_pandas_takes_for_missing_is_masked(tmp_path: Path) -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    assert set(MISSING) == STR_NA_VALUES
    text = "a,b\n" + "".join(f"{word},{i}\n" for i, word in enumerate(MISSING)) + '"NA",1\n7,2\n'
    expected = pd.read_csv(io.StringIO(text))["a"]
    assert lists(table(tmp_path, text))["a"] == [None] * (len(MISSING) + 1) + [7]
    assert expected.isna().tolist() == [True] * (len(MISSING) + 1) + [False]


def test_whole_numbers_stay_whole_where_some_are_missing(tmp_path: Path) -> None:
    found = ms.load(table(tmp_path, f"a,b\n{2**63 - 1},1\n,2\n{-(2**63)},\n"))
    assert str(found["a"].dtype) == str(found["b"].dtype) == "torch.int64"
    assert found["a"].tolist() == [2**63 - 1, None, -(2**63)]
    assert found["b"].tolist() == [1, 2, None]


def test_whole_numbers_beyond_int64_are_u64_or_said_to_be_rounded(tmp_path: Path) -> None:
    path = table(tmp_path, f"a,b,c\n{2**64 - 1},{2**64},1e300\n,1,2\n3,1,0.5\n")
    with pytest.warns(ConversionWarning, match="rounded to f64: b"):
        found = ms.load(path)
    assert found["a"].tolist() == [2**64 - 1, None, 3]
    assert found["b"].tolist() == [2.0**64, 1.0, 1.0]


@pytest.mark.parametrize("cells", [(-(2**63) - 1, 1), (2**63 + 1, -1)])
def test_that_negative_numbers_were_rounded_is_said_too(tmp_path: Path, cells: tuple[int, int]) -> None:
    with pytest.warns(ConversionWarning, match="rounded to f64: a"):
        found = ms.load(table(tmp_path, "a\n{}\n{}\n".format(*cells)))
    assert found["a"].tolist() == [float(cells[0]), cells[1]]


def test_hexadecimal_text_is_no_number(tmp_path: Path) -> None:
    path = table(tmp_path, "a,b\n0xFFFFFFFFFFFFFFFF,1\n0x10,2\n")
    with pytest.warns(ConversionWarning, match=r"left out, not numbers: a \(hexadecimal text\)"):
        assert list(ms.load(path)) == ["b"]
    assert "line 2, column a: '0xFFFFFFFFFF…' is no number" in refused(path, columns=("a",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\r\n1,2\r\n", {"a": [1], "b": [2]}),
        (b"\xef\xbb\xbfa,b\n1,2\n", {"a": [1], "b": [2]}),
        ('"a","b ""x"""\n"1","2"\n', {"a": [1], 'b "x"': [2]}),
        ("a,b\n", {"a": [], "b": []}),
        ("a,b\n1,2", {"a": [1], "b": [2]}),
        ("a\n1\n\n2\n", {"a": [1, 2]}),
        ('a\n1\n""\n2\n', {"a": [1, None, 2]}),
        ("a,b\n1.0,true\n-0.0,False\n", {"a": [1.0, -0.0], "b": [True, False]}),
        ("a,b\ninf,-inf\n1,2\n", {"a": [np.inf, 1.0], "b": [-np.inf, 2.0]}),
        ("a,b\n,\n,\n", {"a": [None, None], "b": [None, None]}),
    ],
)  # fmt: skip
def test_text_as_others_write_it(tmp_path: Path, text: str | bytes, expected: dict[str, list[object]]) -> None:
    assert lists(table(tmp_path, text)) == expected


def test_text_columns_are_left_out_and_named(tmp_path: Path) -> None:
    path = table(tmp_path, 'a,carrier,day,b\n1,5" pipe,2013-01-01,2\n3,AA,2013-01-02,4\n')
    payload = open_foreign(path)
    assert payload.notes == ("left out, not numbers: carrier (text), day (timestamp)",)
    assert list(payload.header.tensors) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("a,b\n1,2\n3,n.d.\n", ["b"], "line 3, column b: 'n.d.' is no number"),
        ('a,b\n"x\ny",2\n\n3,secret and long text that goes on\n', ["b"], "line 5, column b: 'secret and l…' is no number"),
        ("a,b\n1,2013-01-01\n", ["b"], "line 2, column b: '2013-01-01' is no number"),
        ("a,b\n1,true\n2,5\n", ["b"], "line 2, column b: 'true' is no number"),
        ("a,b\n1,2\n3\n", None, "line 3 has 1 cells, and the first line 2 names"),
        ("a,b\n1,2\n3,4,5\n", None, "line 3 has 3 cells, and the first line 2 names"),
        ('a,b\n1,"x\n2,y\n3,z\n', None, "a quote is open at the end; it begins after line 1"),
        (",".join(f"c{i}" for i in range(2000)) + "\n", None, "the file has 2000 variables, 2000 tensors with their masks"),
        ("a,a\n1,2\n", None, "the column a is there twice; rename one"),
        ("", None, "the file is empty: a table begins with a line of column names"),
        ("\n\n", None, "the file is empty"),
        ("a,b\n1,2\n", ["c"], "there is no column c; the file has a, b"),
        ("a\nx\n", None, "the file has no variable of numbers; left out, not numbers: a (text)"),
        ("a,b\n1,2\n".encode("utf-16"), None, "the text is UTF-16; save it as UTF-8"),
        (b"a,\xe9\n1,2\n", None, "the text is not UTF-8; save it as UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, text: str | bytes, columns: list[str] | None, said: str
) -> None:
    message = refused(table(tmp_path, text), columns=columns)
    assert message.startswith(said)
    assert "\n" not in message
    assert len(message) < 250


def test_errors_of_columns_have_their_class(tmp_path: Path) -> None:
    path = table(tmp_path, "a,b\n1,x\n")
    with pytest.raises(UnknownTensorError):
        open_foreign(path, columns=["c"])
    with pytest.raises(PayloadError):
        open_foreign(path, columns=["b"])


def test_picked_columns_are_all_there_is(tmp_path: Path) -> None:
    payload = open_foreign(table(tmp_path, "a,b,c\n1,2,x\n"), columns=["b"])
    assert (list(payload.header.tensors), payload.notes) == (["b"], ())


def test_a_column_called_mask_or_row_is_a_column(tmp_path: Path) -> None:
    path = table(tmp_path, "mask,row,x.mask,x\n1,2,3,\n4,5,6,7\n")
    payload = open_foreign(path)
    assert payload.notes[0].startswith("renamed, a payload gives these names a meaning")
    with pytest.warns(ConversionWarning):
        found = ms.load(path)
    assert {name: of.tolist() for name, of in found.items()} == {
        "mask_": [1, 4], "row": [2, 5], "x_mask": [3, 6], "x": [None, 7],
    }  # fmt: skip
    assert found.dims["row"] == ("row_",)


def test_the_nameless_index_of_pandas_gets_a_name(tmp_path: Path) -> None:
    pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}, index=[10, 20]).to_csv(tmp_path / "t.csv")
    payload = open_foreign(tmp_path / "t.csv")
    assert payload.notes[0].endswith(": '' is unnamed here")
    assert list(payload.header.tensors) == ["a", "unnamed", "a.mask"]


def test_what_is_written_is_read_by_pandas_alike(tmp_path: Path) -> None:
    valid = np.array([True, False, True])
    given = payload({
        "i": (np.array([1, 99, -(2**63)]), valid),
        "f": (np.array([0.1, np.nan, 1e22]), valid),
        "b": (np.array([True, True, False]), valid),
    })  # fmt: skip
    (tmp_path / "in.safetensors").write_bytes(given)
    ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.csv")
    found = pd.read_csv(tmp_path / "out.csv", dtype={"i": "Int64", "b": "boolean"})
    assert found["i"].tolist() == [1, pd.NA, -(2**63)]
    assert found["f"].dropna().tolist() == [0.1, 1e22]
    assert found["b"].tolist() == [True, pd.NA, False]


def test_a_valid_nan_is_not_written_as_text(tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(payload({"x": (np.array([1.0, np.nan]), np.ones(2, bool))}))
    with pytest.raises(NanError, match=r"x has 1 valid NaN, and in \.csv NaN spells a missing value; write \.parquet"):
        ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_tables_hold_columns_of_one_length(tmp_path: Path) -> None:
    ones = np.ones((2, 3)), np.ones((2, 3), bool)
    short = np.ones(2), np.ones(2, bool)
    long = np.ones(3), np.ones(3, bool)
    (tmp_path / "grid.safetensors").write_bytes(payload({"x": ones, "y": short}))
    (tmp_path / "two.safetensors").write_bytes(payload({"x": long, "y": short}))
    for suffix in ("csv", "parquet", "arrow"):
        with pytest.raises(NotComputableError, match=r"holds columns, and x has shape \(2, 3\); pick 1-D .* --tensor"):
            ms.convert_file(tmp_path / "grid.safetensors", tmp_path / f"out.{suffix}")
        with pytest.raises(NotComputableError, match="holds columns of one length; x has 3 cells, y 2"):
            ms.convert_file(tmp_path / "two.safetensors", tmp_path / f"out.{suffix}")
        assert ms.convert_file(tmp_path / "two.safetensors", tmp_path / f"out.{suffix}", tensor=["x"]).written


def test_a_request_has_no_say_in_the_masks_of_a_table(tmp_path: Path) -> None:
    path = table(tmp_path, "a,b\n1,\n")
    for words in ({"mask_means": "missing"}, {"mask": "a"}):
        with pytest.raises(ParameterError, match="csv says itself what is missing"):
            ms.compute("reduce", path, op="sum", **words)
    with pytest.raises(ParameterError, match="csv says itself what is missing"):
        ms.load(path, mask="a")


# -- Parquet and Arrow --------------------------------------------------------------------------------------------

ARROW_TYPES = (
    pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
    pa.float16(), pa.float32(), pa.float64(),
)  # fmt: skip


def write_arrow(given: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(given, path, row_group_size=3)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(given, str(path), chunksize=3)
    else:
        new = pa.ipc.new_stream if path.suffix == ".ipc" else pa.ipc.new_file
        with new(str(path), given.schema) as writer:
            writer.write_table(given, max_chunksize=3)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "feather", "arrow", "ipc"])
def test_nulls_are_masked_in_every_type_and_over_chunks(tmp_path: Path, suffix: str) -> None:
    values = [1, None, 0, 1, None, 1, 0, None]
    columns = {str(t): pa.array([None if v is None else np.float16(v) if t == pa.float16() else t.to_pandas_dtype()(v)
                                 for v in values], t) for t in ARROW_TYPES}  # fmt: skip
    found = ms.load(write_arrow(pa.table(columns), tmp_path / f"t.{suffix}"))
    for type_ in ARROW_TYPES:
        assert found[str(type_)].tolist() == values
        assert str(found[str(type_)].dtype) == f"torch.{np.dtype(type_.to_pandas_dtype()).name}"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_nan_is_a_value_and_null_is_missing(tmp_path: Path, suffix: str) -> None:
    column = pa.array([1.0, None, np.nan], from_pandas=False)
    found = ms.load(write_arrow(pa.table({"a": column}), tmp_path / f"t.{suffix}"))["a"]
    assert found.get_mask().tolist() == [True, False, True]
    assert np.isnan(found.get_data().numpy()[2])


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    import datetime
    import decimal

    given = pa.table({
        "n": [1, None], "text": ["a", None], "when": [datetime.datetime(2020, 1, 1), None],
        "day": [datetime.date(2020, 1, 1)] * 2, "money": [decimal.Decimal("1.5"), None], "raw": [b"a", None],
        "list": [[1], [2]], "nothing": pa.nulls(2),
        "word": pa.array(["a", "b"]).dictionary_encode(), "code": pa.array([5, None]).dictionary_encode(),
    })  # fmt: skip
    path = write_arrow(given, tmp_path / "t.parquet")
    payload = open_foreign(path)
    assert payload.notes == (
        "left out, not numbers: text (text), when (timestamp), day (timestamp), money (decimal), raw (bytes), "
        "list (nested), word (text)",
    )
    with pytest.warns(ConversionWarning):
        found = ms.load(path)
    assert {name: of.tolist() for name, of in found.items()} == {
        "n": [1, None],
        "nothing": [None] * 2,
        "code": [5, None],
    }
    assert refused(path, columns=["n", "text"]).startswith("the column text holds no numbers but text")


def test_pandas_reads_what_is_written(tmp_path: Path) -> None:
    valid = np.array([True, False, True])
    given = payload({"i": (np.array([1, 99, -(2**63)]), valid), "f": (np.array([0.1, 7.0, np.nan]), valid)})
    (tmp_path / "in.safetensors").write_bytes(given)
    ms.convert_file(tmp_path / "in.safetensors", tmp_path / "out.parquet")
    found = pd.read_parquet(tmp_path / "out.parquet", dtype_backend="pyarrow")
    assert found["i"].isna().tolist() == [False, True, False]
    assert found["i"].dropna().tolist() == [1, -(2**63)]
    nulls = pq.read_table(tmp_path / "out.parquet")
    assert [column.null_count for column in nulls.columns] == [1, 1]


def test_a_name_with_a_point_is_no_field_of_another_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a.b": [1, 2], "a": [{"b": 5}, {"b": 6}]}), tmp_path / "t.parquet")
    assert open_foreign(tmp_path / "t.parquet").notes == ("left out, not numbers: a (nested)",)
    with pytest.warns(ConversionWarning):
        assert lists(tmp_path / "t.parquet") == {"a.b": [1, 2]}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_rows_are_counted_before_they_are_read(tmp_path: Path, suffix: str) -> None:
    given = pa.table({"a": pa.array(np.zeros(1_000_000))})  # a few kB of Parquet
    path = tmp_path / f"t.{suffix}"
    pq.write_table(given, path, compression="zstd") if suffix == "parquet" else write_arrow(given, path)
    assert "would take 9000000 bytes of memory; at most 1000000 are read here" in refused(path, memory=10**6) or (
        suffix == "arrow" and "rows would take" in refused(path, memory=100)
    )


def test_a_table_of_text_is_measured_before_it_is_read(tmp_path: Path) -> None:
    assert "the table would take 40 bytes" in refused(table(tmp_path, "a,b\n1,2\n"), memory=39)
