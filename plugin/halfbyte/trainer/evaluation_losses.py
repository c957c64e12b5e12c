"""The loss of an evaluation over all that it is a mean of, for the trainers whose figures are weighed."""

from typing import Any

from halfbyte.trainer.base import Mixin
from halfbyte.trainer.counters import begin_evaluation
from halfbyte.trainer.means import means


class EvaluationLosses(Mixin):
    """Weighs the loss of each batch of an evaluation: upstream repeats a batch's mean for every row of it.

    A mixin over it sets ``_weighs_losses`` and adds (loss, weight) of each batch to ``_evaluation_losses``; where none
    does, upstream's loss stands. ``_outputs_are_used`` is whether the evaluation keeps more than losses.
    """

    _weighs_losses: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._evaluation_losses: list[tuple[float, float]] = []
        self._outputs_are_used = True
        super().__init__(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Return upstream's output, its loss weighted, with figures of this evaluation alone; a collective."""
        begin_evaluation(self)
        self._evaluation_losses.clear()
        self._outputs_are_used = not prediction_loss_only
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._weighs_losses:
            found = means({"loss": self._evaluation_losses}, self.args.world_size)
            output.metrics.update({f"{metric_key_prefix}_{key}": mean for key, mean in found.items()})
        return output
