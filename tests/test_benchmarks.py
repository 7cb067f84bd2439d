"""The benchmarks cover the op table, compare results before they time, and rewrite their page. No time is asserted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import maskserve as ms
from benchmarks import cases, gradients, jobs, peers, timing
from benchmarks.__main__ import measured
from benchmarks.forms import FORMS
from benchmarks.report import BEGIN, END, PAGE, Run, report, rewrite
from maskserve.ops import find
from maskserve.plan import SlicedRow


@pytest.fixture(scope="module")
def tiny() -> Run:
    return measured(cases.TINY, cases.rows(), timing.LEAST, command="tiny", best_of=0)


def test_every_sliced_row_is_timed_and_agrees_with_a_peer(tiny: Run) -> None:
    timed = {t.row.name for t in tiny.timings if peers.OURS in t.seconds}
    assert timed == {row.name for row in cases.rows()}
    assert not tiny.wrong
    assert {t.row.name for t in tiny.timings if not t.agreeing} <= timed - set(FORMS)


def test_the_plain_formulations_agree_wherever_they_are_tried(tiny: Run) -> None:
    assert [(t.row.name, t.cell.label) for t in tiny.timings if peers.PLAIN in (*t.differing, *t.failed)] == []


@pytest.mark.parametrize("row", [row for row in cases.rows() if row.name in FORMS], ids=lambda row: row.name)
def test_what_lies_under_the_mask_changes_no_plain_formulation(row: SlicedRow) -> None:
    cell = cases.TINY[0].cells[1]
    sample = cases.sample(row, cell)
    assert sample.mask is not None
    form, given = FORMS[row.name], cases.leading(row)
    first, *others = (
        timing.parts(form(sample.data.masked_fill(~sample.mask, junk), sample.mask, cell.dim, *given))
        for junk in (0.0, torch.nan, torch.inf)
    )
    valid = torch.ones(()).bool() if first[1] is None else first[1]
    for values, own in others:
        assert own is None or torch.equal(own, valid)
        assert torch.equal(torch.where(valid, values, 0), torch.where(valid, first[0], 0))


def test_the_report_has_a_line_for_each_op(tiny: Run) -> None:
    text = report(tiny)
    assert all(f"\n| {row.name} " in text for row in cases.rows())
    assert "torch.masked (its time / ours)" in text


def test_a_fast_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ms, "sum", lambda data, *_, **__: ms.masked_tensor(torch.zeros(()), torch.tensor(True)), raising=False
    )
    found = timing.measure(find("sum"), cases.TINY[0].cells[0], timing.LEAST)
    assert found.is_wrong
    assert not found.seconds


def test_a_wrong_cell_is_in_the_report(tiny: Run) -> None:
    wrong = dataclasses.replace(tiny.timings[0], seconds={}, agreeing=(), differing=("torch.masked",))
    text = report(dataclasses.replace(tiny, timings=(wrong, *tiny.timings[1:])))
    assert "No peer agrees, not timed: sum (all)" in text


@pytest.mark.parametrize("groups", [cases.QUICK, cases.FULL], ids=["quick", "full"])
def test_every_row_has_cells_in_each_set(groups: tuple[cases.Group, ...]) -> None:
    assert {row.name for row, _ in cases.pairs(groups, cases.rows())} == {row.name for row in cases.rows()}


@pytest.mark.parametrize("groups", [cases.QUICK, cases.FULL], ids=["quick", "full"])
def test_no_row_sorts_tens_of_millions_of_cells(groups: tuple[cases.Group, ...]) -> None:
    sorting = [row for row in cases.rows() if cases.sorts(row)]
    assert {"median", "mode", "rank", "sort", "topk"} <= {row.name for row in sorting}
    assert max(cell.n for _, cell in cases.pairs(groups, tuple(sorting))) <= cases.SORTED_CELLS


def test_a_command_that_is_not_there_has_no_time() -> None:
    commands = {"no such": ["/no/such/command"], "false": ["false"], "true": ["true"]}
    times = timing.start_times(commands, best_of=1)
    assert [name for name, seconds in times.items() if seconds is None] == ["no such", "false"]


def test_only_the_generated_block_of_the_page_is_rewritten() -> None:
    page = Path(PAGE).read_text()
    rewritten = rewrite(page, "new figures")
    assert rewritten.split(BEGIN)[0] == page.split(BEGIN)[0]
    assert rewritten.split(END)[1] == page.split(END)[1]
    assert rewrite(rewritten, "new figures") == rewritten
    with pytest.raises(ValueError, match="once each"):
        rewrite("no markers", "new figures")


@pytest.mark.parametrize("op", gradients.PLAIN_FORMS)
def test_gradients_by_hand_are_ours_at_valid_cells(op: str) -> None:
    found = gradients.measure(op, gradients.SMALL, timing.LEAST)
    assert peers.PLAIN not in (*found.differing, *found.failed)
    assert {peers.OURS, peers.PLAIN} <= found.seconds.keys()


def test_the_report_of_gradients_has_a_line_for_each_op() -> None:
    small = [gradients.measure(op, gradients.SMALL, timing.LEAST) for op in gradients.PLAIN_FORMS]
    text = "\n".join(gradients.parts("tiny", small, small, 1.0))
    assert all(f"\n| {op} " in text for op in gradients.PLAIN_FORMS)


def test_submitting_is_timed_beside_the_synchronous_reply_with_many_jobs_that_have_ended(tmp_path: Path) -> None:
    with jobs.service(str(tmp_path), computing=False) as (port, store):
        first = jobs.by_turns(port, str(tmp_path / "bare"), 5)
        jobs.add_finished(store, 50)
        second = jobs.by_turns(port, str(tmp_path / "bare"), 5)
    for times in (first, second):
        assert [len(some) for some in times] == [5, 5, 5]
        assert len(jobs.line(50, times)) == len(jobs.HEAD)
