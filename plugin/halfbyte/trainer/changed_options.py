"""Options that a resume may change although the optimizer and the schedule keep them in their state."""

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from halfbyte.checkpoint.changes import differences
from halfbyte.trainer.base import Mixin

_BY_STEP = ("lr", "initial_lr")  # of a parameter group: what the schedule decides
_STATE = ("params", "step")  # of a parameter group: no options


class ChangedOptions(Mixin):
    """Gives a resumed optimizer and schedule this session's options where they are not the checkpoint's.

    The Trainer restores the states whole: learning rate, weight decay and betas would be those of the checkpoint, and
    the learning rate of the first step would be that of the old schedule.
    """

    lr_scheduler: Any
    optimizer: Any

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Take `logging_steps`, `eval_steps` and `save_steps` from the options: the restored state has old ones."""
        begun = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return begun

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore both states; where an option changed, write what this session's optimizer was made with over them."""
        made = [dict(group) for group in self.optimizer.param_groups] if self._options_changed() else None
        rates = list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        if made is None or checkpoint is None:
            return
        for group, as_made in zip(self.optimizer.param_groups, made, strict=True):
            group.update({k: v for k, v in as_made.items() if k not in (*_BY_STEP, *_STATE)})
        if isinstance(self.lr_scheduler, LambdaLR):
            self._follow_schedule(self.lr_scheduler, rates)

    def _options_changed(self) -> bool:
        conduct = self.conduct
        if conduct is None or conduct.manifest is None or self.is_deepspeed_enabled:
            return False
        now = {**conduct.config, "world_size": self.args.world_size, **conduct.inputs}
        return bool(differences(conduct.manifest, now))

    def _follow_schedule(self, scheduler: LambdaLR, rates: list[float]) -> None:
        """Set the learning rates to those that this session's schedule has at the step of the checkpoint."""
        current = [
            rate * schedule(scheduler.last_epoch)
            for rate, schedule in zip(rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate, now in zip(self.optimizer.param_groups, rates, current, strict=True):
            group["initial_lr"], group["lr"] = rate, now
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": rates, "_last_lr": current})
