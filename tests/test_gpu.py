"""The reference and the Triton kernels on a CUDA device, beside the CPU. `pytest -m gpu` where there is one."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import maskserve as ms
from maskserve import accelerators, answers, devices, dtypes, engine, execution, requests, uploads
from maskserve.backends.triton_tables import missing
from maskserve.dtypes import DType
from maskserve.ops.rows import Reduction, Row
from maskserve.params import names_of
from maskserve.payload.format import BytesPayload
from tests.http_service import payload
from tests.samples import SLICED, assert_same_bits, cells, needed, plan_of, ulps, with_junk
from tests.triton_rows import OWN, PAIRS, ROWS, TREES, has_own_bits, taken, ulps_apart, variables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def called(row: Row, tensor: ms.MaskedTensor, dim: int | None) -> ms.MaskedTensor:
    """The public function; of a pair the values."""
    along = {"dim": dim} if "dim" in names_of(row) else {}
    made = getattr(ms, row.name)(tensor, **needed(row), **along)
    values: ms.MaskedTensor = made if isinstance(made, ms.MaskedTensor) else made[0]
    return values


@pytest.mark.parametrize("row", SLICED, ids=lambda row: row.name)
def test_a_cuda_device_gives_what_the_cpu_gives(row: Row) -> None:
    numeric = sorted(dtypes.NUMERIC & row.accepts, key=lambda d: d.name)
    for dtype, shape in itertools.product(numeric, ((5, 130), (4097, 2), (3, 9000))):
        sample = cells(dtype, shape, 1, row=row)
        on_cpu = ms.masked_tensor(sample.data, sample.mask)
        on_cuda = on_cpu.to("cuda")
        for dim in (0, 1) + ((None,) if isinstance(row, Reduction) else ()):
            said = (dtype, shape, dim)
            expected, got = called(row, on_cpu, dim), called(row, on_cuda, dim)
            assert got.device.type == "cuda", said
            assert torch.equal(got.get_mask().cpu(), expected.get_mask()), said
            values, wanted = got.get_data().cpu(), expected.get_data()
            if values.is_floating_point():
                assert ulps(values, wanted, values.dtype) <= 4, said
            else:
                assert torch.equal(values, wanted), said


@pytest.mark.parametrize("dtype", sorted(dtypes.NUMERIC, key=lambda d: d.name), ids=lambda d: d.name)
def test_a_masked_product_on_a_cuda_device_is_that_of_the_cpu(dtype: DType) -> None:
    samples = cells(dtype, (3, 40, 70), 1), cells(dtype, (3, 70, 50), 2)
    on_cpu = [ms.masked_tensor(sample.data, sample.mask) for sample in samples]
    expected, got = on_cpu[0] @ on_cpu[1], on_cpu[0].to("cuda") @ on_cpu[1].to("cuda")
    assert torch.equal(got.get_mask().cpu(), expected.get_mask())
    loose = 2e-2 if got.dtype is torch.bfloat16 else 2e-3 if got.dtype is torch.float16 else 1e-4
    torch.testing.assert_close(got.get_data().cpu(), expected.get_data(), rtol=loose, atol=loose)


@pytest.mark.parametrize("dtype", sorted(dtypes.NUMERIC, key=lambda d: d.name), ids=lambda d: d.name)
def test_masks_and_where_they_lie_are_those_of_the_cpu(dtype: DType) -> None:
    sample = cells(dtype, (70, 130), 2)
    on_cpu = ms.masked_tensor(sample.data, sample.mask)
    tests = {"equal": (0, 1)} if dtype is dtypes.boolean else {"equal": 1, "inside": (2, 3), "less": -2.5}
    expected, got = (
        ms.mask(on_cpu, **tests),
        ms.mask(on_cpu.to("cuda"), valid=torch.ones(1, 1, dtype=torch.bool), **tests),
    )
    assert torch.equal(got.get_mask().cpu(), expected.get_mask())
    assert torch.equal(got.get_data().cpu(), expected.get_data())
    assert ms.clumps(got, dim=1).rows(99) == ms.clumps(expected, dim=1).rows(99)
    assert ms.edges(got, 0).rows(99) == ms.edges(expected, 0).rows(99)


@pytest.mark.parametrize("name", ["sum", "var", "amax", "logsumexp", "softmax", "cumsum", "norm"])
def test_gradients_on_a_cuda_device_are_those_of_the_cpu(name: str) -> None:
    sample = cells(dtypes.f32, (33, 70), seed=3)
    given = (2, 1) if name == "norm" else (1,)

    def gradient(device: str) -> ms.MaskedTensor:
        x = ms.masked_tensor(sample.data.to(device), sample.mask.to(device), requires_grad=True)
        made = getattr(ms, name)(x * x, *given)
        made.backward(torch.ones_like(made.get_data()))
        assert x.grad is not None
        return x.grad.to("cpu")

    ours, theirs = gradient("cuda"), gradient("cpu")
    assert torch.equal(ours.get_mask(), theirs.get_mask())
    torch.testing.assert_close(ours.to_tensor(0.0), theirs.to_tensor(0.0))


# -- the Triton kernels -----------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SHAPES = ((1, 1), (5, 130), (63, 2), (65, 33), (4095, 1), (4097, 3), (3, 9000), (20, 130, 40), (1, 1 << 20))


def by_kernels(row: Row, dtype: DType, shape: tuple[int, ...], dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    sample = with_junk(cells(dtype, shape, 1, row=row))
    of = replace(plan_of(row, sample.data, **taken(row, dim=dim)), device="cuda:0")
    with execution.using(backend="triton"):
        values, valid = engine.run(of, sample.data.cuda(), sample.mask.cuda())
    return values.cpu(), valid.cpu()


@needs_triton
@pytest.mark.parametrize(("row", "dtype"), PAIRS, ids=lambda value: value.name)
def test_kernels_give_the_bits_of_the_reference_on_the_cpu(row: Row, dtype: DType) -> None:
    """Rows with exp or log give those of the CPU's kernels within an ulp of float32; running sums within one too."""
    for shape in SHAPES:
        for dim in range(len(shape)):
            got = by_kernels(row, dtype, shape, dim)
            sample = with_junk(cells(dtype, shape, 1, row=row))
            expected = engine.run(plan_of(row, sample.data, **taken(row, dim=dim)), sample.data, sample.mask)
            if not has_own_bits(row, dtype):
                assert_same_bits(got, expected, (row.name, dtype, shape, dim))
                continue
            assert_same_bits(got[1:], expected[1:])
            near = (got[0].double() - expected[0].double()).abs() <= 1e-15
            apart = ulps(torch.where(near, expected[0], got[0]), expected[0], got[0].dtype)
            assert apart <= ulps_apart(row, got[0].dtype), (row.name, shape, dim)


