"""A step whose loss, gradients or weights are not finite never reaches the optimizer or a checkpoint.

The stock Trainer logs such a loss as 0.0 and continues until every checkpoint is ruined.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from halfbyte.distributed import local_shard
from halfbyte.errors import Halted
from halfbyte.resilience.batches import describe_micro_batches, row_numbers, write_batch
from halfbyte.terminal.wording import say
from halfbyte.trainer.base import Mixin

MOST_SKIPPED = 10  # steps of a run that `on_nonfinite: skip` may leave out
DIRECTORY = "_nonfinite"

# A spike is a logged loss above the recent median by so many median deviations, and by a half.
SPIKE_DEVIATIONS, SPIKE_SHARE, SPIKE_ROWS = 10.0, 0.5, 20

_ADVICE = (
    "  look at the batch; then lower `learning_rate` or `max_grad_norm`, lengthen the warmup, or drop its rows\n"
    "  `on_nonfinite: skip` leaves such batches out, at most {bound} of them"
)


class FiniteSteps(Mixin):
    """Checks every loss, gradient and weight; all ranks decide together before each optimizer step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.skipped_steps: list[int] = []
        self._step_batches: list[Any] = []
        self._step_losses: list[torch.Tensor] = []
        self._last_finite_loss = torch.zeros(())
        super().__init__(*args, **kwargs)
        self.add_callback(LossSpikes())

    @property
    def _may_skip(self) -> bool:
        return self.conduct is not None and self.conduct.on_nonfinite == "skip"

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch and keep its loss and inputs until the optimizer step."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_batches.append(inputs)
        self._step_losses.append(loss.detach())
        if not self._may_skip:
            return loss
        # A step that may be left out goes into the logged mean with the loss before it.
        self._last_finite_loss = torch.where(
            torch.isfinite(loss), loss.detach(), self._last_finite_loss.to(loss)
        )
        return self._last_finite_loss

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self._step_batches, self._step_losses = [], []  # a step may be repeated

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        weights = self._trained_weights()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if getattr(self.accelerator, "scaler", None) is not None:
            gradients = []  # infinite ones are how a float16 scaler finds its scale; it skips the step itself
        own, anywhere = self._not_finite(self._step_losses, gradients, weights)
        batches, losses = self._step_batches, self._step_losses
        self._step_batches, self._step_losses = [], []
        if not any(anywhere):
            return
        what = ", ".join(
            name for name, bad in zip(("loss", "gradient", "weight"), anywhere, strict=True) if bad
        )
        step = state.global_step + 1
        written = any(own[:2]) or args.process_index == 0
        place = self._write_batch(batches, losses, step, own) if written else None
        if self._may_skip and not anywhere[2] and len(self.skipped_steps) < MOST_SKIPPED:
            self.skipped_steps.append(step)
            # An optimizer passes over parameters without a gradient: no update, no decay, no moments.
            for weight in weights:
                weight.grad = None
            say(f"step {step}: {what} not finite; the step is left out ({place})", error=True)
            return
        before = f"after {len(self.skipped_steps)} such steps were left out, " if self.skipped_steps else ""
        raise Halted(
            f"step {step}: {before}{what} not finite; no optimizer step was made of it\n"
            f"  its batch: {place or Path(args.output_dir) / DIRECTORY}\n"
            + _ADVICE.format(bound=MOST_SKIPPED)
        )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self._refuse_ruined_weights()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_ruined_weights()
        super()._save_checkpoint(*args, **kwargs)

    def _refuse_ruined_weights(self) -> None:
        """Raise on every rank if the last optimizer step has ruined a weight: such weights are saved nowhere."""
        if self._not_finite(self._trained_weights())[1][0]:
            raise Halted(
                f"step {self.state.global_step}: weight not finite after the optimizer step; it is not "
                "saved\n  lower `learning_rate`; the checkpoint before it is good"
            )

    def _trained_weights(self) -> list[torch.Tensor]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def _not_finite(self, *groups: list[torch.Tensor]) -> tuple[list[bool], list[bool]]:
        """Which groups hold values that are not finite: on this rank, and on any; read from the device once."""
        own = torch.stack([not_finite(group, self.args.device) for group in groups])
        if self.args.world_size == 1:
            return own.tolist(), own.tolist()
        shared = own.float()
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        both = torch.stack([own.float(), shared]).bool().tolist()
        return both[0], both[1]

    def _write_batch(
        self, batches: list[Any], losses: list[torch.Tensor], step: int, own: list[bool]
    ) -> Path:
        rank = self.args.process_index
        rows = row_numbers(self, len(batches), batches)
        content = {
            "step": step,
            "rank": rank,
            "not_finite": {"loss": own[0], "gradient": own[1], "weight": own[2]},
            "micro_batches": describe_micro_batches(batches, losses, rows, self.processing_class),
        }
        return write_batch(Path(self.args.output_dir) / DIRECTORY / f"step-{step}-rank-{rank}.json", content)


class LossSpikes(TrainerCallback):
    """Reports in one line when a logged loss leaves the range of those before it."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=100)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if not isinstance(loss, float):
            return
        if len(self._recent) >= SPIKE_ROWS:
            middle = statistics.median(self._recent)
            spread = statistics.median(abs(value - middle) for value in self._recent)
            if loss > middle + max(SPIKE_DEVIATIONS * spread, SPIKE_SHARE * abs(middle)):
                say(
                    f"step {state.global_step}: loss {loss:.4g}, a spike: the recent median is {middle:.4g}",
                    error=True,
                )
        self._recent.append(loss)


def not_finite(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return a bool scalar on ``device``: whether any value is not finite; one pass, by the largest magnitude."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        local = local_shard(tensor)
        if local.numel() and local.is_floating_point():
            groups.setdefault((local.device, local.dtype), []).append(local)
    broken = torch.zeros((), dtype=torch.bool, device=device)
    for group in groups.values():
        largest = torch.stack(list(torch._foreach_norm(group, ord=float("inf"))))
        broken = broken | (~torch.isfinite(largest)).any().to(device)
    return broken
