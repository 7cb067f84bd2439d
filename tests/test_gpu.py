"""The reference on a CUDA device, beside the CPU. `pytest -m gpu` where there is one."""

from __future__ import annotations

import itertools

import pytest
import torch

import maskserve as ms
from maskserve import dtypes
from maskserve.dtypes import DType
from maskserve.ops.rows import Reduction, Row
from tests.samples import SLICED, cells, ulps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("row", SLICED, ids=lambda row: row.name)
def test_a_cuda_device_gives_what_the_cpu_gives(row: Row) -> None:
    numeric = sorted(dtypes.NUMERIC, key=lambda d: d.name)
    for dtype, shape in itertools.product(numeric, ((5, 130), (4097, 2), (3, 9000))):
        sample = cells(dtype, shape, 1)
        on_cpu = ms.masked_tensor(sample.data, sample.mask)
        on_cuda = on_cpu.to("cuda")
        for dim in (0, 1) + ((None,) if isinstance(row, Reduction) else ()):
            said = (dtype, shape, dim)
            expected, got = getattr(ms, row.name)(on_cpu, dim), getattr(ms, row.name)(on_cuda, dim)
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
