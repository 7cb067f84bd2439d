"""Expressions are read as Python reads them, and whatever is no part of the language is refused at its column."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maskserve.errors import ExpressionError
from maskserve.expression import (
    MOST_BYTES,
    OPERATORS,
    WORD,
    Call,
    Name,
    Node,
    Number,
    by_operator,
    canonical,
    functions,
    parse,
)

PIECES = (*"xy01.,()+-*/<>=&|~!'\"[]{}:;@%^\\#_ \t\n\0\r\xff\uff45", "**", "<=", "==", "True", "None", "lambda", "if", " in ",
          "f(", "mean(", "where(", "dim=", "1e9", "0x", "__class__", "x.", "exp(x)", ":=", "...", "*x")  # fmt: skip


def spelled(node: Node | None) -> Any:
    """A tree as nested tuples, to compare."""
    if isinstance(node, Call):
        params = {k: v.name if isinstance(v, Name) else v for k, v in node.params.items()}
        return (node.row.name, *map(spelled, node.operands), *([params] if params else []))
    return node.value if isinstance(node, Number) else None if node is None else node.name


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("x", "x"),
        ("  x\t", "x"),
        ("sum(where(x < 0, exp(x), 1))", ("sum", ("where", ("lt", "x", 0), ("exp", "x"), 1))),
        ("-x**2", ("neg", ("pow", "x", 2))),
        ("2**-x", ("pow", 2, ("neg", "x"))),
        ("x - y - 1", ("sub", ("sub", "x", "y"), 1)),
        ("~x & y | (x < y)", ("bitwise_or", ("bitwise_and", ("bitwise_not", "x"), "y"), ("lt", "x", "y"))),
        ("x & y == 1", ("eq", ("bitwise_and", "x", "y"), 1)),
        ("+x * -1.5e-3", ("mul", ("positive", "x"), -0.0015)),
        ("mean(x, dim=(0, lat), keepdim=True)", ("mean", "x", {"dim": (0, "lat"), "keepdim": True})),
        ("max(x, nan=omit)", ("amax", "x", {"nan": "omit"})),
        ("mean(x, weights=y)", ("mean", "x", {"weights": "y"})),
        ("norm(x, ord=-inf)", ("norm", "x", {"ord": float("-inf")})),
        ("clamp(x, max=1)", ("clamp", "x", None, 1)),
        ("sub(x, other=y, alpha=2)", ("sub", "x", "y", {"alpha": 2})),
        ("softmax(x, dim=-1)", ("softmax", "x", {"dim": -1})),
    ],
)
def test_an_expression_is_read_with_pythons_precedence(text: str, tree: Any) -> None:
    assert spelled(parse(text).root) == tree


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("", 1, "empty"),
        ("x +", 4, "no expression"),
        ("(x", 1, "never closed"),
        ("x y", 3, "an operator or a comma is missing between x and y (in a URL + is written %2B)"),
        ("abs(x) 2", 8, "missing between ) and 2"),
        ("mean(x dim=0)", 8, "missing between x and dim"),
        ("x = 1", 3, "write == for equal"),
        ("abs((x = 1))", 8, "write == for equal"),
        ("x.real", 2, "'.real' is no word"),
        ("x + y.mean(0)", 6, "'.mean' is no word here: write mean(y)"),
        ("'a'", 1, "is no word"),
        ("mean(x, dim=[0])", 13, "'[' is no word here: write dim=0, or several in parentheses: dim=(0, 1)"),
        ("x[0]", 2, "'[' is no word here: write select(x, dim=0, index=0)"),
        ("x // 2", 3, "'//' is no word here: write floor_divide(a, b)"),
        ("x % 2", 3, "'%' is no word here: write remainder(a, b)"),
        ("x @ y", 3, "'@' is no word here: write matmul(a, b)"),
        ("x << 2", 3, "'<<' is no word here: write bitwise_left_shift(a, b)"),
        (
            "mean(x, axis=0)",
            14,
            "mean has no parameter axis; it has dim, keepdim, dtype, weights, min_count, empty, nan; write dim",
        ),
        ("mean(x, time)", 9, "mean takes 1 term (input); parameters have names, as in dim=time: dim, keepdim"),
        ("norm(x, 2)", 9, "as in ord=2"),
        ("reshape(x, (2, -1))", 12, "as in shape=(2, -1)"),
        ("mean(x, weights=cos(y))", 17, "put what it is into the payload first"),
        ("x, y", 1, "several values in parentheses are for a parameter"),
        ("clip(x, 0, 1)", 1, "there is no function clip; write clamp"),
        ("avg(x)", 1, "there is no function avg; write mean"),
        ("if(x, 1, 0)", 1, "write where(condition, a, b)"),
        ("gather(x, y)", 1, "gather is not for expressions: maskserve.gather in Python gives cells"),
        ("mask(x)", 1, "mask is not for expressions: maskserve mask gives"),
        ("max(x, y)", 8, "max takes 1 term (input); maximum(a, b) is of two; parameters have names"),
        ("x if y else x", 3, "'if' is no word"),
        ("lambda", 1, "'lambda' is no word"),
        ("0x10", 1, "'0x10' is no word"),
        ("1_0", 1, "'1_0' is no word"),
        ("1j", 1, "'1j' is no word"),
        ("x\n", 2, "write the expression in one line, with a space for each end of a line"),
        ("abs(\nx)", 5, "'\\n' is no word here: write the expression in one line"),
        ("x > 1 and x < 2", 7, "'and' is no word here: write (a) & (b)"),
        ("x or y", 3, "'or' is no word here: write (a) | (b)"),
        ("x && y", 3, "'&&' is no word here: write (a) & (b)"),
        ("x || y", 3, "'||' is no word here: write (a) | (b)"),
        ("not x", 1, "'not' is no word here: write ~(a)"),
        ("x ^ 2", 3, "'^' is no word here: write a ** b"),
        ('mean(x, nan="omit")', 13, "write words without quotes, as in nan=omit"),
        ("\uff45xp(x)", 1, "is no word"),
        ("x < y < 1", 9, "one comparison at a time"),
        ("1e400", 1, "a number is finite"),
        ("9007199254740993", 1, "9007199254740992"),
        ("9" * 1900, 1, "9007199254740992"),
        ("x + True", 5, "True and False are values of parameters"),
        ("1 + mena(x)", 5, "there is no function mena; did you mean mean?"),
        ("mean(x)(x)", 1, "by their names"),
        ("mean(x, 0)", 9, "parameters have names, as in dim=0: dim,"),
        ("mean(*x)", 6, "no term"),
        ("mean(**x)", 8, "write dim=0"),
        ("mean(x, dims=0)", 14, "did you mean dim?"),
        ("mean(x, dim=0, dim=1)", 20, "given twice"),
        ("mean(x, input=x)", 15, "given twice"),
        ("mean(x, nan=foo)", 13, "give propagate, omit or raise"),
        ("mean(x, keepdim=-True)", 18, "True and False"),
        ("mean(x, weights=1)", 17, "is a variable"),
        ("mean(x, tensor=x)", 16, "no parameter tensor"),
        ("quantile(x)", 1, "needs q"),
        ("where(x < 0, x)", 1, "needs other"),
        ("einsum(x, y)", 1, "einsum is not for expressions"),
        ("(x+1)*" + "((x+1)*" * 20 + "x" + "+1)" * 20, 107, "32 levels are the most that are read; compute a part"),
        ("+".join("x" * 129), 257, "256 terms are the most that are read; compute a part"),
        ("**".join("x" * 40), 94, "32 levels"),
        ("-" * 500 + "x", 33, "32 levels"),
        ("f(" * 500, None, "no expression"),
        (f"where({'+'.join('x' * 30)}, {'*'.join('x' * 30)}, {'-'.join('x' * 30)})" + "+(" + "x+" * 90, None, ""),
        ("(x" + ",x" * 300 + ")", 1, "no term"),
        ("x" + "+x" * MOST_BYTES, None, f"{MOST_BYTES} bytes"),
    ],
)
def test_what_is_no_expression_is_refused_at_its_column(text: str, column: int | None, says: str) -> None:
    with pytest.raises(ExpressionError) as raised:
        parse(text)
    message = raised.value.message
    assert says in message
    assert column is None or message.startswith(f"column {column}: ")
    assert raised.value.parameter == "expr"
    assert len(message) < 400


def test_terms_names_and_calls_are_bounded() -> None:
    names = tuple(f"v{i}" for i in range(20))
    balanced = "x"
    for _ in range(8):
        balanced = f"({balanced}+{balanced})"
    for text, says in (
        (balanced, "256 terms"),
        ("+".join(names), "16 are"),
        ("+".join(["exp(exp(exp(x)))"] * 22), "64 are"),
    ):
        with pytest.raises(ExpressionError, match=says):
            parse(text)


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "&", "|"])
@pytest.mark.parametrize("n", [33, 128])
def test_a_long_row_of_one_operator_is_one_level(sign: str, n: int) -> None:
    text = f" {sign} ".join("x" * n)
    assert canonical(parse(f"({text})").root) == text  # it is read from the left


def test_every_operator_and_function_of_the_table_is_there() -> None:
    assert set(OPERATORS.values()) <= by_operator().keys()
    assert {"mean", "max", "softmax", "cumsum", "ffill", "where", "exp", "clamp"} <= functions().keys()
    for word, row in functions().items():
        assert word in (row.name, *row.aliases)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(max_size=80) | st.binary(max_size=60).map(str)
)
@example("().__class__.__base__.__subclasses__()")
@example("9**9**9")
def test_whatever_comes_is_a_tree_or_refused_at_a_column(text: str) -> None:
    refused = None
    try:
        parse(text)
    except ExpressionError as error:
        refused = re.match(r"column ([1-9][0-9]*): ", error.message)
        assert refused, error.message  # noqa: PT017  # whether it is raised is not known before
    if refused:
        assert int(refused[1]) <= len(text) + 1
    else:
        ast.parse(text.strip(), mode="eval")
        assert "".join(word[0] for word in WORD.finditer(text)) == text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (" (x)+ ( y*2 ) ", "x + y * 2"),
        ("(x - y) - (1 - x)", "x - y - (1 - x)"),
        ("(-x)**2", "(-x) ** 2"),
        ("-(x**2)", "-x ** 2"),
        ("(-3)**2", "(-3) ** 2"),
        ("2**(3**x)", "2 ** 3 ** x"),
        ("(2**3)**x", "(2 ** 3) ** x"),
        ("x / (y / 2)", "x / (y / 2)"),
        ("~(x < y) | ((x == 1) & y)", "~(x < y) | (x == 1) & y"),
        ("add(x, y)", "x + y"),
        ("sub(x, y, alpha=2)", "sub(x, y, alpha=2)"),
        ("clamp(x, max=.5)", "clamp(x, max=0.5)"),
        ("max(x, keepdim=True, dim=(lat, 0), nan=propagate)", "amax(x, dim=(lat, 0), keepdim=True)"),
        ("mean(x, weights=y, dim=(lat))", "mean(x, dim=lat, weights=y)"),
        ("norm(x, ord=-inf)", "norm(x, ord=-inf)"),
        ("sum(x, dtype=float64)", "sum(x, dtype=f64)"),
    ],
)
def test_a_tree_has_one_text(text: str, written: str) -> None:
    tree = parse(text).root
    assert canonical(tree) == written
    assert canonical(parse(written).root) == written


TREES = st.recursive(
    st.sampled_from(["x", "y", "2", "-0.5", "1e300"]),
    lambda inner: st.one_of(
        st.builds(
            "({}) {} ({})".format, inner, st.sampled_from(["+", "-", "*", "/", "**", "<", "==", "&", "|"]), inner
        ),
        st.builds("{}({})".format, st.sampled_from(["-", "+", "~", "exp", "sum"]), inner),
        st.builds("where({}, {}, {})".format, inner, inner, inner),
    ),
    max_leaves=12,
)


@given(text=TREES)
def test_the_text_of_a_tree_is_read_as_that_tree(text: str) -> None:
    tree = parse(text).root
    again = parse(canonical(tree)).root
    assert spelled(again) == spelled(tree)
    assert canonical(again) == canonical(tree)


@pytest.mark.parametrize("name", ["orography", "order", "ord", "android", "nothing", "note", "isobar", "inn", "format"])
def test_a_name_may_begin_as_a_word_of_python_does(name: str) -> None:
    assert parse(f"{name} - mean({name})").names == (name,)
