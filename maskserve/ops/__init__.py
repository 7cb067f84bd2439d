"""The op table: WHAT is computed, one row per op. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from maskserve.errors import GradientError, UnknownOpError, nearest
from maskserve.ops import (
    contractions,
    elementwise,
    fills,
    formulas,
    layers,
    losses,
    maskings,
    moves,
    normalizations,
    orderings,
    reductions,
    scans,
    wholes,
)
from maskserve.ops.rows import GRAD, Formula, Row, Table

OPS = Table()
OPS.add(*reductions.ROWS, *normalizations.ROWS, *scans.ROWS, *fills.ROWS, *maskings.ROWS, *orderings.ROWS)
OPS.add(*wholes.ROWS, *elementwise.ROWS, *contractions.ROWS, *moves.ROWS, *formulas.ROWS, *losses.ROWS, *layers.ROWS)


def find(word: str, *, verb: str | None = None) -> Row:
    """The row that `word` names or is an alias of, among the rows of `verb`."""
    words = _words(verb, len(OPS))
    if word not in words:
        if word in OPS and OPS[word].verb is None:
            raise UnknownOpError(f"{word} is for Python: call maskserve.{word}", parameter="op", allowed=words)
        other = next((row for row in OPS.values() if row.verb and word in (row.name, *row.aliases)), None)
        if other is not None and verb == GRAD:
            raise no_gradient(other)
        if other is not None:
            message = f"{word} is an op of the verb {other.verb}, not of {verb}: ask that verb"
            raise UnknownOpError(message, parameter="op", allowed=words)
        served = [w for w in words if verb or words[w].verb]  # the rest are hundreds, which `maskserve ops` lists
        more = f" or one of {len(words) - len(served)} more" if len(served) < len(words) else ""
        raise UnknownOpError(
            f"op {word!r:.80} is not known{f' to {verb}' if verb else ''}: "
            f"give one of {', '.join(served)}{more}{nearest(word, words)}",
            parameter="op",
            allowed=served,
        )
    return words[word]


@cache
def _words(verb: str | None, n_rows: int) -> Mapping[str, Row]:
    """The rows of `verb` by name and alias, in the table of `n_rows`: rows are only ever added."""
    known = [row for row in OPS.values() if row.verb and (verb is None or verb in row.verbs)]
    words = {w: row for row in known for w in (row.name, *row.aliases)}
    if verb is None:
        words |= {row.name: row for row in OPS.values() if row.name not in words}  # a word that requests may say wins
    return MappingProxyType(words)


def no_gradient(row: Row) -> GradientError:
    """The error of a row that another verb serves and grad does not."""
    have = [row.name for row in served(GRAD) if not isinstance(row, Formula)]
    return GradientError(
        f"{row.name} has no gradient: {row.why_no_gradient}; these have one: {', '.join(have)}",
        parameter="op",
        allowed=have,
    )


def default(verb: str) -> Row | None:
    """The row that a verb means when no op is given: the one of its own name, or the one that takes an expression."""
    row = OPS.get(verb)
    if row is not None and row.verb == verb:
        return row
    return next((row for row in served(verb) if isinstance(row, Formula)), None)


def instead_of(name: str) -> str:
    """'; maskserve.amax gives the largest valid cell' for "max"; nothing where `name` is no op's other word."""
    for row in OPS.values():
        if name in row.aliases:
            return f"; maskserve.{row.name} gives the {row.summary}"
    return ""


def method_of(name: str) -> Row | None:
    """The row that a method of this name is, by its own name or another one of torch's: m.clip is clamp."""
    row = OPS.get(name) or next((row for row in OPS.values() if name in row.torch and not row.differs), None)
    return row if row is not None and row.is_method else None


def verbs() -> tuple[str, ...]:
    """The verbs that some row is served by: the rows' own in the table's order, then those that serve several kinds."""
    own = [row.verb for row in OPS.values() if row.verb is not None]
    return tuple(dict.fromkeys([*own, *(verb for row in OPS.values() for verb in row.verbs)]))


def served(verb: str) -> tuple[Row, ...]:
    """The rows that a verb serves."""
    return tuple(row for row in OPS.values() if verb in row.verbs)


def names_of(rows: tuple[Row, ...]) -> str:
    """The names of the rows that are called by them."""
    return ", ".join(row.name for row in rows if not isinstance(row, Formula))


def verb_summary(verb: str) -> str:
    """What a verb gives, in one line."""
    rows = served(verb)
    if verb == GRAD:
        return (
            f"the gradient of an expression by its variables, or by the data of one of {names_of(rows)}; the payload's tensor "
            "grad_output, of the result's shape, is the gradient from above: ones where there is none"
        )
    return f"one of {', '.join(row.name for row in rows)}" if len(rows) > 1 else rows[0].summary


__all__ = ["OPS", "Row", "default", "find", "instead_of", "method_of", "served", "verb_summary", "verbs"]
