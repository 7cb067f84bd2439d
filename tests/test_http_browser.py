"""/docs in a real browser: whole without a network, and a request can be made from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskserve.ops import verbs
from maskserve_api import swagger
from tests import browser
from tests.http_service import Running, running


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running() as it:
        yield it


def test_the_page_and_its_files_come_from_the_service_alone(service: Running) -> None:
    assert service.http.get("/").headers["location"] == "/docs"
    page = service.http.get("/docs")
    assert page.headers["content-security-policy"] == swagger.POLICY
    assert "://" not in page.text
    for name, kind in swagger.FILES.items():
        response = service.http.get(f"/docs/{name}")
        assert response.headers["content-type"].startswith(kind)
        assert response.content == swagger.content(name)
        assert f"/docs/{name}" in page.text


@pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_every_operation_and_tries_one_out(service: Running, tmp_path: Path) -> None:
    base = f"http://{service.netloc}"
    with browser.tab(tmp_path) as tab:
        tab.call("Page.navigate", url=f"{base}/docs")
        tab.until("document.querySelectorAll('.opblock').length > 5")
        shown = tab.value("document.body.innerText")
        for verb in verbs():
            assert f"/v1/{verb}" in shown
        verb = verbs()[0]
        block = f"document.querySelector('[id$=\"-{verb}\"]')"
        tab.value(f"{block}.querySelector('.opblock-summary-control').click()")
        tab.until(f"{block}.querySelector('.try-out__btn') && ({block}.querySelector('.try-out__btn').click(), true)")
        tab.until(f"{block}.querySelector('.execute') && ({block}.querySelector('.execute').click(), true)")
        answer = tab.until(f"{block}.querySelector('.live-responses-table .response-col_description pre')?.innerText")
        assert json.loads(answer).keys() == {"data"}
        assert tab.complaints == []
        assert {url for url in tab.requested if not url.startswith((base, "data:", "about:"))} == set()
