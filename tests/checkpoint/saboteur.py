"""The sft recipe with a trainer that sends signals, or breaks, at a place and on the ranks it is told.

A stranger's package as far as halfbyte can see, so that the product has no switches for its tests.
"""

import dataclasses
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from trl import SFTTrainer

from halfbyte_recipes.sft import SFTArguments
from halfbyte_recipes.sft import recipe as sft_recipe

ENTRY_POINTS = {"saboteur": "tests.checkpoint.saboteur:recipe"}


@dataclass
class SaboteurArguments(SFTArguments):
    fault: str | None = field(default=None, metadata={"help": "A signal, loss, gradient, weight or memory."})
    fault_place: str = field(
        default="step",
        metadata={
            "help": "`build`, `step`, `evaluation` or `save`, for signals; `step` or `backward`, for memory."
        },
    )
    fault_target: str = field(default="0", metadata={"help": "A rank, `launcher`, or `all`."})
    fault_step: int = field(default=3, metadata={"help": "In which step."})
    fault_rows: int = field(default=0, metadata={"help": "Rows of a micro-batch that there is memory for."})


class SaboteurTrainer(SFTTrainer):
    """Leaves ``left-RANK`` in ``output_dir``: the step a rank was at when training was over."""

    _done = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._signal("build")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            step = f"{self.state.global_step}\n"
            (Path(self.args.output_dir) / f"left-{self.args.process_index}").write_text(step)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        now = self.state.global_step + 1 == self.args.fault_step
        if now:
            self._signal("step")
            self._run_out_of_memory("step")
        loss = super().training_step(*args, **kwargs)
        if now:
            self._run_out_of_memory("backward")
        if now and self._targeted():
            if self.args.fault == "loss":
                return loss * float("nan")
            if self.args.fault == "gradient":
                self._trained()[0].grad[0, 0] = float("inf")
        return loss

    def _run_out_of_memory(self, place: str) -> None:
        """In the last micro-batch of the step, with gradients of the others: before its forward, or after."""
        wanted = self.args.fault == "memory" and self.args.fault_place == place and self._targeted()
        too_large = self.args.per_device_train_batch_size > self.args.fault_rows
        if wanted and too_large and self.accelerator.sync_gradients:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.args.fault == "weight" and self.state.global_step == self.args.fault_step:
            self._trained()[0].data[0, 0] = float("nan")  # as an optimizer step would leave it
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._signal("evaluation")
        return super().prediction_step(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._signal("save")
        super()._save_checkpoint(*args, **kwargs)
        self._signal("saved")

    def _trained(self) -> list[torch.nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _targeted(self) -> bool:
        return self.args.fault_target in ("all", str(PartialState().process_index))

    def _signal(self, place: str) -> None:
        fault, target = self.args.fault or "", self.args.fault_target
        if self._done or place != self.args.fault_place or not fault.startswith("SIG"):
            return
        self._done = True
        if target in ("launcher", "all") and PartialState().process_index == 0:
            os.kill(os.getppid(), signal.Signals[fault])
        if self._targeted():
            os.kill(os.getpid(), signal.Signals[fault])


recipe = dataclasses.replace(sft_recipe, config=SaboteurArguments, trainer=SaboteurTrainer)
