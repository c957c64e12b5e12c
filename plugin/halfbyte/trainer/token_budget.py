"""`max_tokens_per_batch`: micro-batches of as many rows as a budget of tokens takes, each row weighed alike."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

from halfbyte.data.batching import Batching
from halfbyte.trainer.base import Mixin


class TokenBudgetSampler(BatchRebalanceSampler):
    """One rank's micro-batches, in another order in each epoch.

    A subclass of the one sampler that the Trainer takes as a batch sampler and does not share out among ranks again.
    All ranks must be given the same ``seed``; without one the order stays. Micro-batches that the ranks cannot share
    evenly are filled up from the start, as Accelerate does with rows.
    """

    def __init__(self, batching: Batching, *, seed: int | None, rank: int, ranks: int) -> None:
        self._batching, self._seed, self._rank, self._ranks = batching, seed, rank, ranks
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self._batching) // self._ranks)

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self._batching)
        if self._seed is None:
            order = torch.arange(count)
        else:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self._seed + self.epoch))
        for number in range(self._rank, len(self) * self._ranks, self._ranks):
            yield self._batching[int(order[number % count])]


class TokenBudget(Mixin):
    """Trains on the micro-batches of ``batching``, where it is set; `rows` in the log is the mean of a step's rows.

    A loss that the Trainer does not divide by the labels of all micro-batches and ranks is a mean over the rows of one:
    it is weighed by them, over accumulation and ranks.
    """

    batching: Batching | None = None
    _budget_sampler: TokenBudgetSampler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._row_weight: Any = 0.0  # what a row of the step weighs in the loss of its micro-batch
        # Rows of each step since the last row of the log, and of all; tensors, so that no step waits for the device.
        self._step_rows: list[Any] = []
        self._session_rows: Any = 0.0
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a step; count the rows of all ranks."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if self.batching is not None and batches:
            own = torch.tensor(float(sum(map(_rows, batches))), device=self.args.device)
            rows = self.accelerator.reduce(own, "sum")
            self._row_weight = len(batches) * self.args.world_size / rows
            self._step_rows.append(rows)
            self._session_rows += rows
        return batches, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the trainer's loss, in training weighed by the rows of the micro-batch."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.batching is None or not self.model.training or num_items_in_batch is not None:
            return found
        return found * (self._row_weight * _rows(inputs))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the rows of a step too, and the rows per second as they were."""
        if self.batching is not None and "loss" in logs:
            logs["rows"] = float(sum(self._step_rows)) / max(len(self._step_rows), 1)
            self._step_rows = []
        if self.batching is not None and "train_samples_per_second" in logs:
            logs["train_samples_per_second"] = round(float(self._session_rows) / logs["train_runtime"], 3)
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        if self.batching is None:
            return super()._get_train_sampler(train_dataset)
        self._budget_sampler = TokenBudgetSampler(
            self.batching,
            seed=order_seed(self.args),
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        return self._budget_sampler

    def _run_epoch(self, **given: Any) -> None:
        if self.batching is not None:
            # Upstream's set_epoch does not reach it through the loader of a resume (accelerate 1.15).
            self._budget_sampler.epoch = given["epoch"]
        super()._run_epoch(**given)


def order_seed(args: Any) -> int | None:
    """The seed of the order of rows, or None where they keep theirs."""
    if args.train_sampling_strategy == "sequential":
        return None
    return args.seed if args.data_seed is None else args.data_seed


def _rows(batch: Any) -> int:
    """The rows of a micro-batch: of pairs in one tensor, the chosen sides come before the rejected ones."""
    if "chosen_input_ids" in batch:
        return len(batch["chosen_input_ids"])
    ids, positions = batch["input_ids"], batch.get("position_ids")
    if "labels" not in batch:
        return len(ids) // 2
    return len(ids) if positions is None else int((positions == 0).sum())
