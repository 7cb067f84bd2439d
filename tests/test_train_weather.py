"""The example that trains on a table with holes: its loss has the gradient of the measured cells, and its report is whole."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import maskserve as ms
from examples import train_weather as weather

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
FIGURE = re.compile(r" +(\d+\.\d{3})")


@pytest.fixture(scope="module")
def short() -> weather.Report:
    return weather.report(steps=20, seeds=2)


def learning(dtype: torch.dtype) -> tuple[weather.Forecast, weather.Hours]:
    torch.manual_seed(11)
    hours = weather.split(dtype).train
    hours = hours[torch.randint(len(hours), (weather.BATCH,))]
    return weather.Forecast(hours.last.shape[1], hours.calendar.shape[1]).to(dtype), hours


def gradients(model: weather.Forecast, loss: Tensor | ms.MaskedTensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(type(gradient) is Tensor for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_the_masked_loss_has_the_gradient_of_the_measured_cells(dtype: torch.dtype, tolerance: float) -> None:
    model, hours = learning(dtype)
    valid = hours.following.get_mask()
    assert 0.05 < 1 - valid.double().mean().item() < 0.15
    ours = gradients(model, weather.loss_of(model(hours), hours.following))
    plain = gradients(model, ((model(hours)[valid] - hours.following.get_data()[valid]) ** 2).mean())
    assert len(ours) == len(plain) == 6
    for mine, expected in zip(ours, plain, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_what_lies_under_a_target_mask_changes_no_bit_of_a_gradient(junk: float) -> None:
    model, hours = learning(torch.float32)
    valid = hours.following.get_mask()
    spoilt = ms.as_masked_tensor(hours.following.get_data().masked_fill(~valid, junk), valid)
    clean = gradients(model, weather.loss_of(model(hours), hours.following))
    for mine, expected in zip(gradients(model, weather.loss_of(model(hours), spoilt)), clean, strict=True):
        assert torch.equal(mine.view(torch.int32), expected.view(torch.int32))


def test_the_loss_goes_down_and_the_same_seed_gives_the_same_bits() -> None:
    hours = weather.split().train
    models = [weather.trained(hours, steps, seed=5) for steps in (1, 40, 40)]
    with torch.no_grad():
        first, later, _ = (weather.loss_of(model(hours), hours.following).item() for model in models)
    assert later < first
    for mine, again in zip(models[1].parameters(), models[2].parameters(), strict=True):
        assert torch.equal(mine, again)


def test_training_with_masks_uses_every_measured_cell_and_dropping_rows_few(short: weather.Report) -> None:
    lines = {line.name: line for line in short.lines}
    masked, dropped = lines["masked loss"], lines["rows dropped"]
    assert masked.rows == lines["holes filled"].rows == len(short.data.train)
    assert masked.cells == int(short.data.train.following.get_mask().sum())
    assert dropped.cells == len(weather.UNITS) * (dropped.rows or 0)
    assert 0 < 5 * (dropped.rows or 0) < (masked.rows or 0)
    assert 0.08 < short.data.missing < 0.11


def test_every_error_is_a_finite_number_of_the_same_cells(short: weather.Report) -> None:
    for line in short.lines:
        for errors in (line.errors, line.errors_of_complete):
            assert errors.shape == (1 if line.rows is None else 2, len(weather.UNITS))
            assert errors.to_tensor().isfinite().all()
            assert (errors > 0).all()
    assert short.data.test.last.get_mask().all()  # the baseline answers wherever the networks are judged


def test_held_out_hours_come_after_what_is_learned_in_their_month() -> None:
    table = weather.weather()
    days = table["time_hour"].dt.tz_convert("America/New_York").dt.day
    data = weather.split()
    n = len(data.train) + len(data.test)
    assert n == 26_067
    assert len(data.test) / n == pytest.approx((days >= weather.FIRST_HELD_OUT_DAY).mean(), abs=0.001)


def test_the_table_has_a_line_for_each_quantity_and_a_figure_for_each_way(short: weather.Report) -> None:
    lines = weather.table_of(short).splitlines()
    assert len(lines) == 3 + len(weather.UNITS) + 2
    assert len({len(line) for line in lines}) == 1
    for line, name in zip(lines[3:13], weather.UNITS, strict=True):
        assert line.startswith(f"{name}, ")
        assert len(FIGURE.findall(line)) == len(short.lines)


def test_the_figure_has_a_dot_for_each_network_and_quantity(short: weather.Report) -> None:
    drawn = weather.figure_of(short)
    assert drawn.count('r="3.5"') == 2 * len(weather.WAYS) * len(weather.UNITS)
    assert "nan" not in drawn


@pytest.mark.slow
def test_the_page_says_what_the_script_prints() -> None:
    """Another CPU may round otherwise, and training makes that larger: three figures agree to 3 %."""
    block = re.search(r"```\n( +last measured.*?)```", PAGE, re.DOTALL)
    assert block
    made = weather.table_of(weather.report()).splitlines()
    said = block.group(1).splitlines()
    assert [FIGURE.sub("", line) for line in said] == [FIGURE.sub("", line) for line in made]
    for line, expected in zip(said, made, strict=True):
        figures, again = ([float(x) for x in FIGURE.findall(of)] for of in (line, expected))
        assert figures == pytest.approx(again, rel=0.03, abs=0.0011)
