"""One torch thread a worker: the tests run on every core already, and the results do not depend on it.

The same few examples each time by default; EXAMPLES=200 takes that many new ones.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
EXAMPLES = os.environ.get("EXAMPLES")
settings.register_profile(
    "maskserve", deadline=None, max_examples=int(EXAMPLES or 6), derandomize=EXAMPLES is None, print_blob=True
)
settings.load_profile("maskserve")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test is begun first: at the end one worker would wait for the other's."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)
