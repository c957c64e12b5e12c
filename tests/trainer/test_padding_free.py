"""What the Trainer counts of pairs as trees: the tokens that the forward computes."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer

from halfbyte.fast.pairs import PairsAsTrees
from tests.trainer.preferences import PAIRS, cache, dpo

__all__ = ["cache", "dpo"]


def counted(trainer: Any) -> tuple[float, int]:
    """The `total_flos` of a run in tokens, and its `num_input_tokens_seen`."""
    trainer.train()
    state = trainer.state
    return state.total_flos / 6 / trainer.model.num_parameters(
        exclude_embeddings=True
    ), state.num_input_tokens_seen


@pytest.mark.parametrize("fast", ["auto", "none"])
@pytest.mark.parametrize("wanted", ["all", "non_padding"])
def test_pairs_count_as_they_are_computed(dpo: Callable[..., Trainer], wanted: str, fast: str) -> None:
    """All twelve pairs in one step: a forward of one row of tokens, or of padded sides."""
    trainer = dpo(
        fast=fast,
        include_num_input_tokens_seen=wanted,
        per_device_train_batch_size=12,
        precompute_ref_log_probs=False,
    )
    rows = [trainer.train_dataset[i] for i in range(len(PAIRS))]
    batch = trainer.data_collator(rows)
    on_trees = isinstance(trainer.data_collator, PairsAsTrees)
    assert on_trees == (fast == "auto")
    computed = batch["stream_ids" if on_trees else "input_ids"].numel()
    of_both_sides = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows
    )
    assert (computed < of_both_sides) == on_trees
    assert counted(trainer) == (computed, computed if wanted == "all" else of_both_sides)
