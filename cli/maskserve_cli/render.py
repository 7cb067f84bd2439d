"""An answer in the form that was asked for: a table, text, JSON or safetensors; on stdout or in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from maskserve.errors import OutOfMemoryError
from maskserve.payload.format import Encoded, Output, save
from maskserve.payload.header import shown as printable
from maskserve.payload.slices import stored
from maskserve.room import megabytes
from maskserve.temporary import room_for
from maskserve_cli import outputs, table
from maskserve_cli.exits import say
from maskserve_cli.inputs import JsonForm
from maskserve_cli.outputs import Form, Target
from maskserve_cli.table import Shown

if TYPE_CHECKING:
    from maskserve.answers import Answer
    from maskserve.payload.header import Shape
    from maskserve.payload.metadata import Dims
    from maskserve.steps import Result, Step, Streamed


def write(answer: Answer, target: Target, question: JsonForm | None, hint: str | None) -> None:
    """Writes the answer to its target; `hint` is what to do about valid NaN, where the op can do something."""
    if answer.is_streamed:
        write_streamed(answer, target)
    elif target.path is not None:
        write_file(answer, target, question)
    elif target.form is Form.SAFETENSORS:
        outputs.write_bytes(answer.encoded().chunks)
    elif target.form is Form.JSON:
        outputs.write_bytes(json_chunks(answer, question))
    elif target.form is Form.TEXT:
        outputs.write_text(text_lines(answer))
    else:
        outputs.write_text(table_lines(answer))
    hint_at_nan(answer, hint)


def write_file(answer: Answer, target: Target, question: JsonForm | None) -> None:
    """The answer in a file, and one line that says so."""
    assert target.path is not None
    encoded = answer.encoded()
    if target.form is Form.JSON:
        text = memoryview(b"".join(json_chunks(answer, question)))
        encoded = Encoded(text.nbytes, iter([text]))
    if save(target.path, encoded, exists=target.exists):
        say(f"wrote {printable(target.path)}: {summary(answer)}, {outputs.bytes_text(encoded.n_bytes)}")
    else:
        say_skipped(target.path)


def write_streamed(answer: Answer, target: Target) -> None:
    """An answer that is computed while it is written: into its file, or by way of one without a name to a pipe."""
    if target.form is not Form.SAFETENSORS:
        named = [(r.name, r.shape, r.dims) for r in answer.results if not r.is_coordinate]
        raise too_large(named, target, f"{OR_A_FILE} of a larger size")
    if target.path is None:
        with tempfile.TemporaryFile() as file:
            with room_for(sum(out.n_bytes for out in answer.outputs())):
                answer.write(file.fileno(), "a temporary file")
            outputs.write_bytes(outputs.chunks_of(file))
        return
    path = target.path
    n_bytes = outputs.write_in_place(path, lambda descriptor: answer.write(descriptor, path), target.exists)
    if n_bytes is None:
        say_skipped(path)
    else:
        say(f"wrote {printable(path)}: {summary(answer)}, {outputs.bytes_text(n_bytes)}")


def refuse_text(steps: Sequence[Step], target: Target, enough: int | None, *, is_report: bool) -> None:
    """Raise where an answer is to be text, JSON or a report, and its results would only be held in `enough` bytes of memory."""
    if enough is not None and target.form is not Form.SAFETENSORS:
        named = [(step.name, step.result.shape, step.result.dims) for step in steps]
        instead = "--memory" if is_report else OR_A_FILE
        raise too_large(named, target, f"{instead} {megabytes(enough)}MB or more")


OR_A_FILE = "-o OUT.safetensors, or --memory"


def too_large(named: Sequence[tuple[str, Shape, Dims | None]], target: Target, instead: str) -> OutOfMemoryError:
    shapes = ", ".join(f"{name} {table.dims_text(shape, dims)}" for name, shape, dims in named)
    return OutOfMemoryError(f"{shapes} does not fit into --memory as {target.form}; give {instead}")


def say_skipped(path: str) -> None:
    say(f"{printable(path)} exists; skipped")


def summary(answer: Answer) -> str:
    """What an answer holds: "rain f32 (lat 8), 3 of 96 masked", or totals where there are several variables."""
    computed = [result for result in answer.results if not result.is_coordinate]
    n_cells, n_masked = sum(r.n_cells for r in computed), sum(r.n_masked for r in computed)
    if len(computed) == 1:
        result = computed[0]
        what = f"{result.name} {result.dtype.name} {table.dims_text(result.shape, result.dims)}"
    else:
        what = f"{len(computed)} variables"
    return f"{what}, {n_masked} of {n_cells} masked{before(computed)}"


def before(computed: Sequence[Result | Streamed]) -> str:
    """How many cells were masked in the question, where that is what changed."""
    counts = [result.n_masked_before for result in computed if result.n_masked_before is not None]
    return f" ({sum(counts)} before)" if counts else ""


def json_chunks(answer: Answer, question: JsonForm | None) -> Iterator[bytes]:
    from maskserve.payload.json import encode

    answer = answer.spread_out()
    return encode(answer.outputs(), answer.metadata, question or "explicit")


def text_lines(answer: Answer) -> Iterator[str]:
    """A row a line, cells between tabs, masked ones as `--`; of one dim: a cell a line, as in the table.

    Each of several variables comes after a line with its name. Digits are those that read back as the same number.
    """
    from maskserve.payload.json import refuse_complex
    from maskserve.payload.texts import texts_of

    computed = [result for result in answer.spread_out().results if not result.is_coordinate]
    for result in computed:
        refuse_complex(result.name, result.dtype)
        if len(computed) > 1:
            yield f"# {result.name} {table.dims_text(result.shape, result.dims)}"
        data, *mask = result.outputs()
        shape = data.shape
        texts = texts_of(data.dtype, shape, data.chunks, mask[0] if mask else None)
        n_columns = shape[-1] if len(shape) > 1 else 1
        for _ in range(prod(shape) // n_columns if n_columns else 0):
            yield "\t".join(text_cell(next(texts)) for _ in range(n_columns))


def text_cell(word: str) -> str:
    """A cell of JSON as a cell of text."""
    return table.MASKED if word == "null" else word.strip('"')


def table_lines(answer: Answer) -> Iterator[str]:
    """Every variable as a table, with labels from the coordinates of its dims."""
    answer = answer.spread_out()
    coordinates = {r.name: shown(r) for r in answer.held if r.is_coordinate}
    yield from table.tables((shown(r) for r in answer.held if not r.is_coordinate), coordinates)


def shown(result: Result) -> Shown:
    """A result as the table looks at it."""
    data, *mask = result.outputs()
    return Shown(
        name=result.name,
        dtype=data.dtype,
        shape=data.shape,
        dims=result.dims,
        cells=stored(whole(data), data.dtype).reshape(data.shape),
        valid=stored(whole(mask[0]), mask[0].dtype).reshape(data.shape) if mask else None,
        note=f"{result.n_masked} of {result.n_cells} masked{before([result])} (true = valid)",
    )


def whole(output: Output) -> bytes | bytearray | memoryview:
    assert isinstance(output.chunks, bytes | bytearray | memoryview), "a computed tensor is one buffer"
    return output.chunks


def hint_at_nan(answer: Answer, hint: str | None) -> None:
    """Says what passed through, and how many NaN stand in the results as values and what the op can do about them."""
    for result in answer.results:
        if result.passed_through:
            say(f"{printable(result.name)} has not every dim that was named: it passed through as it is")
    n = sum(result.n_nan for result in answer.results if not result.is_coordinate)
    if n:
        say(f"{n} valid NaN{'; ' + hint if hint else ''}")
