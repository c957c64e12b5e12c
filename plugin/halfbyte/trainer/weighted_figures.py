"""Figures of the log over all that they are taken from: rows or tokens of every batch and rank, each counted once.

TRL averages over batches as if all were of one size, and where the last batch is filled up with rows of the first, it
counts those again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

from halfbyte.trainer.base import Mixin
from halfbyte.trainer.means import means
from halfbyte.trainer.upstream import on_this_rank

_LAST = ("num_tokens",)  # not averaged: the last value stands


@dataclass(frozen=True)
class Weights:
    """What the figures of one batch weigh: its ``rows``, but for those that are means over something else."""

    rows: float
    others: Mapping[str, float] = field(default_factory=dict)

    def of(self, key: str) -> float:
        return self.others.get(key, self.rows)


@dataclass(frozen=True)
class Measure:
    """How the batches of one class of trainers are weighed: ``weigh`` takes a batch.

    A batch has ``sides`` sequences a row, the first sides of all rows before the others. With ``labelled`` rows, as
    KTO's, a margin is the difference of two means, and what the loss gathers first is a part of itself: its KL term.
    """

    weigh: Callable[[Any], Weights]
    sides: int = 1
    labelled: bool = False


class WeightedFigures(Mixin):
    """Weighs what SFT, DPO, KTO and reward trainers log by what each figure is a mean of; keys stay TRL's.

    TRL computes each rank's own figures; ranks are brought together once a row of the log. `eval_loss` is a mean over
    labels (SFT) or over rows. KTO's figures of one side are means over its rows or its tokens, and its margin is the
    difference of the mean rewards. Of scores, the least and the largest are those of all rows.
    """

    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: float
    # Of EvaluationLosses, below.
    _evaluation_losses: list[tuple[float, float]]
    _outputs_are_used: bool
    _weighs_losses: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._figure_weights: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        super().__init__(*args, **kwargs)
        self._measure = _measure(self.recipe_class)
        self._weighs_losses |= self._measure is not None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the trainer's loss; note what the batch's figures weigh."""
        measure = self._measure
        if measure is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode, empty = self._mode(), False
        if mode == "eval" and not (return_outputs and self._outputs_are_used):
            inputs, empty = without(inputs, self._repeated_rows(inputs, measure.sides))
        weights = Weights(0) if empty else measure.weigh(inputs)
        counted = self._total_train_tokens
        but_the_first = measure.labelled and getattr(self, "calculate_KL", False)  # which `loss_type` decides
        with on_this_rank(self.accelerator, but_the_first=but_the_first):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._count_tokens_of_all_ranks(mode, counted)
        for key, values in self._metrics[mode].items():
            if key not in _LAST:
                known = self._figure_weights[mode].setdefault(key, [])
                known.extend([weights.of(key)] * (len(values) - len(known)))
        if mode == "eval":
            loss = found[0] if return_outputs else found
            self._evaluation_losses.append((loss.item(), weights.of("loss")))
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log ``logs`` with the weighted figures since the last row; a collective."""
        mode = self._mode()
        if self._measure is not None:
            series, weights = self._metrics[mode], self._figure_weights[mode]
            own = {key: list(zip(series[key], weights[key], strict=False)) for key in series.keys() & weights}
            found = means(own, self.args.world_size)
            if self._measure.labelled and {"rewards/chosen", "rewards/rejected"} <= found.keys():
                # TRL has a margin of batches with both kinds only.
                found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
            self._metrics[mode].update({key: [mean] for key, mean in found.items()})
        super().log(logs, *args, **kwargs)
        self._figure_weights[mode].clear()

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _repeated_rows(self, inputs: Any, sides: int) -> tuple[int, int] | None:
        if "attention_mask" not in inputs:  # padding-free: its rows cannot be told apart
            return None
        return own_rows(self, len(inputs["input_ids"]) // sides)

    def _count_tokens_of_all_ranks(self, mode: str, before: float) -> None:
        if mode == "train" and self.args.world_size > 1:
            own = torch.tensor(self._total_train_tokens - before, device=self.args.device)
            self._total_train_tokens = before + self.accelerator.reduce(own, "sum").item()
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def own_rows(trainer: Any, rows: int) -> tuple[int, int] | None:
    """How many ``rows`` this rank's batch of an evaluation has, and how many of them are its own.

    The last batches are filled up with rows of the first, so that all ranks have as many; None if none was.
    """
    state, args = trainer.accelerator.gradient_state, trainer.args
    if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return None
    return rows, min(max(state.remainder - args.process_index * rows, 0), rows)


def without(inputs: Any, repeated: tuple[int, int] | None) -> tuple[Any, bool]:
    """``inputs`` with a rank's own rows only, of pairs both sides; and whether there are none: one is kept then."""
    if repeated is None or repeated[0] == repeated[1]:
        return inputs, False
    rows, own = repeated
    kept = max(own, 1)

    def part(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) not in (rows, 2 * rows):
            return value
        return torch.cat([side[:kept] for side in value.split(rows)])

    return {key: part(value) for key, value in inputs.items()}, own == 0


def _of_labels(inputs: Any) -> Weights:
    labels = inputs["labels"]
    tokens = float((labels[..., 1:] != -100).sum().item())
    return Weights(len(labels), dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), tokens))


def _of_pairs(inputs: Any) -> Weights:
    mask = inputs["completion_mask"][..., 1:]
    chosen, rejected = (float(side.sum().item()) for side in mask.chunk(2))
    by_token = {
        "entropy": chosen + rejected,
        "logits/chosen": chosen,
        "logits/rejected": rejected,
        "mean_token_accuracy": chosen,
    }
    return Weights(len(mask) / 2, by_token)


def _of_completions(inputs: Any) -> Weights:
    tokens, wanted = inputs["completion_mask"][..., 1:].sum(-1), inputs["label"].bool()
    others = {"entropy": float(tokens.sum().item())}
    for side, rows in (("chosen", wanted), ("rejected", ~wanted)):
        others[f"rewards/{side}"] = others[f"logps/{side}"] = float(rows.sum().item())
        others[f"logits/{side}"] = float(tokens[rows].sum().item())
    return Weights(len(wanted), others)


def _of_scores(inputs: Any) -> Weights:
    return Weights(len(inputs["input_ids"]) / 2)


_MEASURES = {
    SFTTrainer: Measure(_of_labels),
    DPOTrainer: Measure(_of_pairs, sides=2),
    KTOTrainer: Measure(_of_completions, labelled=True),
    RewardTrainer: Measure(_of_scores, sides=2),
}


def _measure(trainer_cls: type[Trainer]) -> Measure | None:
    """How the batches of ``trainer_cls`` are weighed; None for trainers whose figures stay as they are."""
    return next((found for cls, found in _MEASURES.items() if issubclass(trainer_cls, cls)), None)
