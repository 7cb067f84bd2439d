"""Reports on the masks of an answer: lines in place of a payload, cut where they are many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maskserve.errors import DimError, ParameterError, nearest
from maskserve.ops.parameters import Parameter, Type
from maskserve.ops.rows import Masking, Report
from maskserve_cli import outputs
from maskserve_cli.outputs import Form, Target
from maskserve_cli.table import MASKED, columns, dims_text
from maskserve_cli.words import rows

if TYPE_CHECKING:
    from maskserve.answers import Answer
    from maskserve.steps import Result

LINES = 1000
"""The most rows of a variable that are printed; how many more there are is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One report, as asked for: what its option was given, and the words for its parameters."""

    report: Report
    choice: str | None
    words: Mapping[str, str]


def of_verb(verb: str) -> tuple[Report, ...]:
    """The reports that the rows of a verb have."""
    return tuple(report for row in rows(verb) if isinstance(row, Masking) for report in row.reports)


def options(listings: Sequence[Report]) -> dict[str, Report | Parameter]:
    """The option of each report, and those of their parameters."""
    return {
        **{report.name: report for report in listings},
        **{p.name: p for report in listings for p in report.parameters},
    }


def chosen(listings: Sequence[Report], given: Mapping[str, Any]) -> Listing | None:
    """The one report that was asked for, if any."""
    asked = [report for report in listings if given[report.name]]
    words = {p.name: given[p.name] for report in listings for p in report.parameters if given[p.name] is not None}
    if len(asked) > 1:
        both = " and ".join(f"--{report.name}" for report in asked)
        raise ParameterError(f"{both}: give one of them", parameter=asked[1].name)
    if not asked:
        if words:
            name = next(iter(words))
            ours = " or ".join(f"--{report.name}" for report in listings)
            raise ParameterError(f"--{name} goes with a report: give {ours} too", parameter=name)
        return None
    report, choice = asked[0], given[asked[0].name]
    if report.choices and choice not in report.choices:
        raise ParameterError(
            f"--{report.name} {choice!r:.40}: give one of {', '.join(report.choices)}{nearest(choice, report.choices)}",
            parameter=report.name,
            allowed=report.choices,
        )
    return Listing(report=report, choice=choice if report.choices else None, words=words)


def refuse_output(listing: Listing, target: Target) -> None:
    """Raise where a payload was asked for too."""
    if target.path is not None or target.form is Form.SAFETENSORS:
        raise ParameterError(
            f"--{listing.report.name} lists, it writes no payload: leave -o out; --json lists as JSON", parameter="out"
        )


def write(listing: Listing, answer: Answer, target: Target) -> None:
    """The report on every variable of the answer."""
    computed = [result for result in answer.held if not result.is_coordinate]
    listed = [found for result in computed if (found := looked_at(listing, result)) is not None]
    if not listed:
        raise no_such_dim(listing, computed)
    if target.form is Form.JSON:
        outputs.write_text([json.dumps([found.record() for found in listed], ensure_ascii=False)])
    else:
        outputs.write_text(line for found in listed for line in found.lines(target.form))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """The rows of one variable, at most LINES of them; `more` are left out."""

    title: str
    name: str
    dims: tuple[str, ...] | None
    along: str | int | None
    heads: tuple[str, ...]
    rows: list[list[int | None]]
    more: int

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "along": self.along,
            "columns": list(self.heads),
            "rows": self.rows,
            "more": self.more,
        }

    def lines(self, form: Form) -> Iterator[str]:
        """A title, then a row a line: in columns for people, between tabs for programs."""
        yield self.title
        words = [list(self.heads), *([MASKED if n is None else str(n) for n in row] for row in self.rows)]
        if form is Form.TABLE:
            yield from columns(words, indent="  ", right=range(len(self.heads)))
        else:
            yield from ("\t".join(row) for row in words)
        if self.more:
            yield f"… {self.more} more"


def looked_at(listing: Listing, result: Result) -> Listed | None:
    """The report on one variable; None where it lacks the named dim."""
    from maskserve.tensor import MaskedTensor
    from maskserve_cli.command import imported

    arguments: dict[str, Any] = {}
    along: str | int | None = None
    dim: int | None = None
    for parameter in listing.report.parameters:
        if parameter.name in listing.words and parameter.type is Type.DIM:
            along, dim = dim_of(listing.words[parameter.name], result)
            if dim is None:
                return None
            arguments[parameter.name] = dim
    tensor = MaskedTensor(result.data, result.mask)
    choice = [listing.choice] if listing.choice else []
    try:
        found: Any = imported(listing.report.function)(tensor, *choice, **arguments)
    except DimError as error:
        error.message = f"{result.name}: {error.message}; --tensor picks the variables to look at"
        raise
    names = result.dims or tuple(f"dim {i}" for i in range(result.data.ndim))
    others = () if dim is None else tuple(n for i, n in enumerate(names) if i != dim % max(len(names), 1))
    what = f"{listing.choice + ' ' if listing.choice else ''}{listing.report.name}"
    where = "" if along is None else f" along {'dim ' if isinstance(along, int) else ''}{along}"
    sized = dims_text(tuple(result.data.shape), result.dims)
    return Listed(
        title=f"# {result.name} {result.dtype.name} {sized}: {len(found)} {what}{where}",
        name=result.name,
        dims=result.dims,
        along=along,
        heads=(*others, *found.columns),
        rows=found.rows(LINES),
        more=max(len(found) - LINES, 0),
    )


def dim_of(word: str, result: Result) -> tuple[str | int, int | None]:
    """The dim that a word means, as said and by number; None where the variable has none of that name."""
    from maskserve.requests import parse_dim

    try:
        said = parse_dim(word)
    except ValueError as error:
        raise DimError(f"dim {word!r:.40}: {error}") from None
    if isinstance(said, int):
        return said, said
    names = result.dims or ()
    return said, names.index(said) if said in names else None


def no_such_dim(listing: Listing, computed: Sequence[Result]) -> DimError:
    names = list(dict.fromkeys(name for result in computed for name in result.dims or ()))
    word = next(iter(listing.words.values()), "")
    have = f"the payload's dims are {', '.join(names)}" if names else "the payload names no dims: give a number"
    return DimError(f"no variable has the dim {word[:64]!r}; {have}{nearest(word, names)}", allowed=names)
