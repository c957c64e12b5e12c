"""The largest micro-batch that rows can make is the largest that the collators make."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from halfbyte.data.longest import most_tokens
from halfbyte.fast.pairs import PairsAsTrees

PAIRS = [
    {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
    for p, c, r in ((3, 4, 5), (10, 1, 2), (1, 9, 2), (6, 6, 6), (2, 2, 12))
]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("length", [None, 4, 9])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_pairs(size: int, length: int | None, mode: str) -> None:
    args = SimpleNamespace(max_length=length, truncation_mode=mode)
    padded = DataCollatorForPreference(pad_token_id=0, max_length=length, truncation_mode=mode)
    trees = PairsAsTrees(padded)
    batches = [list(rows) for rows in itertools.combinations(PAIRS, min(size, len(PAIRS)))]
    rows = Dataset.from_list(PAIRS)
    found = most_tokens(rows, size, args, padded=False, shared=True)
    largest = max(trees(batch)["stream_ids"].numel() for batch in batches)
    assert found == largest if mode == "keep_start" or length is None else found >= largest
    wide = max(padded(batch)["input_ids"].shape[1] for batch in batches)
    assert most_tokens(rows, size, args, padded=True, shared=False) == 2 * size * wide


def test_rows() -> None:
    rows = Dataset.from_list([{"input_ids": [1] * n} for n in (3, 8, 5, 20)])
    args: Any = SimpleNamespace(max_length=10)
    assert most_tokens(rows, 2, args, padded=False, shared=False) == 18
    assert most_tokens(rows, 2, args, padded=True, shared=False) == 20
    assert most_tokens(rows, 9, args, padded=False, shared=False) == 26


def test_rows_that_do_not_say() -> None:
    args: Any = SimpleNamespace(max_length=10)
    for rows in (Dataset.from_list([{"text": "a"}]), iter([]), None):
        assert most_tokens(rows, 2, args, padded=False, shared=False) is None
