"""Micro-batches by a budget of tokens: every row once, within both limits, equally many for each rank."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.batching import Batching
from halfbyte.trainer.token_budget import TokenBudgetSampler

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def cost(sizes: np.ndarray, batch: list[int], *, padded: bool) -> int:
    held = sizes[batch]
    return int(len(held) * held.max() if padded else held.sum())


@given(
    SIZES,
    st.integers(1, 8),
    st.integers(1, 60),
    st.booleans(),
    st.integers(1, 4),
    st.none() | st.integers(0, 9),
)
def test_every_row_once_within_both_limits(
    lengths: list[int], rows: int, tokens: int, padded: bool, ranks: int, seed: int | None
) -> None:
    sizes = np.array(lengths)
    found = Batching.fill(sizes, rows=rows, tokens=tokens, padded=padded, ranks=ranks, seed=seed)
    batches = list(found)
    assert sorted(row for batch in batches for row in batch) == list(range(len(sizes)))
    for batch in batches:
        assert 1 <= len(batch) <= rows
        assert len(batch) == 1 or cost(sizes, batch, padded=padded) <= tokens
    assert len(batches) % ranks == 0 or all(len(batch) == 1 for batch in batches)
    if ranks == 1:  # no batch has room for the row after it
        for one, other in itertools.pairwise(batches):
            assert len(one) == rows or cost(sizes, [*one, other[0]], padded=padded) > tokens
    if seed is None:
        assert [row for batch in batches for row in batch] == list(range(len(sizes)))
    assert found.longer == sum(size > tokens for size in lengths)


def test_limits() -> None:
    sizes = np.array([4, 4, 4, 20, 1, 1, 1, 1])
    assert list(Batching.fill(sizes, rows=3, tokens=10, padded=False)) == [[0, 1], [2], [3], [4, 5, 6], [7]]
    assert list(Batching.fill(sizes, rows=9, tokens=12, padded=True)) == [[0, 1, 2], [3], [4, 5, 6, 7]]
    two = Batching.fill(sizes, rows=9, tokens=12, padded=True, ranks=2)
    assert list(two) == [[0, 1, 2], [3], [4, 5], [6, 7]]


def epochs(batching: Batching, ranks: int, seed: int | None) -> list[list[list[list[int]]]]:
    """By epoch and rank, the micro-batches."""
    found = []
    for epoch in range(3):
        samplers = [TokenBudgetSampler(batching, seed=seed, rank=rank, ranks=ranks) for rank in range(ranks)]
        for sampler in samplers:
            sampler.epoch = epoch
        found.append([list(sampler) for sampler in samplers])
        assert {len(sampler) for sampler in samplers} == {len(batches) for batches in found[-1]}
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_an_epoch(ranks: int) -> None:
    sizes = np.arange(1, 50)
    batching = Batching.fill(sizes, rows=6, tokens=64, padded=False, ranks=ranks, seed=3)
    orders = []
    for by_rank in epochs(batching, ranks, 3):
        rows = [row for batches in by_rank for batch in batches for row in batch]
        assert sorted(rows) == list(range(len(sizes)))
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]  # the order is another in each epoch
    assert {
        tuple(batch) for by_rank in epochs(batching, ranks, 3) for batches in by_rank for batch in batches
    } == {tuple(batch) for batch in batching}
    assert epochs(batching, ranks, 3) == epochs(batching, ranks, 3)


def test_without_a_seed_the_order_stays() -> None:
    batching = Batching.fill(np.ones(9, dtype=int), rows=2, tokens=99, padded=False)
    assert epochs(batching, 1, None) == [[[[0, 1], [2, 3], [4, 5], [6, 7], [8]]]] * 3


def test_rows_that_ranks_cannot_share_are_repeated() -> None:
    batching = Batching.fill(np.full(3, 9), rows=4, tokens=4, padded=False, ranks=2)
    assert epochs(batching, 2, None)[0] == [[[0], [2]], [[1], [0]]]
