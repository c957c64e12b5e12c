"""A sample has the longest rows, by the bytes of whatever columns there are, and others drawn at random."""

import numpy as np
import pytest
from datasets import Dataset

from halfbyte.data.sample import Sample, first_numbers, placed, row_bytes
from halfbyte.errors import UserError

ROWS = {
    "text": [{"text": "x" * n} for n in range(100)],
    "messages": [
        {"messages": [{"role": "user", "content": "x" * n}, {"role": "a", "content": ""}]} for n in range(100)
    ],
    "token ids": [{"input_ids": list(range(n))} for n in range(100)],
    "nulls": [{"text": None if n % 2 else "x" * n, "other": ["y"] * (n // 2)} for n in range(100)],
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_longest_are_there(kind: str) -> None:
    dataset = Dataset.from_list(ROWS[kind])
    sizes = row_bytes(dataset)
    assert len(sizes) == len(dataset)
    taken = dataset.select(Sample(rows=20, longest=5).places(dataset))
    assert len(taken) == 25
    longest = set(map(str, (dataset[int(place)] for place in sizes.argsort(kind="stable")[-5:])))
    assert longest <= set(map(str, taken))
    assert len(set(map(str, taken))) == 25


def test_bytes_follow_lengths() -> None:
    sizes = row_bytes(Dataset.from_list(ROWS["messages"]))
    assert (sizes[1:] - sizes[:-1] == 1).all()


def test_few_rows_are_all_taken_and_only_those_that_are_named() -> None:
    dataset = Dataset.from_list(ROWS["text"])
    assert Sample().places(dataset) is None
    assert len(Sample(rows=20, longest=0).places(dataset)) == 20
    assert Sample(rows=0, longest=2).places(dataset).tolist() == [98, 99]
    assert Sample(only=[7, 2]).places(dataset).tolist() == [7, 2]
    with pytest.raises(UserError, match="no row 201: the split has 100"):
        Sample(only=[200]).places(dataset)


def test_rows_of_a_sample_have_their_numbers_in_the_split() -> None:
    places = np.array([3, 7, 8, 20, 30, 99])
    assert first_numbers(places, [1, 2]) == "4, 8"
    assert first_numbers(None, [1, 2]) == "1, 2"
    assert first_numbers(places, [1, 2, 3, 4, 5, 6]) == "4, 8, 9, 21, 31, ..."
    with pytest.raises(UserError) as caught, placed(places):
        raise UserError("wrong", split="train", row=6)
    assert caught.value.row == 100
