"""How the op table is spelled on the command line: options, their values, and examples. Imports no pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from keyword import iskeyword
from shlex import quote

from maskserve.ops import OPS, default, served
from maskserve.ops.parameters import REQUIRED, Parameter, Type
from maskserve.ops.rows import Formula, Reduction, Row

SAMPLES: Mapping[Type, str] = {
    Type.DIMS: "time", Type.DIM: "-1", Type.COUNT: "2", Type.NUMBER: "0", Type.REAL: "2", Type.CELL: "0", Type.NUMBERS: "0.5",
    Type.RANGE: "0,100", Type.DTYPE: "f64",
}  # fmt: skip
METAVARS: Mapping[Type, str] = {
    Type.DIMS: "DIM,...", Type.DIM: "DIM", Type.COUNT: "N", Type.NUMBER: "X", Type.REAL: "X", Type.CELL: "X",
    Type.NUMBERS: "X,...",
    Type.RANGE: "LO,HI", Type.DTYPE: "DTYPE", Type.WORD: "NAME", Type.WORDS: "NAME", Type.TENSOR: "NAME|FILE",
    Type.EXPRESSION: "EXPR", Type.NAMES: "NAME,...", Type.PAIRS: "NAME=TENSOR",
    Type.FLAG: "",
}  # fmt: skip


def rows(verb: str) -> tuple[Row, ...]:
    """The rows that a verb serves."""
    return served(verb)


def examples(verb: str) -> str:
    """Commands that work, a line each."""
    own = default(verb)
    row = own or rows(verb)[0]
    op = "" if row is own else f" --op {row.name}"
    needed = needs(row)
    along = needed or next((f" {sample(p)}" for p in row.requestable if p.type in SAMPLES), "")
    start = f"maskserve {verb}{op}"
    other = next((row for row in reversed(rows(verb)) if row is not own), None)
    last = f"maskserve {verb} --op {other.name}{needs(other)}" if other else f"{start}{along}"
    return "\n".join(
        [
            f"{start}{along if own else needed} rain.safetensors",
            f"{start}{along} rain.safetensors -o result.safetensors",
            f"cat rain.safetensors | {start}{along} - -o - | maskserve head -",
            f"{last} rain.safetensors --dry-run",
        ]
    )


def needs(row: Row) -> str:
    """The options without which the row does not run."""
    return "".join(f" {sample(p)}" for p in row.requestable if p.default is REQUIRED)


def sample(parameter: Parameter) -> str:
    return f"{flag(parameter)} {quote(parameter.sample or SAMPLES.get(parameter.type, 'NAME'))}"


def flag(parameter: Parameter) -> str:
    """The option that gives a parameter."""
    return f"--{parameter.name.replace('_', '-')}"


def keyword(parameter: Parameter) -> str:
    """A parameter's name as Python can have it: `not` is a word of the language."""
    return f"{parameter.name}_" if iskeyword(parameter.name) else parameter.name


def metavar(parameter: Parameter) -> str:
    """What stands after the option; nothing after a flag."""
    choices = [*parameter.choices, *(["X"] if parameter.type is Type.CHOICE_OR_NUMBER else [])]
    return "|".join(choices) or METAVARS.get(parameter.type, "WORD")


def usage(parameter: Parameter) -> str:
    return f"{flag(parameter)} {metavar(parameter)}".rstrip()


def help_text(parameter: Parameter) -> str:
    """The table's help, with the default where there is a word for it."""
    if parameter.default is REQUIRED:
        return f"{parameter.help}; required"
    if parameter.default in (None, False) or "default" in parameter.help:
        return parameter.help
    return f"{parameter.help}; default: {parameter.default}"


def in_expression(verb: str | None, option: str) -> str:
    """'; inside the expression it is said to an op, as in sum(x, nan=omit)', where a verb of expressions lacks an op's option."""
    own = None if verb is None else default(verb)
    if own is None or own.verb != verb or not isinstance(own, Formula):
        return ""
    word = option.lstrip("-").replace("-", "_")
    found = [(row, p) for row in OPS.values() if isinstance(row, Reduction) for p in row.requestable if p.name == word]
    if not found:
        return ""
    row, parameter = found[0]
    value = next((choice for choice in parameter.choices if choice != parameter.default), "...")
    return f"; inside the expression it is said to an op, as in {row.name}(x, {word}={value})"
