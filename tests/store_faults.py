"""A store that fails at random for as long as one likes: `python -m tests.store_faults 600` runs for ten minutes.

Each round reads an object by random runs, or writes one, or runs a job, under faults of every kind: what comes is right, or one
of the errors that are documented; nothing else is ever in the store.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from maskserve.dtypes import BY_TORCH
from maskserve.errors import InputChangedError, InputError, OutputError, StoreError
from maskserve.opening import open_any
from maskserve.payload.format import to_bytes
from maskserve.payload.writing import Encoded, Output
from maskserve.stores import calls, client, writing
from tests.batch_job import JOB, batch, payload
from tests.store_server import Fault, Stored, store

FLEETING = ("truncated", "short", "whole", "elsewhere", "500", "503", "reset", "dripping")
READS = (*FLEETING, "retagged", "deaf", "untagged", "403", "404")
WRITES = ("500", "503", "403", "reset", "lost")
N_JOB = 20
DOCUMENTED = (StoreError, InputError, InputChangedError, OutputError)


def main(seconds: float) -> None:
    seed = int(os.environ.get("SEED") or time.time())
    print(f"SEED={seed}")
    chance = random.Random(seed)
    counts = dict.fromkeys(("read", "refused", "written", "not written", "job", "job again"), 0)
    calls.FIRST_WAIT_S = 0.005  # type: ignore[misc]  # rounds, not waits, are wanted
    end_s = time.monotonic() + seconds
    with store() as stored:
        os.environ.update(stored.environment)
        client._client.cache_clear()
        while time.monotonic() < end_s:
            stored.clear()
            kind = chance.choice(("read",) * 10 + ("write",) * 6 + ("job",))
            counts[{"read": read, "write": write, "job": job}[kind](stored, chance)] += 1
    print(counts)


def faults(chance: random.Random, kinds: tuple[str, ...], method: str) -> list[Fault]:
    return [
        Fault(chance.choice(kinds), method, times=chance.choice((1, 2, 7)), after=chance.randrange(6))
        for _ in range(chance.randrange(4))
    ]


def read(stored: Stored, chance: random.Random) -> str:
    cells = np.random.default_rng(chance.randrange(1 << 30)).random(chance.choice((10, 100_000, 900_000)))
    data = to_bytes([Output("x", BY_TORCH["float64"], cells.shape, cells.tobytes())], {})
    address = stored.put("x.safetensors", data)
    stored.proxy.faults = faults(chance, READS, "GET")
    try:
        with open_any(address) as far:
            for _ in range(chance.randrange(1, 12)):
                n = chance.randrange(1, max(cells.nbytes // 20, 2))
                starts = sorted(
                    chance.sample(range(cells.nbytes - n), min(chance.choice((1, 1, 7, 40)), cells.nbytes - n))
                )
                starts = [start for i, start in enumerate(starts) if i == 0 or start >= starts[i - 1] + n] or [0]
                view = memoryview(bytearray(n * len(starts)))
                far.read_runs("x", starts, view)
                whole = cells.tobytes()
                assert view == b"".join(whole[start : start + n] for start in starts), "other bytes came"
    except DOCUMENTED:
        return "refused"
    return "read"


def write(stored: Stored, chance: random.Random) -> str:
    data, exists = os.urandom(chance.choice((10, 3 << 20, 18 << 20))), chance.choice(("error", "skip", "replace"))
    before = os.urandom(20) if chance.random() < 0.3 else None
    if before is not None:
        stored.put("out", before)
    stored.proxy.faults = faults(chance, WRITES, "PUT")
    try:
        is_written = writing.save("s3://bucket/out", Encoded(len(data), iter([memoryview(data)])), exists=exists)  # type: ignore[arg-type]  # one of the words
        assert stored.get("out") == (data if is_written else before)
    except DOCUMENTED:
        stands = stored.get("out") if stored.keys() else None
        assert stands in (before, data), "half an object stands"
        assert exists == "replace" or before is None or stands == before, "an object was replaced"
        assert stored.n_uploads() == 0, "parts of an upload stay"
        return "not written"
    return "written"


def job(stored: Stored, chance: random.Random) -> str:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(N_JOB):
            stored.put(f"in/f{number:05d}.safetensors", payload(number))
        text = JOB.replace('"in/*"', '"s3://bucket/in/"').replace('to = "out"', 'to = "s3://bucket/out"')
        (Path(folder) / "job.toml").write_text(text)
        stored.proxy.faults = faults(chance, FLEETING, "GET") + faults(chance, WRITES, "PUT")
        first = batch(Path(folder))
        assert first.code in (0, 65, 69, 73, 75, 77), first.err
        stored.proxy.faults = []
        assert first.code == 0 or batch(Path(folder)).code == 0
        names = [key for key in stored.keys("out") if key.endswith(".safetensors")]
        assert len(names) == N_JOB, names
        return "job" if first.code == 0 else "job again"


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
