"""`metric_for_best_model` names a figure that an evaluation has."""

from typing import Any

from transformers import Trainer
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

from halfbyte.errors import Halted, UserError
from halfbyte.terminal.wording import suggestion
from halfbyte.trainer.base import Mixin

_ANY = ("loss", "runtime", "samples_per_second", "steps_per_second", "num_tokens", "entropy", "aux_loss")
_SIDES = tuple(f"{name}/{side}" for name in ("rewards", "logps", "logits") for side in ("chosen", "rejected"))
# What TRL 1.16 logs of an evaluation, without the prefix `eval_`.
FIGURES: dict[type[Trainer], tuple[str, ...]] = {
    SFTTrainer: (*_ANY, "mean_token_accuracy"),
    DPOTrainer: (*_ANY, "mean_token_accuracy", "rewards/accuracies", "rewards/margins", *_SIDES),
    KTOTrainer: (*_ANY, "kl", "rewards/margins", *_SIDES),
    RewardTrainer: (*_ANY[:5], "accuracy", "margin", "min_reward", "mean_reward", "max_reward"),
}


class BestMetric(Mixin):
    """Refuses a figure that no evaluation will have: before training where that is known, else at the first one."""

    def make_ready(self) -> None:
        self._check_figure()
        super().make_ready()

    def _check_figure(self) -> None:
        figures = next((names for cls, names in FIGURES.items() if issubclass(self.recipe_class, cls)), None)
        wanted = self.args.metric_for_best_model
        if wanted is None or figures is None or self.compute_metrics is not None:
            return
        known = list(figures)
        if isinstance(self.eval_dataset, dict):  # each has a loss of its own, under its name
            known += [f"{name}_{figure}" for name in self.eval_dataset for figure in _ANY[:4]]
        if wanted.removeprefix("eval_") not in known:
            raise UserError(
                f"no evaluation has a figure {wanted!r}{suggestion(wanted.removeprefix('eval_'), known)}; "
                f"it has {', '.join(known)}",
                option="metric_for_best_model",
            )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Raise :class:`Halted` where the evaluation lacks the figure; upstream raises KeyError."""
        wanted = self.args.metric_for_best_model
        if wanted is not None and f"eval_{wanted.removeprefix('eval_')}" not in metrics:
            raise Halted(
                f"step {self.state.global_step}: metric_for_best_model: the evaluation has no figure {wanted!r}; "
                f"it has {', '.join(sorted(metrics))}"
            )
        return bool(super()._determine_best_metric(metrics, trial))
