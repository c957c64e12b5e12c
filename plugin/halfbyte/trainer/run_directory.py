"""A Trainer that fills its run directory through the run's tracker, in place of upstream's reporting."""

from collections.abc import Callable
from typing import Any

import transformers.trainer
from transformers import PrinterCallback, TrainerControl, TrainerState
from transformers import ProgressCallback as TqdmCallback
from transformers.integrations import WandbCallback

from halfbyte.tracking.reported import UPSTREAM, without_telemetry
from halfbyte.trainer.base import Mixin
from halfbyte.trainer.model_flops import flops_per_token


def _forwarded(event: str) -> Callable[..., None]:
    """An event that the mixins below see first, then the tracker."""

    def on_event(self: Any, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        getattr(super(RunDirectory, self), event)(args, state, control, **kwargs)
        if self.conduct is not None:
            getattr(self.conduct.tracker, event)(args, state, control, **kwargs)

    return on_event


class RunDirectory(Mixin):
    """Passes the Trainer's events and its model card to ``conduct.tracker``.

    Takes the place of the Trainer's own progress bars, of its WandbCallback (which sends nested secrets and the
    command line; ``wandb`` stays in `report_to`, where TRL looks for it) and of its model card. Its callbacks for
    TensorBoard, Trackio and MLflow are driven by the tracker; those of others are left alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        without_telemetry()
        super().__init__(*args, **kwargs)
        for callback in (
            TqdmCallback,
            PrinterCallback,
            WandbCallback,
            transformers.trainer.DEFAULT_PROGRESS_CALLBACK,  # in a notebook, one of its own
        ):
            self.remove_callback(callback)
        taken = [found for kind in UPSTREAM if (found := self.pop_callback(kind)) is not None]
        if self.conduct is not None:
            self.conduct.tracker.report_through(taken)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.conduct is not None:
            counted = getattr(self, "_total_train_tokens", None)
            self.conduct.tracker.on_train_begin(args, state, control, counted_tokens=counted, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a row of training with its tokens per second, and their share of what the devices can compute.

        Here and not as an event, so that every tracker gets the same row.
        """
        if self.conduct is not None and "loss" in logs:
            counted = getattr(self, "_total_train_tokens", None) or self.state.num_input_tokens_seen or None
            rate = self.conduct.tracker.rate(counted, self.state.epoch)
            if rate is not None:
                logs = {**logs, "tokens_per_second": rate}
                if self.conduct.peak_flops is not None:
                    used = rate * flops_per_token(self.model)
                    logs["mfu"] = used / (self.conduct.peak_flops * self.args.world_size)
        super().log(logs, *args, **kwargs)

    on_step_end = _forwarded("on_step_end")
    on_log = _forwarded("on_log")
    on_prediction_step = _forwarded("on_prediction_step")
    on_evaluate = _forwarded("on_evaluate")
    on_predict = _forwarded("on_predict")
    on_save = _forwarded("on_save")
    on_train_end = _forwarded("on_train_end")
    on_push_begin = _forwarded("on_push_begin")

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write the run's model card in place of upstream's, whose arguments it accepts."""
        if self.conduct is not None:
            self.conduct.tracker.write_card(model_name)
