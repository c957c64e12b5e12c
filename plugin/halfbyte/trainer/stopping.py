"""One stop that all ranks agree on at a step boundary, with a checkpoint where there is time to write one."""

import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from halfbyte.errors import Stopped
from halfbyte.resilience.signals import GRACE_SECONDS, RESERVE_SECONDS
from halfbyte.trainer.base import Mixin

_KEY = "halfbyte"  # in trainer_state.json, beside the states of callbacks


class _CutOff(BaseException):
    """Ends an evaluation; caught around it."""


class StopTogether(Mixin):
    """Stops every rank at the same boundary: the end of a step, a batch of an evaluation, the end of a save.

    At a boundary the ranks compare the signals that they received, save a checkpoint together and raise ``Stopped``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stopping: int | None = None
        self._save_seconds = self._grace_used = 0.0
        super().__init__(*args, **kwargs)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make up for the evaluation that a stop cut off; the Trainer restores the generators after this."""
        super().on_train_begin(args, state, control, **kwargs)
        if state.stateful_callbacks.pop(_KEY, {}).get("evaluation_due"):
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        self._agree_on_signals()
        if self._stopping is not None:
            self._refuse_a_late_save(state)
            if control.should_evaluate:
                state.stateful_callbacks[_KEY] = {"evaluation_due": True}
            control.should_evaluate, control.should_save = False, True  # on_save stops

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_save(args, state, control, **kwargs)
        self._agree_on_signals()
        if self._stopping is not None:
            raise self._stopped(state, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step} is saved")

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_prediction_step(args, state, control, **kwargs)
        self._agree_on_signals()
        if self._stopping is None:
            return
        place = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.global_step == 0 or place.is_dir():
            raise self._stopped(state, "the evaluation is cut off")
        self._refuse_a_late_save(state)
        raise _CutOff

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, or stop: outside of the evaluation, where the generators are training's again, save and stop."""
        try:
            return super().evaluate(*args, **kwargs)
        except _CutOff:
            self.state.stateful_callbacks[_KEY] = {"evaluation_due": True}
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.callback_handler.on_save(self.args, self.state, self.control)  # raises Stopped
            raise

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        start = time.monotonic()
        if self.conduct is not None:
            self.conduct.signals.boundary = True
        super()._save_checkpoint(*args, **kwargs)  # on_save comes next, and is a boundary
        self._save_seconds = time.monotonic() - start

    def _agree_on_signals(self) -> None:
        """Learn whether any rank received a signal, and how much of the grace period is used on the slowest."""
        if self._stopping is not None or self.conduct is None:
            return
        signals = self.conduct.signals
        received, used = signals.received or 0, 0.0
        if received:
            used = signals.elapsed() + self._save_seconds
        if self.args.world_size > 1:
            flags = torch.tensor([float(received), used, self._save_seconds], device=self.args.device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            received, used = int(flags[0]), max(float(flags[1]), float(flags[2]))
        signals.boundary = received != 0
        if received:
            self._stopping, self._grace_used = received, used

    def _refuse_a_late_save(self, state: TrainerState) -> None:
        if self._grace_used > GRACE_SECONDS - RESERVE_SECONDS:
            raise self._stopped(
                state,
                f"no checkpoint: the last took {self._save_seconds:.0f} s to save, too long for the "
                f"{GRACE_SECONDS:.0f} s that launchers leave; the one before it stays",
            )

    def _stopped(self, state: TrainerState, what: str) -> Stopped:
        assert self._stopping is not None
        name = signal.Signals(self._stopping).name
        return Stopped(self._stopping, f"stopped by {name} at step {state.global_step}: {what}")
