"""One torch thread a worker: the tests run on every core already, and the results do not depend on it."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile(
    "maskserve", deadline=None, max_examples=int(os.environ.get("EXAMPLES", "6")), print_blob=True
)
settings.load_profile("maskserve")
