"""Expressions: "sum(where(x < 0, exp(x), 1))" -> a checked tree of rows, names and numbers. Imports no torch.

The grammar is a part of Python's, for its precedence; Python's parser reads the text once its length and its words are
checked, and nothing of Python ever runs it. Whatever is refused is refused at a column, which counts from 1.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias, TypeGuard

from maskserve import requests
from maskserve.errors import ExpressionError, MaskserveError, RequestError, nearest
from maskserve.ops import OPS
from maskserve.ops.parameters import REQUIRED, Type
from maskserve.ops.rows import Contraction, Elementwise, Reduction, Row
from maskserve.requests import MOST_NAMES

MOST_BYTES, MOST_NODES, MOST_DEPTH, MOST_CALLS = 2000, 256, 32, 64
IN_PARTS = "compute a part of it first, and give that as a variable"
LONG = 64
MOST_INT = 2**53
"""Beyond it not every whole number is a double, which all numbers of an expression are."""


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number, a whole one as int."""

    value: int | float


@dataclass(frozen=True, slots=True)
class Name:
    """A variable, and where it stands."""

    name: str
    column: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A row, on operands; one that is left out is None. `column` is where it begins."""

    row: Row
    operands: tuple[Node | None, ...]
    params: Mapping[str, Any]
    column: int


Node: TypeAlias = Number | Name | Call


@dataclass(frozen=True, slots=True)
class Expression:
    """A text that was read: its tree, and the variables in it in their order."""

    root: Node
    names: tuple[str, ...]

    def __str__(self) -> str:
        return canonical(self.root)


WORD = re.compile(
    r"(?P<space>[ \t]+)"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?![0-9A-Za-z_.]))"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>\*\*|<=|>=|==|!=|[-+*/()<>=&|~,])"
)
RUN = re.compile(r"[0-9A-Za-z_.]+|.", re.DOTALL)
"""What a refusal shows."""
OPERATORS: Mapping[type[ast.AST], str] = MappingProxyType({
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv", ast.Pow: "pow", ast.USub: "neg", ast.UAdd: "pos",
    ast.BitAnd: "and", ast.BitOr: "or", ast.Invert: "invert", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
    ast.Eq: "eq", ast.NotEq: "ne",
})  # fmt: skip
"""What Python's operators are called in the rows; those that are not here are refused."""
SPELLED: Mapping[str, tuple[str, int]] = MappingProxyType({
    "eq": ("==", 1), "ne": ("!=", 1), "lt": ("<", 1), "le": ("<=", 1), "gt": (">", 1), "ge": (">=", 1),
    "or": ("|", 2), "and": ("&", 3), "add": ("+", 4), "sub": ("-", 4), "mul": ("*", 5), "truediv": ("/", 5),
    "neg": ("-", 6), "pos": ("+", 6), "invert": ("~", 6), "pow": ("**", 7),
})  # fmt: skip
"""How each is written, and how tightly it binds; calls, names and numbers bind tightest."""
COMPARES, BEFORE, POWER, TIGHTEST = 1, 6, 7, 8
SIGNS = "+ - * / ** < <= > >= == != & | ~"

QUOTED = "words without quotes, as in nan=omit, and tensors by name; --let gives another name"
INSTEAD: Mapping[str, str] = MappingProxyType({
    "and": "(a) & (b)", "&&": "(a) & (b)", "or": "(a) | (b)", "||": "(a) | (b)", "not": "~(a)", "!": "~(a)", "^": "a ** b",
    '"': QUOTED, "'": QUOTED, "[": "select(x, dim=0, index=0), or narrow(x, dim=0, start=0, length=2)",
    "?": "where(condition, a, b)", "if": "where(condition, a, b)",
    "\n": "the expression in one line, with a space for each end of a line",
})  # fmt: skip
"""What is written here for a word of other languages."""
CALLED: Mapping[str, str] = MappingProxyType(
    {"//": "floordiv", "%": "mod", "@": "matmul", "<<": "lshift", ">>": "rshift"}
)
"""Python's operators that have no sign here: what the rows call them."""
FUNCTIONS: Mapping[str, str] = MappingProxyType(
    {"ln": "log", "avg": "mean", "average": "mean", "power": "pow", "sd": "std"}
)
"""What functions of other languages are called here."""
SYNONYMS: Mapping[str, str] = MappingProxyType({"axis": "dim", "keepdims": "keepdim", "ddof": "correction"})
"""What parameters of numpy are called here."""
CONSTANTS: Mapping[str, str] = MappingProxyType({
    "pi": repr(math.pi), "e": repr(math.e), "inf": "9**999", "nan": "0/0", "True": "1", "False": "0",
})  # fmt: skip
"""What is written here for what other languages have names for."""


