"""Pairs for TRL's ORPO and CPO trainers, which tokenize rows in their constructors: prepared as DPO's instead.

Their own way (``tokenize_row`` of ``trl/experimental/orpo/orpo_trainer.py`` and ``cpo``, 1.16) puts a second end token
behind a chat template's, a beginning token before a template that has none, and leaves rows without an answer, whose
loss is nan, where the prompt fills ``max_length``; one of null means 512 there. In batches and by several processes
DPO's is faster, and its cache is shared.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import DPOTrainer

from halfbyte.data.preparation.counting import IGNORED
from halfbyte.errors import UserError

_COLUMNS = ("prompt", "chosen", "rejected")
_SPLITS = {"train": "train_dataset", "eval": "eval_dataset"}


def tokenizes_pairs(trainer_cls: type) -> bool:
    """Whether a trainer class tokenizes preference pairs in its constructor, as ORPO's and CPO's do."""
    return hasattr(trainer_cls, "build_tokenized_answer") and hasattr(trainer_cls, "get_batch_loss_metrics")


def prepared_as_dpo(trainer_cls: type) -> type:
    """A subclass of such a trainer with :class:`PreparedAsDPO` over it; any other class is returned."""
    if not tokenizes_pairs(trainer_cls) or issubclass(trainer_cls, PreparedAsDPO):
        return trainer_cls
    body = {"__doc__": trainer_cls.__doc__, "__module__": trainer_cls.__module__}
    return type(trainer_cls.__name__, (PreparedAsDPO, trainer_cls), body)


def _unchanged(row: dict[str, Any]) -> dict[str, Any]:
    return row


class PreparedAsDPO:
    """Over such a trainer: hands its constructor no rows, and gives it those that DPO's preparation makes."""

    _prepare_dataset = DPOTrainer._prepare_dataset  # reads `_tokenizer` alone
    # The constructor maps it over the rows; a bound method would have all of the trainer hashed.
    tokenize_row = staticmethod(_unchanged)
    _tokenizer: Any
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options, tokenizer = kwargs["args"], kwargs["processing_class"]
        if isinstance(kwargs.get("eval_dataset"), Mapping):
            raise UserError("TRL logs several under one name; give one data set", option="eval_dataset")
        self._tokenizer = tokenizer
        preparing = copy.copy(options)
        preparing.truncation_mode = "keep_start"
        ready = {
            key: self._prepare_dataset(kwargs[key], tokenizer, preparing, name)
            for name, key in _SPLITS.items()
            if kwargs.get(key) is not None
        }
        kwargs.update(dict.fromkeys(ready, Dataset.from_dict({column: [] for column in _COLUMNS})))
        options.remove_unused_columns = False  # as the constructor does, with a warning
        limit, options.max_length = options.max_length, options.max_length or sys.maxsize
        try:
            super().__init__(*args, **kwargs)
        finally:
            options.max_length = limit
        for key, dataset in ready.items():
            setattr(self, key, dataset)
        self.data_collator = Sides(self.data_collator, limit)


@dataclass(frozen=True)
class Sides:
    """Collate rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, cut to ``max_length`` tokens at the end.

    ``collate`` is TRL's collator, which pads; the prompt has no label.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    max_length: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` of both sides, int64 [B, T]."""
        return self.collate([self._row(feature) for feature in features])

    def _row(self, feature: Mapping[str, Any]) -> dict[str, Any]:
        prompt, row = list(feature["prompt_ids"]), {}
        for side in ("chosen", "rejected"):
            answer = list(feature[f"{side}_ids"])
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
            row[f"{side}_input_ids"] = ids[: self.max_length]
            row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
            row[f"{side}_labels"] = labels[: self.max_length]
        return row
