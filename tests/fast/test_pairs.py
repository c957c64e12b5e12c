"""Pairs as trees hold what TRL's collator holds: the tokens of every side, and what each is scored on."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from halfbyte.fast.forest import Forest
from halfbyte.fast.pairs import PairsAsTrees, common_prefix

PAD = 99
TOKENS = st.lists(st.integers(0, 2), max_size=6)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt_ids": TOKENS, "chosen_ids": TOKENS.filter(len), "rejected_ids": TOKENS.filter(len)}
    ),
    min_size=1,
    max_size=4,
)


def collators(**options: Any) -> tuple[DataCollatorForPreference, PairsAsTrees]:
    padded = DataCollatorForPreference(pad_token_id=PAD, **options)
    return padded, PairsAsTrees(padded)


def sides(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The tokens of each side, read back from the trees: chosen ones first."""
    forest = Forest.of_tensor(batch["forest"])
    row = batch["stream_ids"][0]
    parts = row.split([end - start for start, end in forest.spans])
    pairs = [
        [torch.cat([parts[i] for i in forest.path(branch)]).tolist() for branch in (at + 1, at + 2)]
        for at in range(0, len(forest.ends), 3)
    ]
    return [pair[which] for which in (0, 1) for pair in pairs]


@settings(max_examples=300, deadline=None)
@given(ROWS, st.sampled_from(["keep_start", "keep_end"]), st.sampled_from([None, 1, 2, 3, 5, 8]))
def test_trees_hold_what_trl_pads(rows: list[dict], mode: str, length: int | None) -> None:
    padded, trees = collators(max_length=length, truncation_mode=mode)
    theirs, ours = padded(rows), trees(rows)
    tokens = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(theirs["input_ids"], theirs["attention_mask"], strict=True)
    ]
    assert sides(ours) == tokens
    assert ours["attention_mask"].sum(1).tolist() == theirs["attention_mask"].sum(1).tolist()
    assert ours["completion_mask"].sum(1).tolist() == theirs["completion_mask"].sum(1).tolist()
    mask = ours["completion_mask"][:, 1:].bool()
    assert mask.sum(1).tolist() == theirs["completion_mask"][:, 1:].sum(1).tolist()
    # Each scored token of a side, with the one that predicts it: value and position.
    positions = ours["stream_positions"][0]
    assert torch.equal(ours["stream_positions"], Forest.of_tensor(ours["forest"]).positions())
    for row, side in enumerate(tokens):
        trained = theirs["completion_mask"][row, 1:].nonzero().flatten().tolist()
        places = ours["places"][row][mask[row]]
        at = ours["scored"][0][places]
        assert positions[at].tolist() == trained
        assert ours["stream_ids"][0][at].tolist() == [side[t] for t in trained]
        assert ours["scored_ids"][0][places].tolist() == [side[t + 1] for t in trained]
        assert ours["input_ids"][row, 1:][mask[row]].tolist() == [side[t + 1] for t in trained]


def test_the_prefix_is_there_once_and_its_last_token_has_a_label_a_branch() -> None:
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [4, 7]}
    _, trees = collators()
    batch = trees([row])
    assert batch["stream_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["stream_positions"].tolist() == [[0, 1, 2, 3, 4, 5, 4]]
    # The opening that both sides share is scored once, the branch point on two tokens.
    assert batch["scored"].tolist() == [[2, 3, 4, 3]]
    assert batch["scored_ids"].tolist() == [[4, 5, 6, 7]]
    assert batch["places"].tolist() == [[0, 1, 2], [0, 3, 0]]
    # No token is read before the first that predicts, nor a branch of one token, which predicts nothing.
    assert Forest.of_tensor(batch["forest"]).read_from == (2, 4, 7)


def test_reference_log_probabilities_travel_along() -> None:
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    _, trees = collators()
    batch = trees([{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}] * 2)
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -1.5]
    assert batch["ref_rejected_logps"].tolist() == [-2.5, -2.5]


@pytest.mark.parametrize("seed", range(3))
def test_common_prefix(seed: int) -> None:
    draw = random.Random(seed)
    shared = [draw.randrange(9) for _ in range(draw.randrange(20))]
    assert common_prefix([*shared, 1, 5], [*shared, 2]) == len(shared)
    assert common_prefix(shared, [*shared, 2]) == len(shared)
