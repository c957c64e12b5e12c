"""What rows count is what the collators make of them, and the largest micro-batch the largest that they make."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from halfbyte.data.lengths import Lengths, common_prefixes, most_tokens
from halfbyte.fast.forest import Forest
from halfbyte.fast.pairs import PairsAsTrees, common_prefix

PAIRS = [
    {"prompt_ids": [1] * p, "chosen_ids": [4] * same + [2] * c, "rejected_ids": [4] * same + [3] * r}
    for p, same, c, r in ((3, 0, 4, 5), (10, 1, 1, 2), (1, 3, 9, 2), (6, 0, 6, 6), (2, 0, 2, 12))
]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("length", [None, 4, 9])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_pairs(size: int, length: int | None, mode: str) -> None:
    args = SimpleNamespace(max_length=length, truncation_mode=mode)
    padded = DataCollatorForPreference(pad_token_id=0, max_length=length, truncation_mode=mode)
    trees = PairsAsTrees(padded)
    batches = [list(rows) for rows in itertools.combinations(PAIRS, min(size, len(PAIRS)))]
    lengths = Lengths.of(Dataset.from_list(PAIRS), args)
    sizes = lengths.sizes(padded=False, shared=True)
    exact = [trees([row])["stream_ids"].numel() for row in PAIRS]
    if mode == "keep_start" or length is None:
        assert sizes.tolist() == exact
    else:  # sides that are cut at their start are counted apart
        assert (sizes >= exact).all()
    found = most_tokens(sizes, size, padded=False)
    largest = max(trees(batch)["stream_ids"].numel() for batch in batches)
    assert found == largest if mode == "keep_start" or length is None else found >= largest
    wide = max(padded(batch)["input_ids"].numel() for batch in batches)
    given_rows = min(size, len(PAIRS))
    assert most_tokens(lengths.sizes(padded=True), given_rows, padded=True) == wide


@pytest.mark.parametrize("length", [None, 12])
def test_what_is_read_of_pairs(length: int | None) -> None:
    rows = [
        PAIRS[i] for i in (0, 2, 3)
    ]  # of a branch of one token, which predicts nothing, that token is counted
    lengths = Lengths.of(Dataset.from_list(rows), SimpleNamespace(max_length=length))
    trees = PairsAsTrees(DataCollatorForPreference(pad_token_id=0, max_length=length))
    read = [Forest.of_tensor(trees([row])["forest"]).queries[-1][1] for row in rows]
    assert (lengths.sizes(padded=False, shared=True) - lengths.unread).tolist() == read


def test_rows() -> None:
    rows = Dataset.from_list([{"input_ids": [1] * n} for n in (3, 8, 5, 20)])
    lengths = Lengths.of(rows, SimpleNamespace(max_length=10))
    assert lengths.sizes(padded=False).tolist() == [3, 8, 5, 10]
    assert most_tokens(lengths.sizes(padded=False), 2, padded=False) == 18
    assert most_tokens(lengths.sizes(padded=True), 2, padded=True) == 20
    assert most_tokens(lengths.sizes(padded=False), 9, padded=False) == 26
    selected = Lengths.of(rows.select([2, 0]), SimpleNamespace(max_length=10))
    assert selected.sizes(padded=False).tolist() == [5, 3]
    wider = Lengths.of(rows, SimpleNamespace(max_length=10, pad_to_multiple_of=8))
    assert wider.sizes(padded=True).tolist() == [8, 8, 8, 16]


def test_a_budget_closes_the_largest() -> None:
    sizes = np.array([3, 8, 5, 10])
    assert most_tokens(sizes, 3, padded=False, budget=12) == 12
    assert most_tokens(sizes, 3, padded=False, budget=9) == 10  # a longer row is alone
    assert most_tokens(sizes, 3, padded=False, budget=99) == 23


def test_scored_pairs() -> None:
    rows = Dataset.from_list([{"chosen_ids": [1] * 3, "rejected_ids": [1] * 5}])
    assert Lengths.of(rows, SimpleNamespace(max_length=10)).sizes(padded=True).tolist() == [10]


def test_completions() -> None:
    rows = Dataset.from_list(
        [{"prompt_ids": [1] * 3, "completion_ids": [2] * n, "KL_completion_ids": [3] * 9} for n in (4, 20)]
    )
    lengths = Lengths.of(rows, SimpleNamespace(max_length=10))
    assert lengths.sizes(padded=False).tolist() == [7, 10]
    assert most_tokens(lengths.sizes(padded=True), 2, padded=True) == 20


def test_rows_that_do_not_say() -> None:
    args: Any = SimpleNamespace(max_length=10)
    packed = Dataset.from_list([{"input_ids": [1, 2], "seq_lengths": [1, 1]}])
    for rows in (Dataset.from_list([{"text": "a"}]), packed, iter([]), None):
        assert Lengths.of(rows, args) is None


IDS = st.lists(st.integers(0, 2), max_size=6)


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=8))
def test_common_prefixes(rows: list[tuple[list[int], list[int]]]) -> None:
    one, other = (pa.array([row[side] for row in rows], type=pa.list_(pa.int64())) for side in (0, 1))
    assert common_prefixes(one, other).tolist() == [common_prefix(*row) for row in rows]
