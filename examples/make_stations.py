"""Makes files to try batch jobs on: a year of daily rain at each of many made-up stations, with gaps.

    python -m examples.make_stations stations --count 20000

A file holds `rain` (month 12, day 31) with its mask: days that no month has are missing, and so are the days on which a
station was silent. The same call gives the same files.
"""

from __future__ import annotations

import argparse
import json
from calendar import monthrange
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

YEAR = 2025
DIMS = json.dumps({"rain": ["month", "day"]})


def station(number: int) -> dict[str, np.ndarray]:
    """A station's rain in millimetres and which days it measured."""
    rng = np.random.default_rng(number)
    days = np.array([monthrange(YEAR, month)[1] for month in range(1, 13)])
    measured = (np.arange(31) < days[:, None]) & (rng.random((12, 31)) > 0.05)
    measured[rng.integers(12)] &= rng.random() > 0.1  # one station in ten has a month without any day
    rain = rng.gamma(0.4, 8.0, (12, 31)).round(1).astype("f4")
    return {"rain": np.where(measured, rain, 0).astype("f4"), "rain.mask": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for number in range(given.count):
        save_file(station(number), given.folder / f"station-{number:05d}.safetensors", {"maskserve.dims": DIMS})
    print(f"{given.count} stations in {given.folder}")


if __name__ == "__main__":
    main()
