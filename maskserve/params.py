"""Parameters: each value checked against its type and brought to one form, before anything is planned. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskserve import dtypes
from maskserve.dtypes import DType
from maskserve.errors import DtypeError, ParameterError, nearest
from maskserve.ops.parameters import REQUIRED, Parameter, Type
from maskserve.ops.rows import Row


def accept(row: Row, dtype: DType) -> None:
    """Raise where the row does not take this dtype."""
    if dtype not in row.accepts:
        names = ", ".join(d.name for d in dtypes.ALL if d in row.accepts)
        raise DtypeError(
            f"{row.name} does not take {dtype.name}: give one of {names} (convert the data first)",
            parameter="dtype",
            allowed=names.split(", "),
        )


def names_of(row: Row) -> tuple[str, ...]:
    return tuple(p.name for p in row.parameters)


def resolve(row: Row, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter of the row by name, defaults filled in, each value checked against its type."""
    known = {p.name: p for p in row.parameters}
    for name in given:
        if name not in known:
            raise ParameterError(
                f"{row.name} has no parameter {name!r}; it takes {', '.join(known)}{nearest(name, known)}",
                parameter=name,
                allowed=known,
            )
    params = {name: check(row, p, given.get(name, p.default)) for name, p in known.items()}
    if params.get("unbiased") is not None:  # torch's older word for the same thing
        if "correction" in given and params["correction"] not in (known["correction"].default, int(params["unbiased"])):
            raise ParameterError(
                f"{row.name}: unbiased and correction say the same thing; give one", parameter="unbiased"
            )
        params["correction"] = int(params["unbiased"])
    if (wrong := row.check(params)) is not None:
        word = wrong.partition(" ")[0]
        raise ParameterError(f"{row.name}: {wrong}", parameter=word if word in params else None)
    return params


def check(row: Row, parameter: Parameter, value: Any) -> Any:
    """`value` in its canonical form, or a ParameterError that says what is allowed."""
    if parameter.default is REQUIRED and value in (REQUIRED, None):
        raise ParameterError(f"{row.name} needs {parameter.name}: {parameter.help}", parameter=parameter.name)
    if value is None:  # torch's word for what is not given
        value = parameter.default
    if value is None:
        return None
    canonical, expected = _CHECKS[parameter.type](parameter, value)
    if canonical and parameter.within is not None and canonical[0] not in parameter.within:
        canonical, expected = (), f"a number {parameter.within}"
    if not canonical:
        raise ParameterError(
            f"{row.name}: {parameter.name} is {value!r:.80}; it must be {expected}",
            parameter=parameter.name,
            allowed=parameter.choices,
        )
    return canonical[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _is_count_like(value: Any) -> bool:
    """A number that int64 and float64 arithmetic can hold; no count comes near its end."""
    return _is_number(value) and abs(value) < 2**62


def _check_dims(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    dims = value if isinstance(value, tuple) else (value,)
    fits = all(isinstance(d, int) and not isinstance(d, bool) for d in dims)
    return (
        (dims,) if fits else ()
    ), "a dim number or a tuple of them (maskserve.compute takes the names of a file's dims)"


def _check_dim(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    fits = isinstance(value, int) and not isinstance(value, bool)
    return (((value,),) if fits else ()), "one dim number"


def _check_tensor(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    return ((value,) if isinstance(value, DType) else ()), "a tensor"


def _check_flag(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    return ((value,) if isinstance(value, bool) else ()), "True or False"


def _check_count(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    fits = isinstance(value, int) and _is_count_like(value) and value >= 0
    return ((value,) if fits else ()), "a whole number from 0 to 2**62"


def _check_number(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    return ((value,) if _is_count_like(value) else ()), "a number of less than 2**62"


def _check_real(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    fits = _is_number(value) and dtypes.f64.holds(value)
    return ((value + 0.0 if isinstance(value, float) else value,) if fits else ()), "a number, or inf or -inf"


def _check_numbers(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    several = isinstance(value, list | tuple)
    found = [_check_real(parameter, item)[0] for item in (value if several else (value,))]
    numbers = tuple(item for one in found for item in one)
    fits = len(numbers) == len(found) > 0
    return ((numbers if several else numbers[0],) if fits else ()), "a number, or a tuple of them"


def _check_range(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    ends, _ = _check_numbers(parameter, value)
    fits = bool(ends) and isinstance(ends[0], tuple) and len(ends[0]) == 2 and ends[0][0] <= ends[0][1]
    return (ends if fits else ()), "two numbers, the lower first"


def _check_meeting(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if _is_whole(value):
        return ((value,) if value >= 0 else ()), "a number of dims from 0 on"
    sides = [(side,) if _is_whole(side) else side for side in value] if isinstance(value, list | tuple) else []
    fits = len(sides) == 2 and all(isinstance(side, list | tuple) and all(map(_is_whole, side)) for side in sides)
    return (
        (tuple(map(tuple, sides)),) if fits else ()
    ), "a number of dims, or the dims of the first and of the second tensor"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_whole(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    return ((value,) if _is_whole(value) else ()), "a whole number"


def _check_sizes(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    return ((sizes,) if all(map(_is_whole, sizes)) else ()), "a whole number, or a tuple of them"


def _check_equation(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    if isinstance(value, str):
        return (value,), ""
    raise ParameterError(  # the general message would show the cells of a tensor
        f"{parameter.name} is a {type(value).__name__}; it must be words like 'ij,jk->ik' (tensors with lists of numbers, "
        "torch's other form, are not taken)",
        parameter=parameter.name,
    )


def _check_choice(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    return ((value,) if value in parameter.choices else ()), f"one of {', '.join(parameter.choices)}"


def _check_choice_or_number(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    fits = _is_number(value) or value in parameter.choices
    canonical = value + 0.0 if isinstance(value, float) else value  # -0.0 and 0.0 are one key of the cache
    return ((canonical,) if fits else ()), f"one of {', '.join(parameter.choices)}, or a number"


def _check_dtype(parameter: Parameter, value: Any) -> tuple[tuple[Any, ...], str]:
    if isinstance(value, DType):
        return (value,), ""
    return (dtypes.parse(str(value)),), ""  # "f64", and torch.float64 prints as its name


_CHECKS = {
    Type.DIMS: _check_dims,
    Type.DIM: _check_dim,
    Type.FLAG: _check_flag,
    Type.COUNT: _check_count,
    Type.NUMBER: _check_number,
    Type.REAL: _check_real,
    Type.CELL: _check_real,
    Type.NUMBERS: _check_numbers,
    Type.RANGE: _check_range,
    Type.MEETING: _check_meeting,
    Type.EQUATION: _check_equation,
    Type.WHOLE: _check_whole,
    Type.SIZES: _check_sizes,
    Type.TENSOR: _check_tensor,
    Type.CHOICE: _check_choice,
    Type.CHOICE_OR_NUMBER: _check_choice_or_number,
    Type.DTYPE: _check_dtype,
}
