"""Makes co2.safetensors from the weekly Mauna Loa CO2 record that statsmodels carries.

    pip install statsmodels && python -m examples.make_co2

A week is the n-th Saturday of its year, so that a row is a calendar year. Only `record` needs statsmodels.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import torch

from maskserve.payload.format import to_bytes
from maskserve.payload.tensors import output

HERE = Path(__file__).parent
WEEKS = 53
PLACE = {
    "title": "Weekly atmospheric CO2 at Mauna Loa, Hawaii, in ppmv",
    "source": "Keeling and Whorf 2004, Carbon Dioxide Information Analysis Center; public domain; via statsmodels",
}
DIMS = {"co2": ["year", "week"], "year": ["year"], "week": ["week"]}

Tensors = dict[str, torch.Tensor]


def record() -> list[tuple[date, float]]:
    """The Saturday and the CO2 in ppmv of each week, NaN where none was measured; needs statsmodels."""
    from statsmodels.datasets import co2

    weeks = co2.load_pandas().data["co2"]
    return [(day.date(), float(value)) for day, value in weeks.items()]


def tensors(weeks: list[tuple[date, float]]) -> Tensors:
    """co2 of shape (years, 53) with its mask, and the coordinates year and week."""
    first, last = weeks[0][0].year, weeks[-1][0].year
    co2 = torch.zeros(last - first + 1, WEEKS, dtype=torch.float64)
    mask = torch.zeros(co2.shape, dtype=torch.bool)
    for day, value in weeks:
        if value == value:
            at = day.year - first, (day.timetuple().tm_yday - 1) // 7
            co2[at], mask[at] = value, True
    return {"co2": co2, "co2.mask": mask, "year": torch.arange(first, last + 1), "week": torch.arange(1, WEEKS + 1)}


def payload(of: Tensors) -> bytes:
    """The tensors as safetensors, with the names of their dims and where they come from."""
    return to_bytes(
        [output(name, tensor) for name, tensor in of.items()], {**PLACE, "maskserve.dims": json.dumps(DIMS)}
    )


if __name__ == "__main__":
    (HERE / "co2.safetensors").write_bytes(payload(tensors(record())))
