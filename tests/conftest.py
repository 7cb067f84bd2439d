"""One torch thread a worker: the tests run on every core already, and the results do not depend on it.

The same few examples each time by default; EXAMPLES=200 takes that many new ones.
"""

from __future__ import annotations

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
EXAMPLES = os.environ.get("EXAMPLES")
settings.register_profile(
    "maskserve", deadline=None, max_examples=int(EXAMPLES or 6), derandomize=EXAMPLES is None, print_blob=True
)
settings.load_profile("maskserve")
