"""docs/gradients.md shows what runs."""

from __future__ import annotations

from tests.gradient_page import CASES, PAGE, outcome, rewritten


def test_the_page_shows_what_its_code_gives() -> None:
    page = PAGE.read_text()
    assert rewritten(page) == page, "python -m tests.gradient_page"


def test_nan_is_plain_torchs_answer_and_never_ours() -> None:
    for case in CASES:
        assert "nan" not in outcome(case.ours).text, case.title
        assert "nan" in outcome(case.plain).text, case.title
