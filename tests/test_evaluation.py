"""An expression gives what the same calls give in Python, bit for bit, in blocks or whole, whatever lies under the masks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import maskserve as ms
from maskserve import blockwise, evaluation, functions
from maskserve.blockwise import BLOCK, blocks
from maskserve.dtypes import BY_TORCH, DType
from maskserve.errors import MaskserveError
from maskserve.evaluation import Declared, Term, evaluated, planned
from maskserve.expression import parse
from maskserve.ops import OPS
from maskserve.ops.rows import Elementwise
from maskserve.payload.variables import Dims
from maskserve.tensor import MaskedTensor
from maskserve.torch_dtypes import dtype_of

NAMED = {"x": ("time", "lat"), "y": ("lat",), "t": ("time",), "c": ("time", "lat")}
SIZES = ((7, 5), (1, 1), (3, BLOCK // 2 + 1), (BLOCK + 3, 2), (0, 4))

EXPRESSIONS: Mapping[str, Callable[[MaskedTensor, MaskedTensor, MaskedTensor, MaskedTensor], MaskedTensor]] = {
    "x": lambda x, y, t, c: x,
    "(x - mean(x, dim=0, keepdim=True)) / std(x, dim=0, keepdim=True)": lambda x, y, t, c: (
        (x - x.mean(0, keepdim=True)) / x.std(0, keepdim=True)
    ),
    "exp(-x**2 / 2) * y + 1": lambda x, y, t, c: ms.exp(-(x**2) / 2) * y + 1,
    "where(x < 0, y, sqrt(x))": lambda x, y, t, c: ms.where(x < 0, y, ms.sqrt(x)),
    "sum(where(x < 0, exp(x), 1), dim=1)": lambda x, y, t, c: ms.where(x < 0, ms.exp(x), 1).sum(1),
    "~(x > y) | c": lambda x, y, t, c: ~(x > y) | c,
    "clamp(x, max=2 ** 0.5) - amax(x)": lambda x, y, t, c: ms.clamp(x, max=2**0.5) - x.amax(),
    "cumsum(x * 2, dim=0) - softmax(y, dim=-1)": lambda x, y, t, c: ms.cumsum(x * 2, 0) - ms.softmax(y, -1),
    "mean(x, dim=1, weights=y)": lambda x, y, t, c: ms.mean(x, 1, weights=y),
    "(1 + 2) * 3 - 7 / 2 + x": lambda x, y, t, c: 5.5 + x,
}
BY_NAME: Mapping[str, Callable[[MaskedTensor, MaskedTensor, MaskedTensor, MaskedTensor], MaskedTensor]] = {
    "x - mean(x, dim=lat)": lambda x, y, t, c: x - x.mean(1)[:, None],
    "t * x + y": lambda x, y, t, c: t[:, None] * x + y,
    "sum(x, dim=(lat, time), weights=t)": lambda x, y, t, c: ms.sum(x, (0, 1), weights=t[:, None]),
    "exp(t) / x": lambda x, y, t, c: ms.exp(t)[:, None] / x,
}


def tensors(
    size: tuple[int, int], dtype: torch.dtype = torch.float32, junk: float = float("nan")
) -> dict[str, MaskedTensor]:
    """x, y, t of some cells masked and junk below them; c is of bools and has no mask."""
    generator = torch.Generator().manual_seed(size[0] + size[1])

    def made(*shape: int) -> MaskedTensor:
        data, mask = torch.randn(shape, generator=generator, dtype=dtype), torch.rand(shape, generator=generator) > 0.3
        return MaskedTensor(torch.where(mask, data, junk), mask)

    c = ms.masked_tensor(torch.rand(size, generator=generator) > 0.5)
    return {"x": made(*size), "y": made(size[1]), "t": made(size[0]), "c": c}


def declared(values: Mapping[str, MaskedTensor], dims: Mapping[str, Dims]) -> dict[str, Declared]:
    return {
        name: Declared(
            shape=tuple(v.shape), dtype=dtype_of(v._data), dims=dims.get(name), is_masked=v._mask is not None
        )
        for name, v in values.items()
    }


def evaluate(text: str, values: Mapping[str, MaskedTensor], dims: Mapping[str, Dims] | None = None) -> MaskedTensor:
    """The expression's cells, which are what was planned."""
    term = planned(parse(text).root, declared(values, dims or {}))
    result = evaluated(term, values)
    if isinstance(term, Term):
        assert tuple(result.shape) == term.shape
        assert dtype_of(result._data) is term.dtype
        assert (result._mask is not None) == (term.sample._mask is not None)
    return result


