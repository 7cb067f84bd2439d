"""docs/padding.md shows what its code gives."""

from __future__ import annotations

import doctest
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "padding.md"


def test_the_page_shows_what_its_code_gives() -> None:
    said: list[str] = []
    found = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
    ran = doctest.DocTestRunner().run(found, out=said.append)
    assert ran.attempted > 20
    assert not ran.failed, "".join(said)
