"""Preference pairs as trees: what both sides have in common once, and the tokens that each side is scored on.

The sides of a pair share a prefix, the prompt and often the opening of the answers, which TRL's batches hold twice. A
causal model computes the same for it in both, so that it is computed once, in one row of tokens without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from halfbyte.fast.forest import ROOT, Forest


@dataclass(frozen=True)
class Side:
    """One side of a pair after truncation: its tokens, and the first that belongs to the answer."""

    ids: list[int]
    answer: int


class PairsAsTrees:
    """Collates what TRL's ``padded`` collator does: the same tokens, truncated alike, without padding.

    What TRL's loss reads keeps its name and its rows, chosen sides before rejected ones, but holds answers only:
    ``input_ids`` and ``completion_mask`` are ``[2B, 1 + L]``, their first column what no token comes before, L the
    longest answer. ``attention_mask`` ``[2B, longest side]`` counts the tokens. The forest is beside them:
    ``stream_ids`` and ``stream_positions`` ``[1, T]``; ``forest``, see :meth:`Forest.tensor`; ``scored`` ``[1, K]``,
    the tokens of the stream that predict, and ``scored_ids`` ``[1, K]``, what they are scored on (behind the last layer
    no token before the first of these in its segment is read); ``places``
    ``[2B, L]``, the number of each answer's token among them.
    """

    def __init__(self, padded: DataCollatorForPreference) -> None:
        self.padded = padded

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [self.sides(example) for example in examples]
        stream = _Stream()
        places = [stream.add(*pair) for pair in pairs]
        sides = [pair[which] for which in (0, 1) for pair in pairs]
        batch = {
            **_answers(sides, self.padded.pad_token_id),
            **stream.tensors(),
            "places": _rectangle([place[which] for which in (0, 1) for place in places], 0),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch

    def sides(self, example: dict[str, Any]) -> tuple[Side, Side]:
        """The chosen and the rejected side of a tokenized row."""
        return self._side(example, "chosen_ids"), self._side(example, "rejected_ids")

    def _side(self, example: dict[str, Any], name: str) -> Side:
        ids, answer = example["prompt_ids"] + example[name], len(example["prompt_ids"])
        length = self.padded.max_length
        if length is None or len(ids) <= length:
            return Side(ids, answer)
        if self.padded.truncation_mode == "keep_start":
            return Side(ids[:length], min(answer, length))
        if self.padded.truncation_mode != "keep_end":
            raise ValueError(f"truncation_mode {self.padded.truncation_mode!r}: keep_start or keep_end")
        return Side(ids[-length:], max(answer - (len(ids) - length), 0))


def common_prefix(one: list[int], other: list[int]) -> int:
    """Return how many tokens two sequences begin with in common."""
    length = min(len(one), len(other))
    differ = np.asarray(one[:length]) != np.asarray(other[:length])
    return int(differ.argmax()) if differ.any() else length


class _Stream:
    """The row of tokens while it is filled, and what is scored of it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.scored: list[int] = []
        self.scored_ids: list[int] = []

    def add(self, chosen: Side, rejected: Side) -> tuple[list[int], list[int]]:
        """Append a pair as a tree; return the numbers of each side's answer among the scored tokens."""
        shared = common_prefix(chosen.ids, rejected.ids)
        root = self._segment(chosen.ids[:shared], ROOT)
        parent = len(self.lengths) - 1
        first = max(min(chosen.answer, rejected.answer), 1)
        common = self._score(range(root + first - 1, root + shared - 1), chosen.ids[first:shared])
        places = []
        for side in (chosen, rejected):
            branch = self._segment(side.ids[shared:], parent)
            begin = max(side.answer, shared, 1)
            # The first token of a branch is predicted by the last one of the prefix, which so has a label a branch.
            predictors = list(range(branch + begin - shared - 1, branch + len(side.ids) - shared - 1))
            if predictors and begin == shared:
                predictors[0] = root + shared - 1
            own = self._score(predictors, side.ids[begin:])
            places.append([*common[max(side.answer, 1) - first :], *own])
        return places[0], places[1]

    def _segment(self, ids: list[int], parent: int) -> int:
        start = len(self.ids)
        self.ids.extend(ids)
        self.lengths.append(len(ids))
        self.parents.append(parent)
        return start

    def _score(self, predictors: Sequence[int], targets: list[int]) -> range:
        start = len(self.scored)
        self.scored.extend(predictors)
        self.scored_ids.extend(targets)
        assert len(self.scored) == len(self.scored_ids)
        return range(start, len(self.scored))

    def tensors(self) -> dict[str, Tensor]:
        forest = Forest.of_lengths(self.lengths, self.parents)
        if self.scored:
            read_from = np.asarray(forest.ends)
            np.minimum.at(read_from, np.searchsorted(forest.ends, self.scored, side="right"), self.scored)
            forest = replace(forest, read_from=tuple(read_from.tolist()))
        return {
            "stream_ids": torch.tensor([self.ids]),
            "stream_positions": forest.positions(),
            "forest": forest.tensor(),
            "scored": torch.tensor([self.scored], dtype=torch.long),
            "scored_ids": torch.tensor([self.scored_ids], dtype=torch.long),
        }


def _answers(sides: list[Side], pad_token_id: int) -> dict[str, Tensor]:
    """The answers alone, each after a column for what no token comes before."""
    rows = [side.ids[max(side.answer, 1) :] for side in sides]
    # An answer that begins the sequence has a first token that nothing predicts; TRL's mask counts it all the same.
    begins = torch.tensor([[int(side.answer == 0 and len(side.ids) > 0)] for side in sides])
    ids, mask = _rectangle(rows, pad_token_id), _rectangle([[1] * len(row) for row in rows], 0)
    return {
        "input_ids": torch.cat([torch.full((len(sides), 1), pad_token_id), ids], dim=1),
        "attention_mask": _rectangle([[1] * len(side.ids) for side in sides], 0),
        "completion_mask": torch.cat([begins, mask], dim=1),
    }


def _rectangle(rows: list[list[int]], fill: int) -> Tensor:
    """Lists of different lengths as one int64 tensor, filled up at their ends."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.long)
