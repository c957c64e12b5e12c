"""Padding-free training batches, made by TRL's own collator, and what the Trainer counts of pairs as trees."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from halfbyte.fast.pairs import PairsAsTrees
from halfbyte.trainer.base import Mixin


class PaddingFree(Mixin):
    """Trains on padding-free batches where ``unpads_batches`` is set: the model's attention must keep sequences apart.

    :func:`halfbyte.fast.fuse` decides it (``FusionReport.padding_free``), for SFT trainers with TRL's text collator.
    Evaluation keeps padded batches: the Trainer weights each batch by its rows, and a padding-free one has one row.
    (``padding_free`` itself is an attribute of TRL's SFTTrainer, which says what the options request.)

    Of pairs as trees, `total_flos` and `include_num_input_tokens_seen: all` count the tokens that the forward computes:
    a prefix once. `non_padding` counts those of both sides, as TRL does.
    """

    unpads_batches: bool = False
    data_collator: Any

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Return the Trainer's own loader over padded batches: predictions are logits of whole sequences."""
        own = self.data_collator
        with self._collating(own.padded if isinstance(own, PairsAsTrees) else own):
            return super().get_test_dataloader(test_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the Trainer's own loader, over a collator that packs the rows of a batch into one without padding."""
        padded = self.data_collator
        if not self.unpads_batches or padded.padding_free:
            return super().get_train_dataloader()
        packed = DataCollatorForLanguageModeling(pad_token_id=padded.pad_token_id, padding_free=True)
        with self._collating(packed):
            return super().get_train_dataloader()

    @contextmanager
    def _collating(self, collator: Any) -> Iterator[None]:
        kept, self.data_collator = self.data_collator, collator
        try:
            yield
        finally:
            self.data_collator = kept

    def floating_point_ops(self, inputs: Any) -> int:
        """Return the Trainer's own estimate, of the tokens that the forward computes."""
        return super().floating_point_ops(_computed(inputs))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        super()._track_num_input_tokens(_computed(inputs))


def _computed(inputs: Any) -> Any:
    """``inputs`` with the tokens of the forward as ``input_ids``: those of pairs as trees hold the answers alone."""
    return {**inputs, "input_ids": inputs["stream_ids"]} if "stream_ids" in inputs else inputs
