"""What can be asked for, in words: request models built from the op table. Imports no torch; maskserve.answers runs them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from maskserve import dtypes
from maskserve.dtypes import f64
from maskserve.errors import ExpressionError, ParameterError, RequestError, UnknownOpError, nearest
from maskserve.ops import default, find, served
from maskserve.ops.parameters import REQUIRED, Parameter, Type
from maskserve.ops.rows import GRAD, Row

if TYPE_CHECKING:
    from maskserve.expression import Expression

Words = Mapping[str, Any]
AUTO = "auto"
"""The device that is taken where none is named."""

COMMON: tuple[Parameter, ...] = (
    Parameter(name="tensor", type=Type.WORDS, help="compute on this tensor alone (repeatable); default: on every one"),
    Parameter(name="mask", type=Type.WORD, help="the tensor that is the mask; default: NAME.mask, or mask"),
    Parameter(
        name="mask_means", type=Type.CHOICE, choices=("valid", "missing"),
        help="what true says in a mask: the cell is valid (default), or missing (numpy.ma, key_padding_mask)",
    ),
    Parameter(name="fill_value", type=Type.NUMBER, help="cells equal to this are missing, e.g. -9999"),
)  # fmt: skip
"""What every request may say beside its op's own parameters: how to read the payload."""

RUNNING: tuple[Parameter, ...] = (
    Parameter(name="device", type=Type.WORD, default=AUTO, help="where to compute: auto, cpu, cuda or cuda:N"),
    Parameter(name="backend", type=Type.WORD, help="the back end to use, by name; default: the first that can"),
)
"""How a request runs; neither changes what it means, and neither is part of its history."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One checked request: its verb and row, the op's parameters that were given, and the common and running ones."""

    verb: str
    row: Row
    params: Mapping[str, Any]
    common: Mapping[str, Any]
    running: Mapping[str, Any]

    @property
    def device(self) -> str:
        """The word that says where it is computed."""
        return str(self.running.get("device", AUTO))

    def on(self, device: str) -> Request:
        """The same request on this device."""
        return replace(self, running={**self.running, "device": device})

    @property
    def is_gradient(self) -> bool:
        """Whether it asks for the gradient of the row, and not for what the row computes alone."""
        return self.verb == GRAD

    def canonical(self) -> dict[str, Any]:
        """The request as data, the same for the same meaning: what history keeps. Defaults are left out."""
        defaults = {p.name: p.default for p in (*self.row.requestable, *COMMON)}
        words = {**self.params, **self.common}
        said = {name: spelled(value) for name, value in sorted(words.items()) if value != defaults[name]}
        return {"verb": self.verb, "op": self.row.name, **said}


