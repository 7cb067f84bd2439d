"""Shards: every item in exactly one, and a scheduler's variable that says which is ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskserve.errors import ParameterError, SettingsError
from maskserve.shards import Shard, parse_shard


@given(n_items=st.integers(0, 100), n=st.integers(1, 20))
def test_every_item_is_in_one_shard(n_items: int, n: int) -> None:
    taken = [item for index in range(n) for item in Shard(index, n).of(range(n_items))]
    assert sorted(taken) == list(range(n_items))


@pytest.mark.parametrize(
    ("variables", "index"),
    [
        ({"JOB_COMPLETION_INDEX": "3"}, 3),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "0"}, 0),
        ({"SLURM_ARRAY_TASK_ID": "2"}, 2),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "1"}, 3),
    ],
)
def test_auto_reads_the_schedulers_variable(variables: dict[str, str], index: int) -> None:
    assert parse_shard("auto/4", variables) == Shard(index, 4)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("4/4", "shards of 4 are 0/4 to 3/4"),
        ("0/0", "1 or more"),
        ("-1/4", "give i/N"),
        ("1", "give i/N"),
        ("1/2/3", "give i/N"),
        ("", "give i/N"),
        ("\u0661/4", "give i/N"),
    ],
)
def test_a_slip_is_explained(word: str, says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        parse_shard(word)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "none of JOB_COMPLETION_INDEX, SLURM_ARRAY_TASK_ID, AWS_BATCH_JOB_ARRAY_INDEX is set"),
        ({"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX is 4, and shards are 0 to 3; start 4 tasks"),
        ({"JOB_COMPLETION_INDEX": ""}, "must be a whole number"),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "1"}, "shards are 0 to 3"),
    ],
)
def test_a_scheduler_that_counts_otherwise_is_explained(variables: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        parse_shard("auto/4", variables)
