"""A few seconds of `python -m benchmarks.soak`: a real process under full load answers all, and closes what it opens."""

from __future__ import annotations

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_under_load_nothing_fails_and_every_descriptor_comes_back() -> None:
    outcome = soak.soaked(4.0, warm_up_s=2.0, looks=2)
    assert {200, 400, 422, soak.VANISHED} <= outcome.statuses.keys()
    assert all(status < 500 for status in outcome.statuses), outcome.statuses
    assert {held.descriptors for held in outcome.held} == {outcome.held[0].descriptors}
    assert "| status |" in soak.report(outcome).replace("  ", "")
