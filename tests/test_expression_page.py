"""docs/expressions.md shows what runs, and each of its expressions gives what the calls beside it give."""

from __future__ import annotations

import json

import pytest
import torch

import maskserve as ms
from tests.command_line import Maskserve, folder_fixture, maskserve_fixture  # noqa: F401  # fixtures are found by name
from tests.expression_page import EXAMPLES, PAGE, SALES, Example, by_calls, page, sales


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m tests.expression_page"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.what)
def test_an_expression_of_the_page_has_the_bits_of_its_calls(example: Example, maskserve: Maskserve) -> None:
    expected = by_calls(example)
    for made in (
        ms.eval(example.text, x=sales()),
        ms.load(ms.compute("eval", SALES, expr=example.text).to_bytes())["data"],
    ):
        assert made.dtype is expected.dtype
        assert torch.equal(made.get_mask(), expected.get_mask())
        assert torch.equal(made.to_tensor(False), expected.to_tensor(False))
    ran = maskserve("eval", "--expr", example.text, "--json", str(SALES))
    said = ms.masked_tensor(json.loads(ran.text)["data"])
    assert torch.equal(said.get_mask(), expected.get_mask())
    assert torch.allclose(said.to_tensor(False).double(), expected.to_tensor(False).double())