def parse(text: str) -> Expression:
    """What `text` spells, whatever its variables are; ExpressionError says what cannot be, and at which column."""
    if not isinstance(text, str):
        raise refusal(f"an expression is a text, not a {type(text).__name__}", None)
    if not text.strip(" \t"):
        raise refusal("the expression is empty: write one over the variables, such as mean(x, dim=0)", 1)
    if len(text.encode(errors="replace")) > MOST_BYTES:
        raise refusal(f"the expression has more than {MOST_BYTES} bytes, the most that are read", None)
    check_words(text)
    try:
        root = ast.parse(text.strip(" \t"), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        at = error.offset if isinstance(error, SyntaxError) else 1
        reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
        end = len(text) + 1  # 0 is Python's word for it
        raise refusal(f"this is no expression: {reason}", min(indent(text) + at, end) if at else end) from None
    builder = Builder(indent(text))
    return Expression(builder.node(root, MOST_DEPTH), tuple(builder.named))


def indent(text: str) -> int:
    return len(text) - len(text.lstrip(" \t"))


def check_words(text: str) -> None:
    """Refuses what is no word of the language before any parser sees it: quotes, dots, brackets, `lambda`, 0x10, `é`."""
    at, before = 0, Before()
    while at < len(text):
        word = WORD.match(text, at)
        if word is None or (keyword.iskeyword(word[0]) and word[0] not in ("True", "False")):
            run = RUN.match(text, at)
            assert run is not None  # it matches any character
            instead = before.written_for(run[0]) or written_instead(run[0])
            write = f"write {instead}" if instead else f"there are names, numbers, {SIGNS} , and ( )"
            raise refusal(f"{run[0][:40]!r} is no word here: {write}", at + 1)
        if word.lastgroup == "sign" and (instead := written_instead(text[at : at + 2])):
            raise refusal(f"{text[at : at + 2]!r} is no word here: write {instead}", at + 1)
        if (wrong := before.why_not(word)) is not None:
            raise refusal(wrong, at + 1)
        at = word.end()


class Before:
    """The words before a place of the text, as far as a refusal there says what was meant."""

    def __init__(self) -> None:
        self.last = self.last_but_one = ""
        self.in_calls: list[bool] = []
        """Of each parenthesis that is open: whether it is that of a call."""

    def written_for(self, word: str) -> str | None:
        """What is written for a list in dim=[0, 1], or for the method in x.mean(): a call of the function."""
        if word == "[" and self.last == "=":
            name = brief(self.last_but_one)
            return f"{name}=0, or several in parentheses: {name}=(0, 1)"
        method = word.removeprefix(".")
        is_method = self.last.isidentifier() and method != word and method in functions()
        return f"{method}({self.last})" if is_method else None

    def why_not(self, word: re.Match[str]) -> str | None:
        """Why no expression goes on with this word, where Python's parser says less; else it is one of those before."""
        if word.lastgroup == "space":
            return None
        if word.lastgroup != "sign" and self.ends_a_term:
            shown, other = brief(self.last), brief(word[0])
            return f"an operator or a comma is missing between {shown} and {other} (in a URL + is written %2B)"
        if word[0] == "=" and not (self.in_calls and self.in_calls[-1]):
            return "= is for a parameter inside a call: write == for equal; --let gives a tensor another name"
        if word[0] == "(":
            self.in_calls.append(self.last.isidentifier())
        elif word[0] == ")" and self.in_calls:
            self.in_calls.pop()
        self.last, self.last_but_one = word[0], self.last
        return None

    @property
    def ends_a_term(self) -> bool:
        return self.last[-1:].isalnum() or self.last[-1:] in ("_", ")", ".")


def written_instead(word: str) -> str | None:
    """What is written here for a word of other languages; an operator that has none here is a call."""
    called = CALLED.get(word)
    return INSTEAD.get(word) if called is None else f"{operator_rows()[called]}(a, b)"


def refusal(message: str, column: int | None) -> ExpressionError:
    where = "" if column is None else f"column {column}: "
    return ExpressionError(where + message, parameter="expr")


def brief(name: str) -> str:
    """A name as a refusal shows it."""
    return name if len(name) <= LONG else f"{name[:LONG]}…"


def placed(error: MaskserveError, column: int) -> MaskserveError:
    """The error with its column, if it has none: that of a term inside stays."""
    if not error.message.startswith("column "):
        error.message = f"column {column}: {error.message}"
        error.args = (error.message, *error.args[1:])
    return error


class Builder:
    """Python's tree -> ours, no deeper and no larger than the bounds."""

    def __init__(self, indent: int) -> None:
        self.indent = indent
        self.n_nodes = self.n_calls = 0
        self.named: dict[str, None] = {}

    def node(self, node: ast.expr, depth: int) -> Node:
        self.n_nodes += 1
        self.check_count(node)
        if depth == 0:
            self.refuse(node, f"too deep: {MOST_DEPTH} levels are the most that are read; {IN_PARTS}")
        build = BUILDERS.get(type(node))
        if build is None:
            many = "; several values in parentheses are for a parameter, by its name" if type(node) is ast.Tuple else ""
            self.refuse(node, f"this is no term: a term is a name, a number, a call, or terms with an operator{many}")
        return build(self, node, depth - 1)

    def check_count(self, node: ast.expr) -> None:
        if self.n_nodes > MOST_NODES:
            self.refuse(node, f"too long: {MOST_NODES} terms are the most that are read; {IN_PARTS}")

    def number(self, node: ast.Constant, depth: int) -> Node:
        return Number(self.finite(node))

    def name(self, node: ast.Name, depth: int) -> Name:
        self.named[node.id] = None
        if len(self.named) > MOST_NAMES:
            self.refuse(node, f"too many variables: {MOST_NAMES} are the most that are read")
        return Name(node.id, self.column(node))

    def binary(self, node: ast.BinOp, depth: int) -> Node:
        """a + b - c is one level, however many terms it has: what is not nested is not read as if it were."""
        chain = [node]
        while binds_alike(chain[-1].left, node):
            chain.append(chain[-1].left)
        made = self.node(chain[-1].left, depth)
        self.n_nodes += len(chain) - 1
        for each in reversed(chain):
            self.check_count(each)
            made = Call(self.row_of(each, each.op), (made, self.node(each.right, depth)), {}, self.column(each))
        return made

    def unary(self, node: ast.UnaryOp, depth: int) -> Node:
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            return Number(-self.finite(node.operand))
        return self.operation(node, node.op, (node.operand,), depth)

    def comparison(self, node: ast.Compare, depth: int) -> Node:
        if len(node.ops) > 1:
            self.refuse(node.comparators[1], "one comparison at a time: write (a < b) & (b < c)")
        return self.operation(node, node.ops[0], (node.left, node.comparators[0]), depth)

    def operation(self, node: ast.expr, operator: ast.AST, operands: tuple[ast.expr, ...], depth: int) -> Node:
        row = self.row_of(node, operator)
        return Call(row, tuple(self.node(o, depth) for o in operands), {}, self.column(node))

    def row_of(self, node: ast.expr, operator: ast.AST) -> Row:
        name = OPERATORS.get(type(operator))
        if name is None:
            self.refuse(node, f"this operator is none of {SIGNS}")
        return by_operator()[name]

    def call(self, node: ast.Call, depth: int) -> Node:
        self.n_calls += 1
        if self.n_calls > MOST_CALLS:
            self.refuse(node, f"too many calls: {MOST_CALLS} are the most that are read; {IN_PARTS}")
        if not isinstance(node.func, ast.Name):
            self.refuse(node.func, "only functions are called, by their names")
        row = functions().get(node.func.id)
        if row is None:
            self.refuse(node.func, no_function(brief(node.func.id)))
        words = row.operands
        given: dict[str, Node] = {}
        for place, argument in enumerate(node.args):
            if place == len(words):
                known = f"parameters have names{as_in(row, argument)}: {parameters_of(row)}"
                self.refuse(argument, f"{node.func.id} takes {counted(words)}{of_two(row, node.func.id)}; {known}")
            given[words[len(given)]] = self.node(argument, depth)
        said: dict[str, ast.expr] = {}
        for name, value in ((k.arg, k.value) for k in node.keywords):
            if name is None:
                self.refuse(value, "parameters have names: write dim=0")
            if name in given or name in said:
                self.refuse(value, f"{brief(name)} is given twice")
            if name in words:
                given[name] = self.node(value, depth)
            else:
                said[name] = value
        n_needed = len(words) - row.n_optional
        missing = [word for word in words[:n_needed] if word not in given]
        if missing:
            self.refuse(node, f"{row.name} needs {missing[0]}: it takes {counted(words[:n_needed])}")
        return Call(row, tuple(given.get(w) for w in words), self.params(row, node, said), self.column(node))

    def params(self, row: Row, call: ast.Call, said: Mapping[str, ast.expr]) -> Mapping[str, Any]:
        """The row's parameters, checked as those of a request are; a side input is a variable."""
        known = {p.name: p for p in row.requestable}
        for name, node in said.items():
            if name not in known:
                shown = brief(name)
                meant = f"; write {SYNONYMS[name]}" if SYNONYMS.get(name) in known else nearest(shown, known)
                self.refuse(node, f"{row.name} has no parameter {shown}; it has {parameters_of(row)}{meant}")
        needed = [p.name for p in row.requestable if p.default is REQUIRED and p.name not in said]
        if needed:
            self.refuse(call, f"{row.name} needs {needed[0]}: {known[needed[0]].help}")
        params: dict[str, Any] = {}
        for name, node in said.items():
            if known[name].type is Type.TENSOR:
                if not isinstance(node, ast.Name):
                    self.refuse(
                        node, f"{name} is a variable, by its name, and no term: put what it is into the payload first"
                    )
                params[name] = self.name(node, 0)
            else:
                params[name] = self.value(node)
        plain = {name: value for name, value in params.items() if not isinstance(value, Name)}
        try:
            return MappingProxyType(params | requests.checked(row, plain))
        except RequestError as error:
            at = said.get(error.parameter or "", call)
            self.refuse(at, error.message)

    def value(self, node: ast.expr) -> Any:
        """What a parameter may be: a number, True or False, a word, or several in parentheses."""
        if isinstance(node, ast.Tuple):
            return tuple(self.value(item) for item in node.elts)
        is_negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        plain = node.operand if isinstance(node, ast.UnaryOp) and is_negative else node
        if isinstance(plain, ast.Name):
            return f"-{plain.id}" if is_negative else plain.id  # -inf
        if not isinstance(plain, ast.Constant):
            self.refuse(node, "a parameter is a number, True, False or a word, or several in parentheses")
        if isinstance(plain.value, bool) and not is_negative:
            return plain.value
        return -self.finite(plain) if is_negative else self.finite(plain)

    def finite(self, node: ast.Constant) -> int | float:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(node, "True and False are values of parameters, and no terms")
        if value > MOST_INT if isinstance(value, int) else not math.isfinite(value):
            self.refuse(node, f"a number is finite, and a whole one at most {MOST_INT}")
        return value

    def column(self, node: ast.AST) -> int:
        return self.indent + int(getattr(node, "col_offset", 0)) + 1

    def refuse(self, node: ast.AST, message: str) -> NoReturn:
        raise refusal(message, self.column(node))


BUILDERS: Mapping[type[ast.expr], Callable[..., Node]] = MappingProxyType({
    ast.Constant: Builder.number, ast.Name: Builder.name, ast.BinOp: Builder.binary, ast.UnaryOp: Builder.unary,
    ast.Compare: Builder.comparison, ast.Call: Builder.call,
})  # fmt: skip


def binds_alike(node: ast.expr, other: ast.BinOp) -> TypeGuard[ast.BinOp]:
    """Whether both are of operators that Python reads from the left, one after the other."""
    if not isinstance(node, ast.BinOp):
        return False
    one, same = (SPELLED.get(OPERATORS.get(type(each.op), ""), ("", 0))[1] for each in (node, other))
    return one == same and one not in (0, POWER)


@cache
def functions() -> Mapping[str, Row]:
    """The rows that an expression may call, by name and by the other words of requests."""
    served = [row for row in OPS.values() if row.in_expressions]
    words = {alias: row for row in served for alias in row.aliases}
    return MappingProxyType(words | {row.name: row for row in served})


@cache
def by_operator() -> Mapping[str, Row]:
    return {row.operator: row for row in OPS.values() if isinstance(row, Elementwise) and row.operator}


@cache
def operator_rows() -> Mapping[str, str]:
    """The names of the rows that Python's operators call."""
    return {
        row.operator: row.name for row in OPS.values() if isinstance(row, Elementwise | Contraction) and row.operator
    }


def no_function(word: str) -> str:
    """Why a word is called by no expression, and what to call in its place."""
    row = OPS.get(word)
    if row is not None:
        there = f"maskserve {row.verb}" if row.verb else f"maskserve.{word} in Python"
        return f"{word} is not for expressions: {there} gives {row.summary}"
    meant = FUNCTIONS.get(word) or next((row.name for row in functions().values() if word in row.torch), None)
    return f"there is no function {word}{f'; write {meant}' if meant else nearest(word, functions())}"


def as_in(row: Row, argument: ast.expr) -> str:
    """ ", as in dim=time", of what was given without its name."""
    first = next((p.name for p in row.requestable), None)
    return f", as in {first}={brief(ast.unparse(argument))}" if first else ""


def of_two(row: Row, word: str) -> str:
    """ "; maximum(a, b) is of two" for what torch calls max."""
    named = [OPS.get(name) for name in (word, *row.aliases)]
    other = next((one.binary for one in named if isinstance(one, Reduction) and one.binary), "")
    return f"; {other}(a, b) is of two" if other else ""


def counted(words: tuple[str, ...]) -> str:
    """ "2 terms (input, other)"."""
    return f"{len(words)} term{'s' if len(words) > 1 else ''} ({', '.join(words)})"


def parameters_of(row: Row) -> str:
    return ", ".join(p.name for p in row.requestable) or "none"


# -- a tree as text -----------------------------------------------------------------------------------------------


def canonical(node: Node) -> str:
    """The text of a tree, the same for every text of that tree: what history keeps.

    >>> canonical(parse("(mean( x,dim=( 0 ),keepdim=False )+ .50)").root)
    'mean(x, dim=0) + 0.5'
    """
    return written(node)[0]


def written(node: Node) -> tuple[str, int]:
    """(its text, how tightly that binds)."""
    if isinstance(node, Name):
        return node.name, TIGHTEST
    if isinstance(node, Number):
        return repr(node.value), BEFORE if math.copysign(1, node.value) < 0 else TIGHTEST
    row, params = node.row, said(node)
    sign, binds = SPELLED.get(row.operator or "", ("", 0)) if isinstance(row, Elementwise) and not params else ("", 0)
    if not sign or (len(node.operands) == 1 and isinstance(node.operands[0], Number)):  # -2 is a number, neg(2) is not
        return f"{row.name}({', '.join([*arguments(node), *params])})", TIGHTEST
    parts = [written(operand) for operand in node.operands if operand is not None]
    if len(parts) == 1:
        return sign + enclosed(*parts[0], BEFORE), BEFORE
    # what stands on the left binds as tightly as the sign, on the right more; of powers it is the other way round
    left, right = (TIGHTEST, BEFORE) if binds == POWER else (binds + (binds == COMPARES), binds + 1)
    return f"{enclosed(*parts[0], left)} {sign} {enclosed(*parts[1], right)}", binds


def enclosed(text: str, binds: int, needed: int) -> str:
    return text if binds >= needed else f"({text})"


def arguments(node: Call) -> Iterator[str]:
    """The operands of a call; after one that is left out they have names."""
    is_named = False
    for word, operand in zip(node.row.operands, node.operands, strict=True):
        if operand is None:
            is_named = True
        else:
            yield f"{word}={canonical(operand)}" if is_named else canonical(operand)


def said(node: Call) -> list[str]:
    """The parameters that are not their defaults, by name."""
    defaults = {p.name: p.default for p in node.row.requestable}
    given = sorted((name, value) for name, value in node.params.items() if value != defaults[name])
    return [f"{name}={worded(value)}" for name, value in given]


def worded(value: Any) -> str:
    if isinstance(value, tuple):
        return worded(value[0]) if len(value) == 1 else f"({', '.join(map(worded, value))})"
    if isinstance(value, Name):
        return value.name
    return str(requests.spelled(value))