def spelled(value: Any) -> Any:
    """A parameter's value as JSON data; JSON has no infinity, so it is a word."""
    if isinstance(value, dtypes.DType):
        return value.name
    if isinstance(value, float) and value in dtypes.INFINITIES:
        return "inf" if value > 0 else "-inf"
    if isinstance(value, tuple):
        return [spelled(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def build(verb: str, words: Words) -> Request:
    """The request that `words` spell (op and parameters, as text or as values), or an error that names the word at fault."""
    given = {name: value for name, value in words.items() if value is not None}
    own = default(verb)
    needed = [] if own is None or own.verb == verb else [p.name for p in own.requestable if p.default is REQUIRED]
    op = given.pop("op", own.name if own is not None and given.keys() >= {*needed} else None)
    if op is None:
        choices = [row.name for row in rows(verb) if row is not own]
        asked = " or ".join(("op", *needed))
        raise UnknownOpError(
            f"{verb} needs {asked}: the op is one of {', '.join(choices)}", parameter="op", allowed=choices
        )
    row = find(str(op), verb=verb)
    said = checked(row, given)
    for p in row.requestable:
        if p.name in said and p.verb not in ("", verb):
            raise ParameterError(f"{p.name} goes with {p.verb}, not with {verb}: leave it out", parameter=p.name)

    def of(parameters: tuple[Parameter, ...]) -> Mapping[str, Any]:
        return MappingProxyType({p.name: said[p.name] for p in parameters if p.name in said})

    return Request(verb=verb, row=row, params=of(row.requestable), common=of(COMMON), running=of(RUNNING))


def checked(row: Row, given: Words) -> dict[str, Any]:
    """What is given of the row's parameters, and of the common and the running ones, as values of their types."""
    try:
        parsed = op_model(row).model_validate(given)
    except ValidationError as error:
        raise refused(row, error) from None
    return {name: getattr(parsed, name) for name in parsed.model_fields_set}


def rows(verb: str) -> tuple[Row, ...]:
    """The rows that a verb serves."""
    return served(verb)


def parameters(verb: str) -> tuple[Parameter, ...]:
    """Every parameter that some op of the verb takes, then the common and running ones: each once, by name."""
    every: dict[str, Parameter] = {}
    own = (p for row in rows(verb) for p in row.requestable if p.verb in ("", verb))
    for p in (*own, *COMMON, *RUNNING):
        every[p.name] = either(every[p.name], p) if p.name in every else p
    return tuple(every.values())


def either(one: Parameter, other: Parameter) -> Parameter:
    """A parameter that takes what either takes, where two ops of a verb have it: several dims, or one."""
    if one.help == other.help:
        return other
    wider = one if one.type is Type.DIMS else other
    default = other.default if one.default is REQUIRED else one.default
    text = one.help if other.help in one.help else f"{one.help}; or {other.help}"
    return replace(wider, default=default, help=text)


@cache
def op_model(row: Row) -> type[BaseModel]:
    """The pydantic model of one op's parameters."""
    fields: Any = {p.name: (annotation(p), field(p)) for p in (*row.requestable, *COMMON, *RUNNING)}
    return create_model(
        f"{row.name}_request", __config__=ConfigDict(extra="forbid", frozen=True), __doc__=row.summary, **fields
    )


def schema(row: Row) -> dict[str, Any]:
    """The exact JSON schema of one op's parameters."""
    return op_model(row).model_json_schema()


def field(parameter: Parameter) -> Any:
    default = ... if parameter.default is REQUIRED else parameter.default
    return Field(default, description=parameter.help)


def annotation(parameter: Parameter) -> Any:
    """The pydantic type of a parameter: a few types, and no parameter's name."""
    allowed = _ANNOTATIONS[parameter.type]
    if parameter.type is Type.CHOICE:
        allowed = Literal[parameter.choices]
    elif parameter.type is Type.CHOICE_OR_NUMBER:
        allowed = Literal[parameter.choices] | float
    return allowed | None if parameter.default is None else allowed


def parse_dims(value: Any) -> tuple[int | str, ...]:
    """Dims from "time,lat", "0,1", 0, [0, 1] or ["time", "0,1"]: numbers and names.

    >>> parse_dims("0,lat"), parse_dims([0, 1]), parse_dims(-1)
    ((0, 'lat'), (0, 1), (-1,))
    """
    items = value if isinstance(value, list | tuple) else [value]
    dims: list[int | str] = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise ValueError(_ASK_DIMS)
        dims += [item] if isinstance(item, int) else [_dim(word) for word in item.split(",")]
    if any(isinstance(dim, int) and abs(dim) > MOST_COUNT for dim in dims):
        raise ValueError(_ASK_DIMS)
    return tuple(dims)


def _dim(word: str) -> int | str:
    word = word.strip()
    digits = word[1:] if word[:1] in ("+", "-") else word
    is_number = digits.isascii() and digits.isdigit()
    if not word or _LIST.match(word) or (is_number and len(digits) > MOST_DIGITS):
        raise ValueError(_ASK_DIMS)
    return int(word) if is_number else word


def parse_dim(value: Any) -> int | str:
    dims = parse_dims(value)
    if len(dims) != 1:
        raise ValueError("give exactly one dim")
    return dims[0]


def parse_along(value: int | str | None) -> int | str:
    """The dim that files are joined along: by number or by name; the first where none is said."""
    if value is None:
        return 0
    try:
        return parse_dim(value)
    except ValueError as error:
        raise ParameterError(f"along {value!r:.40}: {error}", parameter="along") from None


def parse_sizes(value: Any) -> tuple[int, ...]:
    """Whole numbers from 3 or [3, -1].

    >>> parse_sizes(3), parse_sizes([3, -1])
    ((3,), (3, -1))
    """
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and abs(n) <= MOST_COUNT for n in sizes):
        raise ValueError("give a whole number, or several in parentheses: (3, -1)")
    return sizes


def parse_dtype(value: Any) -> dtypes.DType:
    if isinstance(value, int):
        raise ValueError("give a dtype's name")
    return value if isinstance(value, dtypes.DType) else dtypes.parse(str(value))


def parse_words(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def parse_names(value: Any) -> tuple[str, ...]:
    """Names of an expression from "x,y" or ["x", "y"].

    >>> parse_names("x, y"), parse_names(["x", "y"])
    (('x', 'y'), ('x', 'y'))
    """
    names = tuple(name.strip() for word in parse_words(value) for name in str(word).split(","))
    if len(names) > MOST_NAMES or not all(map(_NAME.fullmatch, names)) or len({*names}) < len(names):
        raise ValueError(f"give names of an expression, each once, at most {MOST_NAMES}: x,y")
    return names


def parse_pairs(value: Any) -> tuple[str, ...]:
    """Names and what they stand for, from "x=blk.0.w" or several such.

    >>> parse_pairs("x=blk.0.w")
    ('x=blk.0.w',)
    """
    pairs = [str(word).partition("=")[::2] for word in parse_words(value)]
    names = [name.strip() for name, _ in pairs]
    if len(pairs) > MOST_NAMES or not all(map(_NAME.fullmatch, names)) or not all(of for _, of in pairs):
        raise ValueError(
            f"give NAME=TENSOR, such as x=blk.0.w, at most {MOST_NAMES} times; a name has letters, digits and _"
        )
    if len({*names}) < len(names):
        raise ValueError("give each name once")
    return tuple(f"{name}={of}" for name, (_, of) in zip(names, pairs, strict=True))


def parse_expression(value: Any) -> Expression:
    from maskserve.expression import Expression, parse  # which needs this module

    if not isinstance(value, str | Expression):
        raise ValueError("give an expression as text")
    return parse(value) if isinstance(value, str) else value


def parse_real(value: Any) -> int | float:
    """A number from 2, 0.5, "1e-3", "inf" or "-inf"; a whole one is an int, so that 2 and 2.0 are one request.

    >>> parse_real("2.0"), parse_real("1e-3"), parse_real("-inf")
    (2, 0.001, -inf)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("give a number")
    number = _number(value.strip()) if isinstance(value, str) else value
    if number != number or (isinstance(number, int) and not f64.holds(number)):
        raise ValueError("give a number that float64 holds, and not NaN")
    return int(number) if number not in dtypes.INFINITIES and number == int(number) else number


def parse_number(value: Any) -> int | float:
    """A finite number.

    >>> parse_number("-9999.0")
    -9999
    """
    number = parse_real(value)
    if number in dtypes.INFINITIES:
        raise ValueError("give a finite number")
    return number


def _number(text: str) -> int | float:
    """The number that `text` spells; infinity is spelled out, so that 1e999 is a slip."""
    if text.lower() in INFINITE:
        return INFINITE[text.lower()]
    try:
        if len(text) > 400 or not text.isascii() or "_" in text:
            raise ValueError
        return int(text) if text.lstrip("+-").isdigit() else _finite(text)
    except ValueError:
        raise ValueError(f"give a number, not {text[:40]!r}") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def parse_numbers(value: Any) -> int | float | tuple[int | float, ...]:
    """One number from 0.5, "0.5" or ["0.5"], several from "0.1,0.5", [0.1, 0.5] or ["0.1", "0.5"].

    >>> parse_numbers("0.5"), parse_numbers("1,2"), parse_numbers([0.5]), parse_numbers(["1", "2,3"])
    (0.5, (1, 2), (0.5,), (1, 2, 3))
    """
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        value = ",".join(value)  # an option that was repeated
    if isinstance(value, str) and "," in value:
        value = value.split(",")
    if not isinstance(value, list | tuple):
        return parse_real(value)
    if not 0 < len(value) <= MOST_NUMBERS:
        raise ValueError(f"give a number, or several with commas; at most {MOST_NUMBERS}")
    return tuple(parse_real(item) for item in value)


def parse_range(value: Any) -> tuple[int | float, int | float]:
    """(lower, upper) from "0,100" or [0, 100]; either may be infinite.

    >>> parse_range("0,100"), parse_range([-1.5, "inf"])
    ((0, 100), (-1.5, inf))
    """
    ends = value.split(",") if isinstance(value, str) else value
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise ValueError("give two numbers, the lower first: 0,100")
    lower, upper = map(parse_real, ends)
    if lower > upper:
        raise ValueError(f"the lower of the two comes first: {upper},{lower}")
    return lower, upper


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MOST_NAMES = 16
"""The variables of an expression."""
MOST_NUMBERS = 256
"""Each may cost a pass over the data, and a query has room for thousands."""
MOST_COUNT, MOST_DIGITS = 2**63 - 1, 19
"""What torch counts with; a text of more digits is not even read, since Python takes the square of their number."""
_ASK_DIMS = "give a dim's number or name, or several with commas: 0,1"
_LIST = re.compile(r"[\[(]\s*[-+0-9]")
INFINITE = {"inf": math.inf, "+inf": math.inf, "-inf": -math.inf}
_REAL_SCHEMA = float | Literal["inf", "-inf"]
_ANNOTATIONS: dict[Type, Any] = {
    Type.DIMS: Annotated[
        tuple[int | str, ...],
        BeforeValidator(parse_dims, json_schema_input_type=int | str | list[int | str]),
    ],
    Type.DIM: Annotated[int | str, BeforeValidator(parse_dim, json_schema_input_type=int | str)],
    Type.FLAG: bool,
    Type.COUNT: Annotated[int, Field(ge=0, le=MOST_COUNT)],
    Type.NUMBER: Annotated[Any, BeforeValidator(parse_number, json_schema_input_type=int | float)],
    Type.REAL: Annotated[Any, BeforeValidator(parse_real, json_schema_input_type=_REAL_SCHEMA)],
    Type.CELL: Annotated[Any, BeforeValidator(parse_real, json_schema_input_type=_REAL_SCHEMA)],
    Type.NUMBERS: Annotated[
        Any, BeforeValidator(parse_numbers, json_schema_input_type=_REAL_SCHEMA | str | list[_REAL_SCHEMA])
    ],
    Type.RANGE: Annotated[
        Any,
        BeforeValidator(
            parse_range,
            json_schema_input_type=str | Annotated[list[_REAL_SCHEMA], Field(min_length=2, max_length=2)],
        ),
    ],
    Type.DTYPE: Annotated[Any, BeforeValidator(parse_dtype, json_schema_input_type=Literal[tuple(dtypes.BY_NAME)])],
    Type.CHOICE: str,
    Type.CHOICE_OR_NUMBER: str,
    Type.WORD: str,
    Type.MEETING: Annotated[int, Field(ge=0)] | tuple[tuple[int, ...], tuple[int, ...]],
    Type.EQUATION: str,
    Type.WHOLE: Annotated[int, Field(ge=-MOST_COUNT, le=MOST_COUNT, strict=True)],
    Type.SIZES: Annotated[tuple[int, ...], BeforeValidator(parse_sizes, json_schema_input_type=int | list[int])],
    Type.TENSOR: Annotated[str, Field(min_length=1)],
    Type.WORDS: Annotated[tuple[str, ...], BeforeValidator(parse_words, json_schema_input_type=str | list[str])],
    Type.NAMES: Annotated[tuple[str, ...], BeforeValidator(parse_names, json_schema_input_type=str | list[str])],
    Type.PAIRS: Annotated[tuple[str, ...], BeforeValidator(parse_pairs, json_schema_input_type=str | list[str])],
    Type.EXPRESSION: Annotated[Any, BeforeValidator(parse_expression, json_schema_input_type=str)],
}


def refused(row: Row, error: ValidationError) -> RequestError:
    """The first thing that pydantic found, in our words."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    known = {p.name: p for p in (*row.requestable, *COMMON, *RUNNING)}
    if first["type"] == "extra_forbidden":
        own = ", ".join(p.name for p in row.requestable)
        return ParameterError(
            f"{row.name} has no parameter {name[:64]!r}; it takes {own}{nearest(name, ('op', *known))}",
            parameter=name[:64],
            allowed=known,
        )
    if first["type"] == "missing":
        return ParameterError(f"{row.name} needs {name}: {known[name].help}", parameter=name)
    parameter = known[name]
    cause = first["ctx"]["error"] if first["type"] == "value_error" else None
    if isinstance(cause, ExpressionError):
        return cause
    reason = asked(parameter, first["input"]) if cause is None else str(cause)
    allowed = ("true", "false") if parameter.type is Type.FLAG else parameter.choices
    return ParameterError(f"{row.name}: {name}: {reason}", parameter=name, allowed=allowed)


def asked(parameter: Parameter, given: Any) -> str:
    """What a parameter may be, and what it was."""
    words = [*parameter.choices, *(["a number"] if parameter.type is Type.CHOICE_OR_NUMBER else [])]
    ask = _ASKED.get(parameter.type) or (", ".join(words[:-1]) + " or " + words[-1] if words else "a text")
    return f"give {ask}" + (f", not {given[:40]!r}" if isinstance(given, str) else "")


_ASKED = {
    Type.FLAG: "true or false",
    Type.COUNT: "a whole number, 0 or more, of at most 64 bits",
    Type.TENSOR: "a tensor's name",
    Type.WORDS: "names",
    Type.MEETING: "how many dims meet, or which ones",
    Type.WHOLE: "a whole number",
}