MANY = (1 << 31) + 70
"""Cells that 32 bits do not count, and a last tile that is not whole."""


@needs_triton
@pytest.mark.parametrize("shape", [(MANY,), (MANY // 4096 + 1, 4096), (4096, MANY // 4096 + 1)], ids=str)
def test_more_cells_than_32_bits_count_are_all_seen(shape: tuple[int, ...]) -> None:
    """Sums and places of cells that are 0 but for the last ones; running sums, and an expression, of the last cells."""
    if devices.free_bytes("cuda:0") < 12 * MANY:
        pytest.skip("the device has not the memory")
    data = torch.zeros(shape, dtype=torch.int8, device="cuda")
    mask = torch.ones(shape, dtype=torch.bool, device="cuda")
    flat = data.view(-1)
    flat[-3:], mask.view(-1)[-1] = torch.tensor([1, 5, 7], dtype=torch.int8), False
    x = ms.as_masked_tensor(data, mask)
    with execution.using(backend="triton"):
        assert ms.sum(x).item() == 6
        assert ms.argmax(x).item() == flat.numel() - 2
        assert ms.count(x).item() == flat.numel() - 1
        assert (ms.first(x).item(), ms.last(x).item(), ms.ptp(x).item()) == (0, 5, 5)
        assert ms.fill(x, 9).get_data().view(-1)[-3:].tolist() == [1, 5, 9]
        last = ms.cummax(x, len(shape) - 1)[0] if len(shape) > 1 else ms.ffill(x, 0)
        assert last.get_data().view(-1)[-2].item() == 5
        assert ms.eval("x + x", x=x).get_data().view(-1)[-3:].tolist() == [2, 10, 0]


@needs_triton
@pytest.mark.parametrize("layout", ["lengths", "packed"])
@pytest.mark.parametrize("row", [row for row in OWN if dtypes.f32 in row.accepts], ids=lambda row: row.name)
def test_compact_masks_give_the_bits_of_bools(row: Row, layout: str) -> None:
    prefixes = ms.from_lengths(cells(dtypes.f32, (30, 70, 13), 1, row=row).data, torch.arange(30) * 7 % 71, 1)
    bools, held = prefixes.to_mask_layout("bool").to("cuda"), prefixes.to_mask_layout(layout).to("cuda")
    for dim in range(3):
        got, expected = called(row, held, dim), called(row, bools, dim)
        ours, theirs = ((made.get_data().cpu(), made.get_mask().cpu()) for made in (got, expected))
        assert_same_bits(ours, theirs, (row.name, dim))


@needs_triton
@pytest.mark.parametrize("text", TREES)
def test_a_tree_in_one_kernel_has_the_bits_of_torch_op_by_op(text: str) -> None:
    given = {name: tensor.to("cuda") for name, tensor in variables(TREES[text]).items()}
    got = ms.eval(text, **given)
    with execution.using(backend="reference"):
        expected = ms.eval(text, **given)
    assert torch.equal(got.get_mask(), expected.get_mask())
    torch.testing.assert_close(got.get_data(), expected.get_data(), rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_two_runs_give_the_same_bits(row: Row) -> None:
    for shape in SHAPES:
        assert_same_bits(by_kernels(row, dtypes.f32, shape, 0), by_kernels(row, dtypes.f32, shape, 0), row.name)


@needs_triton
def test_a_device_passes_its_self_test_and_says_what_it_is() -> None:
    about = devices.examined("cuda:0")
    assert about.self_test == "ok"
    assert about.copied_bytes_per_s > 0
    assert 0 < about.free_bytes <= about.memory_bytes


# -- requests on a device ---------------------------------------------------------------------------------------------


def answered(device: str, verb: str, words: dict[str, str], body: bytes) -> bytes:
    request = requests.build(verb, {**words, "device": device, "backend": "reference"})
    return answers.run(request, BytesPayload(body)).to_bytes()


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("reduce", {"op": "sum", "dim": "0"}),
        ("reduce", {"op": "median", "dim": "1"}),
        ("scan", {"op": "cumsum", "dim": "1"}),
        ("fill", {"op": "ffill", "dim": "1"}),
        ("eval", {"expr": "(x - mean(x, dim=1, keepdim=True)) / (1 + abs(x))"}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_goes_through_a_device_in_parts_has_the_bits_of_the_cpu(
    verb: str, words: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pinned buffers, beside computing: a device that says that it has little room free."""
    sample = cells(dtypes.f32, (2000, 4000), 1)
    body = payload(x=sample.data.numpy(), x__mask=sample.mask.numpy())
    expected = answered("cpu", verb, words, body)
    assert answered("cuda", verb, words, body) == expected
    monkeypatch.setattr(accelerators.Cuda, "free_bytes", lambda cuda, device: 16 << 20)
    assert answered("cuda", verb, words, body) == expected


def test_a_tensor_that_goes_by_pinned_buffers_arrives_whole() -> None:
    data = torch.randn(50_000_000)
    assert torch.equal(uploads.uploaded(data, "cuda:0").cpu(), data)


def test_a_device_side_assert_is_a_device_that_is_lost() -> None:
    """In a process of its own, which cannot use the device any more."""
    code = (
        "import torch, maskserve as ms\n"
        "from maskserve.health import health\n"
        "x = torch.ones(3, device='cuda')\n"
        "try:\n    x[torch.tensor([9], device='cuda')]\n    torch.cuda.synchronize()\n"
        "except RuntimeError as error:\n    print(health().heard('cuda:0', error).code)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "device_lost\n", ran.stderr[-2000:]
