"""Figures of TRL's ORPO and CPO trainers over all rows and ranks, as those of SFT and DPO are."""

from typing import Any

from halfbyte.data.preparation.sides import tokenizes_pairs
from halfbyte.trainer.base import Mixin
from halfbyte.trainer.means import means
from halfbyte.trainer.upstream import on_this_rank
from halfbyte.trainer.weighted_figures import own_rows, without


class StoredFigures(Mixin):
    """Weighs by rows what these trainers store of each batch, `nll_loss` by tokens; keys stay TRL's.

    TRL averages over batches and ranks as if all were of one size. `logits/chosen` and `logits/rejected` are TRL's: a
    mean over all positions of a batch, prompts and padding among them. The loss of a batch is a mean over its rows,
    with the negative log-likelihood as a mean over its tokens: `loss` and `eval_loss` weigh batches by rows.
    """

    _stored_metrics: dict[str, dict[str, list[float]]]
    # Of EvaluationLosses, below.
    _evaluation_losses: list[tuple[float, float]]
    _weighs_losses: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # By mode and key, (value, weight) of each batch since the last row of the log.
        self._stored_figures: dict[str, dict[str, list[tuple[float, float]]]] = {"train": {}, "eval": {}}
        self._batch_weights: dict[str, float] = {}
        super().__init__(*args, **kwargs)
        self._stores_figures = tokenizes_pairs(self.recipe_class)
        self._weighs_losses |= self._stores_figures

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        """Return the trainer's loss and this rank's figures; in an evaluation of its own rows only."""
        if not self._stores_figures:
            return super().get_batch_loss_metrics(model, batch, train_eval)
        empty = False
        if train_eval == "eval":
            batch, empty = without(batch, own_rows(self, len(batch["chosen_input_ids"])))
        self._batch_weights = dict.fromkeys(("rows", "nll_loss"), 0.0) if empty else self._weights(batch)
        with on_this_rank(self.accelerator):
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
        if train_eval == "eval":
            self._evaluation_losses.append((loss.item(), self._batch_weights["rows"]))
        return loss, metrics

    def store_metrics(self, metrics: dict[str, float], train_eval: str = "train") -> None:
        """Keep the figures of a batch with what they weigh."""
        if not self._stores_figures:
            super().store_metrics(metrics, train_eval)
            return
        for key, value in metrics.items():
            weight = self._batch_weights.get(key.removeprefix("eval_"), self._batch_weights["rows"])
            self._stored_figures[train_eval].setdefault(key, []).append((value, weight))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log ``logs`` with the weighted figures since the last row; a collective."""
        if self._stores_figures:
            mode = "train" if "loss" in logs else "eval"  # as the trainer below decides it
            found = means(self._stored_figures[mode], self.args.world_size)
            self._stored_figures[mode] = {}
            self._stored_metrics[mode].update({key: [mean] for key, mean in found.items()})
        super().log(logs, *args, **kwargs)

    def _weights(self, batch: Any) -> dict[str, float]:
        """What the figures of a batch weigh: its rows, and the tokens of which it has a negative log-likelihood."""
        # ORPO's is that of the chosen sequence, CPO's of the answer.
        counted = (
            batch["chosen_attention_mask"]
            if hasattr(self, "odds_ratio_loss")
            else batch["chosen_labels"] != -100
        )
        return {"rows": float(len(counted)), "nll_loss": float(counted[:, 1:].sum().item())}
