"""Guards: a step whose loss, gradients or weights are not finite never reaches the optimizer or a checkpoint.

The stock Trainer logs such a loss as 0.0 and goes on until every checkpoint is ruined.
"""

import json
import statistics
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from halfbyte.errors import Halted
from halfbyte.resilience.batches import describe_batch, row_numbers

MOST_SKIPPED = 10  # steps of a run that `on_nonfinite: skip` may leave out
DIRECTORY = "_nonfinite"  # names that begin with an underscore are not pushed to the hub

# A spike is a logged loss above the recent median by so many median deviations, and by a half.
SPIKE_DEVIATIONS, SPIKE_SHARE, SPIKE_ROWS = 10.0, 0.5, 20

_ADVICE = (
    "  look at the batch; then lower `learning_rate` or `max_grad_norm`, lengthen the warmup, or drop its rows\n"
    "  `on_nonfinite: skip` leaves such batches out, at most {bound} of them"
)


class FiniteSteps(TrainerCallback):
    """Looks at every loss, gradient and weight; all ranks decide together before each optimizer step."""

    def __init__(self, trainer: Trainer, on_nonfinite: str) -> None:
        self._trainer, self._skip = trainer, on_nonfinite == "skip"
        self.skipped: list[int] = []
        self._batches: list[Any] = []
        self._losses: list[torch.Tensor] = []
        self._good = torch.zeros(())
        self._training_step, self._save = trainer.training_step, trainer._save_checkpoint
        trainer.training_step, trainer._save_checkpoint = self._watched_step, self._checked_save
        trainer.args.logging_nan_inf_filter = False  # it logs 0.0, and reads each loss back from the device

    def _watched_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self._training_step(model, inputs, *args, **kwargs)
        self._batches.append(inputs)
        self._losses.append(loss.detach())
        if not self._skip:
            return loss
        # A step that may be left out goes into the logged mean with the loss before it.
        self._good = torch.where(torch.isfinite(loss), loss.detach(), self._good.to(loss))
        return self._good

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches, self._losses = [], []  # a step may be done again

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weights = self._trained()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if getattr(self._trainer.accelerator, "scaler", None) is not None:
            gradients = []  # infinite ones are how a float16 scaler finds its scale; it skips the step itself
        own, anywhere = self._broken(self._losses, gradients, weights)
        batches, losses = self._batches, self._losses
        self._batches, self._losses = [], []
        if not any(anywhere):
            return
        what = ", ".join(
            name for name, bad in zip(("loss", "gradient", "weight"), anywhere, strict=True) if bad
        )
        step = state.global_step + 1
        place = self._dump(batches, losses, step, own) if any(own[:2]) or args.process_index == 0 else None
        may_skip = self._skip and not anywhere[2] and len(self.skipped) < MOST_SKIPPED
        if may_skip:
            self.skipped.append(step)
            # An optimizer passes over parameters without a gradient: no update, no decay, no moments.
            for weight in weights:
                weight.grad = None
            _say(args, f"step {step}: {what} not finite; the step is left out ({place})")
            return
        before = f"after {len(self.skipped)} such steps were left out, " if self.skipped else ""
        raise Halted(
            f"step {step}: {before}{what} not finite; no optimizer step was made of it\n"
            f"  its batch: {place or Path(args.output_dir) / DIRECTORY}\n"
            + _ADVICE.format(bound=MOST_SKIPPED)
        )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._refuse_ruined_weights()

    def _checked_save(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_ruined_weights()
        self._save(*args, **kwargs)

    def _refuse_ruined_weights(self) -> None:
        """Weights that the last optimizer step has ruined are saved nowhere."""
        if self._broken(self._trained())[1][0]:
            raise Halted(
                f"step {self._trainer.state.global_step}: weight not finite after the optimizer step; it is not "
                "saved\n  lower `learning_rate`; the checkpoint before it is good"
            )

    def _trained(self) -> list[torch.Tensor]:
        return [weight for weight in self._trainer.model.parameters() if weight.requires_grad]

    def _broken(self, *groups: list[torch.Tensor]) -> tuple[list[bool], list[bool]]:
        """Which groups hold values that are not finite: on this rank, and on any; read from the device once."""
        args = self._trainer.args
        own = torch.stack([_not_finite(group, args.device) for group in groups])
        if args.world_size == 1:
            return own.tolist(), own.tolist()
        shared = own.float()
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        both = torch.stack([own.float(), shared]).bool().tolist()
        return both[0], both[1]

    def _dump(self, batches: list[Any], losses: list[torch.Tensor], step: int, own: list[bool]) -> Path:
        trainer = self._trainer
        rank = trainer.args.process_index
        place = Path(trainer.args.output_dir) / DIRECTORY / f"step-{step}-rank-{rank}.json"
        rows = row_numbers(trainer, len(batches), batches)
        content = {
            "step": step,
            "rank": rank,
            "not_finite": {"loss": own[0], "gradient": own[1], "weight": own[2]},
            "micro_batches": [
                {
                    "loss": str(float(loss)),
                    "rows": None if rows is None else rows[number],
                    **describe_batch(batch, trainer.processing_class),
                }
                for number, (batch, loss) in enumerate(zip(batches, losses, strict=True))
            ],
        }
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return place


class LossSpikes(TrainerCallback):
    """Says in one line when a logged loss leaves the range of those before it."""

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
                _say(
                    args,
                    f"step {state.global_step}: loss {loss:.4g}, a spike: the recent median is {middle:.4g}",
                )
        self._recent.append(loss)


def guard(trainer: Trainer, on_nonfinite: str) -> FiniteSteps:
    """Put the guards on a trainer, on every rank, before `train`; ``on_nonfinite`` is stop or skip."""
    finite = FiniteSteps(trainer, on_nonfinite)
    trainer.add_callback(finite)
    trainer.add_callback(LossSpikes())
    return finite


def _not_finite(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Whether any value is not finite, on ``device``: one pass, as the largest magnitude tells."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
        if local.numel() and local.is_floating_point():
            groups.setdefault((local.device, local.dtype), []).append(local)
    broken = torch.zeros((), dtype=torch.bool, device=device)
    for group in groups.values():
        largest = torch.stack(list(torch._foreach_norm(group, ord=float("inf"))))
        broken = broken | (~torch.isfinite(largest)).any().to(device)
    return broken


def _say(args: Any, line: str) -> None:
    if args.process_index == 0:
        print(line, file=sys.stderr, flush=True)