def bits(tensor: MaskedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    mask = tensor.get_mask()
    return torch.where(mask, tensor.get_data(), torch.zeros((), dtype=tensor.dtype)), mask


def assert_same(one: MaskedTensor, other: MaskedTensor) -> None:
    assert one.dtype is other.dtype
    for a, b in zip(bits(one), bits(other), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression_gives_what_the_calls_give(text: str, size: tuple[int, int]) -> None:
    values = tensors(size)
    assert_same(evaluate(text, values), EXPRESSIONS[text](**values))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("text", BY_NAME)
def test_operands_with_names_are_aligned_by_them(text: str, size: tuple[int, int]) -> None:
    values = tensors(size)
    assert_same(evaluate(text, values, NAMED), BY_NAME[text](**values))


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_what_lies_under_a_mask_never_matters(text: str) -> None:
    size = (3, BLOCK // 2 + 1)
    results = [evaluate(text, tensors(size, junk=junk)) for junk in (0.0, float("nan"), float("inf"), -3e38)]
    for result in results[1:]:
        assert_same(result, results[0])


REDUCED = st.sampled_from(["mean", "sum", "amax"])
TERMS = st.recursive(
    st.sampled_from(["x", "y", "w", "2", "0.5"]),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/"]), inner),
        st.builds("{}({})".format, st.sampled_from(["-", "abs", "sin", "square"]), inner),
        st.builds("where({} < {}, {}, {})".format, inner, inner, inner, inner),
        st.builds("{}({}, dim={}, keepdim={})".format, REDUCED, inner, st.sampled_from([-1, -2]), st.booleans()),
        st.builds("softmax({}, dim=-1)".format, inner),
    ),
    max_leaves=8,
)  # fmt: skip


def on_numbers_too(name: str) -> Callable[..., object]:
    """The public function; of numbers alone it computes in float64, and gives a whole number for whole ones where it can."""

    def called(*args: Any, **params: Any) -> object:
        if any(isinstance(arg, MaskedTensor) for arg in args):
            return functions.public(name)(*args, **params)
        if params:  # an op along dims
            return functions.public(name)(evaluation.constant(*args), **params)
        cells = [torch.tensor(arg, dtype=torch.bool if arg is True or arg is False else torch.float64) for arg in args]
        made = functions.public(name)(*cells).item()
        return int(made) if all(isinstance(arg, int) for arg in args) and made == int(made) else made

    return called


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=TERMS)
def test_any_expression_gives_what_python_makes_of_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's eval, on a text that hypothesis made, is the oracle; blocks of a few cells, and the result has many."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    monkeypatch.setattr(blockwise, "SMALL", 4)
    monkeypatch.setattr(blockwise, "FEW", 0)
    values = {"x": tensors((5, 3))["x"], "y": tensors((5, 3))["y"], "w": tensors((1, 1))["x"]}
    known = {name: on_numbers_too(name) for name in ("sin", "square", "where", "mean", "sum", "amax", "softmax")}
    try:
        with warnings.catch_warnings(action="ignore"):
            expected = eval(text, {"__builtins__": {}, "abs": abs}, known | values)
    except (MaskserveError, ZeroDivisionError, AttributeError):  # dims that are not there; Python's 1 / 0
        assume(False)
    assume(isinstance(expected, MaskedTensor))
    assert_same(evaluate(text, values), expected)


ELEMENTWISE = [row for row in OPS.values() if isinstance(row, Elementwise)]


@pytest.mark.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
def test_results_between_lend_their_memory_and_change_no_bit(row: Elementwise, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operand is computed before: by an op that gives a new tensor, and by one that gives its own operand."""
    monkeypatch.setattr(blockwise, "FEW", 0)
    dtypes = [torch.float32, torch.float16, torch.int64, torch.bool]  # torch's own complex bits follow the address
    if not sum(is_the_same_after_ops(row, dtype) for dtype in dtypes):
        pytest.skip(f"{row.name} takes no tensors alone")


def is_the_same_after_ops(row: Elementwise, dtype: torch.dtype) -> bool:
    """False where the row does not take such operands."""
    cells, mask = torch.randn(3, 6, 5).to(dtype), torch.rand(6, 5) > 0.3
    names = ("x", "y", "z")[: len(row.operands)]
    values = {name: MaskedTensor(part, mask) for name, part in zip(names, cells.clone(), strict=False)}
    new, same = ("~{}", "~~{}") if dtype is torch.bool else ("-{}", "positive({})")
    variables = [*values.values()]
    computed = [~x if dtype is torch.bool else -x for x in variables]
    try:
        expected = [functions.public(row.name)(*given) for given in (computed, variables)]
    except MaskserveError:
        return False
    for form, one in zip((new, same), expected, strict=True):
        assert_same(evaluate(f"{row.name}({', '.join(map(form.format, names))})", values), one)
    for x, part in zip(variables, cells, strict=False):
        assert torch.equal(x._data, part), "a variable was written into"
    return True


@pytest.mark.parametrize(
    "text",
    ["atan2(x - 0.5, copysign(y + 0.5, 0.5 - x))", "(abs(x) + 1) ** copysign(y + 0.5, 0.5 - x)", "(y - x) / (x + 2)"],
)
def test_memory_that_is_lent_changes_no_bit_where_operands_lie_differently(text: str) -> None:
    """A kernel of torch goes by the layout of what it is given."""
    values = {"x": ms.masked_tensor(torch.randn(128, 100) * 3), "y": ms.masked_tensor(torch.randn(100, 128).t() * 3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "FEW", 1 << 60)
        expected = evaluate(text, values)
    assert_same(evaluate(text, values), expected)


@pytest.mark.parametrize("kind", [kind for kind in BY_TORCH.values() if kind.code], ids=lambda kind: kind.name)
def test_what_is_chosen_is_hidden_in_every_dtype(kind: DType) -> None:
    dtype = getattr(torch, kind.torch)
    x = MaskedTensor(torch.ones(3).to(dtype), torch.tensor([True, False, True]))
    c = ms.masked_tensor(torch.tensor([True, True, False]))
    made = evaluate("where(c, x, x)", {"c": c, "x": x})
    assert made.dtype is dtype
    assert made._data.view(torch.uint8).tolist() == torch.tensor([1, 0, 1]).to(dtype).view(torch.uint8).tolist()


def test_a_gradient_goes_through_an_expression() -> None:
    """https://github.com/pytorch/pytorch/issues/10729: where() leaves no NaN of the branch that was not chosen."""
    cells = torch.tensor([-10.0, -5, 0, 5, 10, 50, 60, 70, 80, 90, 100])
    x = ms.masked_tensor(cells, requires_grad=True)
    value = evaluate("sum(where(x < 0, exp(x), 1))", {"x": x})
    value.backward()
    assert value.item() == pytest.approx(9.0068, abs=1e-4)
    assert x.grad.tolist() == [pytest.approx(4.54e-5, rel=1e-3), pytest.approx(6.7379e-3, rel=1e-4), *[None] * 9]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9**9**9", float("inf")),
        ("2**3 + 1", 9),
        ("7 / 2", 3.5),
        ("4 / 2", 2.0),
        ("where(1 < 2, 3, 4)", 3),
        ("mean(3)", 3.0),
    ],
)
def test_numbers_alone(text: str, value: float) -> None:
    result = evaluate(text, {"x": ms.masked_tensor(torch.ones(1))}).item()
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("1 + x * z", 5, "do not broadcast"),
        ("x - mean(x, dim=tmie)", 5, "did you mean time"),
        ("mean(x, dim=5)", 1, "out of range"),
        ("exp(x & c)", 5, "does not take f32"),
        ("mean(y, weights=x)", 1, "cannot be laid over"),
        ("w * t", 1, "a term may have at most"),
        ("x + yy", 5, "yy is no variable; there are x, y, z, w, t, c; did you mean y?"),
        ("mean", 1, "mean is no variable"),
        ("1 + mean(x, weights=v)", 21, "v is no variable"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_computed(text: str, column: int, says: str) -> None:
    shapes = {"x": (4, 3), "y": (3,), "z": (9,), "w": (5000,), "t": (5000,), "c": (4, 3)}
    dims: dict[str, Dims] = {
        "x": ("time", "lat"),
        "y": ("lat",),
        "z": ("lat",),
        "w": ("a",),
        "t": ("b",),
        "c": ("time", "lat"),
    }
    variables = {
        name: Declared(
            shape=shape,
            dtype=dtype_of(torch.empty(0, dtype=torch.bool if name == "c" else torch.float32)),
            dims=dims[name],
        )
        for name, shape in shapes.items()
    }
    with pytest.raises(MaskserveError, match=says) as error:
        planned(parse(text).root, variables)
    assert error.value.message.startswith(f"column {column}: ")


def test_the_estimate_counts_what_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, n = (1000, 1000), 5_000_000
    variables = {"x": Declared(shape=shape, dtype=dtype_of(torch.empty(0)), is_masked=True)}

    def peak(text: str) -> int:
        return planned(parse(text).root, variables).peak_bytes

    assert peak("x") == 0
    assert peak("exp(x * 2 + 1) / 3") == 2 * n, "at once: what is computed, and what it is computed from"
    assert peak("(x * 2 + 1) * (x * 3) * (x * 5)") == 3 * n
    monkeypatch.setattr(blockwise, "SMALL", 0)
    monkeypatch.setattr(blockwise, "BLOCK", 0)
    assert peak("exp(x * 2 + 1) / 3") == n, "no temporaries beside those of blocks"
    assert peak("softmax(x + 1, dim=0)") == 2 * n
    assert peak("softmax(x, dim=0) + softmax(x, dim=1)") == 3 * n
    assert peak("sum(exp(x))") == n + 5


@pytest.mark.parametrize(
    "shape", [(), (0,), (5, 0, 3), (BLOCK + 1,), (3, BLOCK), (2, 3, BLOCK // 2), (BLOCK, 2, 1)], ids=str
)
def test_blocks_cover_every_cell_once(shape: tuple[int, ...]) -> None:
    seen = torch.zeros(shape, dtype=torch.uint8)
    for index in blocks(shape):
        assert seen[index].numel() <= BLOCK
        seen[index] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("text", ["+x", "x + 0", "abs(x)", "conj_physical(x)", "-(-x)"])
@pytest.mark.parametrize("mask", [None, torch.tensor([[True], [False], [True]])], ids=["none", "rows"])
def test_a_result_of_few_cells_has_memory_of_its_own(text: str, mask: torch.Tensor | None) -> None:
    x = ms.as_masked_tensor(torch.tensor([[1.0], [torch.nan], [3.0]]).expand(3, 4), mask)
    made = ms.eval(text, x=x)
    made[2, 1] = None
    made[0] = 7.0
    assert x.tolist()[0] == [1] * 4
    assert x.get_mask()[2].all()
    assert made.tolist()[::2] == [[7] * 4, [3, None, 3, 3]]


def test_no_op_of_few_cells_gives_those_of_the_caller() -> None:
    ones = {dtype: torch.ones(3, dtype=dtype) for dtype in (torch.bool, torch.int64, torch.float32, torch.complex64)}
    mask = torch.tensor([True, False, True])
    for row in OPS.values():
        if not isinstance(row, Elementwise) or len(row.operands) > 1:
            continue
        for dtype, cells in ones.items():
            try:
                made = ms.eval(f"{row.name}(x)", x=ms.as_masked_tensor(cells, mask))
            except MaskserveError:
                continue
            assert made._data.untyped_storage().data_ptr() != cells.untyped_storage().data_ptr(), (row.name, dtype)
            assert bool(cells.to(torch.bool).all()), (row.name, dtype)
