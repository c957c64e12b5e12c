"""What only the first step shows: adapters that it does not train, and fused layers that it ran unfused."""

import re
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from halfbyte import fast
from halfbyte.distributed import local_shard
from halfbyte.terminal.wording import plural, say
from halfbyte.trainer.base import Mixin

# What PEFT puts between the name of a module and that of its parameters.
_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|token_adapter|trainable_tokens_\w+)\b.*")


class FirstStep(Mixin):
    """Reports in one line each what the first step of a session shows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._first_step_is_over = False
        super().__init__(*args, **kwargs)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if self._first_step_is_over or self.is_deepspeed_enabled:  # which keeps gradients to itself
            return
        flags = with_gradient(self.model)
        got = torch.tensor([float(flag) for flag in flags.values()], device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(got, op=torch.distributed.ReduceOp.MAX)
        idle = [name for name, flag in zip(flags, got.tolist(), strict=True) if not flag]
        if idle:
            say(
                f"step {state.global_step + 1}: {plural(len(idle), 'adapter')} of {len(flags)} got no gradient, the "
                f"first on {idle[0]}; `lora_exclude_modules` leaves out what the rows do not train",
                error=True,
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if not self._first_step_is_over and (reasons := fast.fell_back(self.model)):
            calls = ", ".join(f"{plural(count, 'call')} ({why})" for why, count in reasons.items())
            say(f"step {state.global_step}: fused layers ran unfused in {calls}", error=True)
        self._first_step_is_over = True


def with_gradient(model: nn.Module) -> dict[str, bool]:
    """Whether each trained module of ``model``, an adapter as a whole, has a gradient on this rank.

    A new adapter's A has none, as B is zero, but its B has. Rows of embeddings have one only where their token occurs:
    that there is a gradient at all counts.
    """
    found: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = _ADAPTER.sub("", name).removeprefix("base_model.model.")
            gradient = None if parameter.grad is None else local_shard(parameter.grad)
            sparse = "trainable_tokens" in name
            got = gradient is not None and (sparse or bool(gradient.count_nonzero()))
            found[module] = found.get(module, False) or got
    return found
