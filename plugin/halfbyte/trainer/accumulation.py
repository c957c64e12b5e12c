"""`on_oom: accumulate`: a step that runs out of memory is repeated in smaller micro-batches, on all ranks.

The rank that failed is somewhere in a forward or backward, while the others continue. So that none waits for it
for ever, no gradient is reduced before all ranks have completed the step, and each collective of a trainer's loss is
preceded by a vote, in which the failed rank takes part in the others' place.
"""

import contextlib
import copy
import gc
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from halfbyte import distributed
from halfbyte.checkpoint.generators import generators, restore_generators
from halfbyte.errors import Halted, UserError
from halfbyte.fast.scope import keeps
from halfbyte.resilience.memory import advice, ran_out
from halfbyte.terminal.wording import first_line, say
from halfbyte.trainer.base import Mixin
from halfbyte.trainer.counters import counters, restore_counters
from halfbyte.trainer.upstream import wrap_collectives

# Trainers that make their batches in another way than the stock one are not split.
_STOCK = ("_inner_training_loop", "_run_epoch", "get_train_dataloader", "get_batch_samples")


class _OutOfMemory(Exception):  # noqa: N818 - not an error yet
    """Memory ran out in this step: here, if ``reason`` says how, or on another rank."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason


class AccumulateOnOutOfMemory(Mixin):
    """Repeats a step, from its start, with micro-batches a half (a third, ...) as large.

    Constructing it raises :class:`UserError` where this is not proven.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._within_step = False
        self._smaller_loader: dict[str, Any] | None = None
        self._step_start: tuple[Any, ...] = ()
        self._repeated_from: tuple[Any, ...] | None = (
            None  # generators of a step that is repeated in mid-epoch
        )
        super().__init__(*args, **kwargs)
        self._refuse()
        kind = self.accelerator.distributed_type
        self._several_ranks = kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        self._vote = torch.zeros(
            1, device=self.args.device
        )  # allocated now: later there may be no room for it
        if self._several_ranks:
            wrap_collectives(self.accelerator, self._vote_within_step)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self._step_start = (
            generators(),
            counters(self),
            self._tr_loss.clone(),
            self.current_flos,
            copy.copy(state.num_input_tokens_seen),
        )

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one micro-batch; its gradients stay on this rank until all ranks have completed the last one."""
        accelerator, reason = self.accelerator, None
        try:
            self._within_step = True
            with accelerator.no_sync(model) if self._several_ranks else contextlib.nullcontext():
                loss = super().training_step(model, inputs, *args, **kwargs)
            reduced = self._flat_gradients() if self._several_ranks and accelerator.sync_gradients else []
        except RuntimeError as error:
            if not ran_out(error):
                raise
            reason = first_line(error)
        finally:
            self._within_step = False
        self._agree_on_memory(reason)
        for flat, gradients in reduced:
            torch.distributed.all_reduce(flat)
            flat /= self.args.world_size
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return loss

    def _run_epoch(self, **given: Any) -> None:
        """Run the Trainer's epoch; after a step that failed, another one that begins at that step."""
        begin, loaders = generators(), self.accelerator.gradient_state.dataloader_references
        resumed = given["resume_from_checkpoint"] is not None and given["epoch"] == given["epochs_trained"]
        skipped = given["steps_trained_in_current_epoch"] if resumed else 0
        first = self.state.global_step - skipped // self.args.gradient_accumulation_steps
        if self._smaller_loader is not None:
            given.update(self._smaller_loader)
        while True:
            try:
                super()._run_epoch(**given)
                return
            except _OutOfMemory as error:
                reason = error.reason
            finally:
                self._repeated_from = None
            # Out of the handler: what was raised holds the frames, and they what the step had allocated.
            self._take_back(reason)
            self.accelerator.gradient_state.dataloader_references = loaders
            given.update(self._smaller_batches())
            restore_generators(begin)  # a sampler may draw when the loader is begun
            done = self.state.global_step - first
            if done:
                given.update(
                    epochs_trained=given["epoch"],
                    steps_trained_in_current_epoch=done * self.args.gradient_accumulation_steps,
                    resume_from_checkpoint="memory",
                )
                self._repeated_from = self._step_start[0]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators of the repeated step, where the Trainer would read those of a checkpoint."""
        if self._repeated_from is not None:
            restore_generators(self._repeated_from)
        else:
            super()._load_rng_state(checkpoint)

    def _refuse(self) -> None:
        args, reason = self.args, None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            reason = "ranks that gather a sharded base in the forward cannot leave it alone; launch with DDP"
        elif not keeps(self.recipe_class, Trainer, _STOCK):
            reason = f"{self.recipe_class.__name__} makes its batches itself, and they cannot be split"
        elif getattr(self, "calculate_KL", False):
            reason = "KTO estimates its KL term within a micro-batch, and smaller ones change the loss"
        elif args.dataloader_drop_last:
            reason = "with dataloader_drop_last smaller micro-batches make longer epochs; take it out"
        if reason is not None:
            raise UserError(f"accumulate: {reason}, or write `on_oom: stop`", option="on_oom")

    def _vote_within_step(self) -> None:
        if self._within_step:
            self._agree_on_memory(None)

    def _agree_on_memory(self, reason: str | None) -> None:
        """Raise on every rank if memory ran out on one."""
        failed = reason is not None
        if self._several_ranks:
            self._vote.fill_(float(failed))
            torch.distributed.all_reduce(self._vote, op=torch.distributed.ReduceOp.MAX)
            failed = bool(self._vote.item())
        if failed:
            raise _OutOfMemory(reason)

    def _flat_gradients(self) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Return the gradients in one flat tensor for each dtype, beside the tensors they came from."""
        groups: dict[torch.dtype, list[torch.Tensor]] = {}
        for weight in self.model.parameters():
            if weight.requires_grad:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                groups.setdefault(weight.dtype, []).append(weight.grad)
        return [(torch.cat([g.flatten() for g in group]), group) for group in groups.values()]

    def _take_back(self, reason: str | None) -> None:
        """Leave the trainer, and the memory, as they were before the step."""
        self.model.zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        args, step = self.args, self.state.global_step + 1
        reasons = distributed.gather(reason)
        rank, why = next((rank, word) for rank, word in enumerate(reasons) if word is not None)
        rows = args.per_device_train_batch_size
        if rows == 1:
            of_rank = f"rank {rank}, in " if len(reasons) > 1 else ""
            raise Halted(advice(args, step, f"{why} ({of_rank}micro-batches of one)"))
        _, kept, loss, self.current_flos, self.state.num_input_tokens_seen = self._step_start
        restore_counters(self, kept)
        self._tr_loss.copy_(loss)
        parts = next(n for n in range(2, rows + 1) if rows % n == 0)  # the rows of a step stay the same
        split = {
            "per_device_train_batch_size": rows // parts,
            "gradient_accumulation_steps": args.gradient_accumulation_steps * parts,
        }
        for key, value in split.items():
            setattr(args, key, value)
        self._train_batch_size = self.state.train_batch_size = args.train_batch_size
        if self.conduct is not None:
            record = self.conduct.tracker.record
            record.update(micro_batches=[*record.get("micro_batches", []), {"from_step": step, **split}])
        now = ", ".join(f"{key} {value}" for key, value in split.items())
        say(f"step {step}: out of memory on rank {rank} ({why[:200]}); repeated with {now}", error=True)

    def _smaller_batches(self) -> dict[str, Any]:
        loader = self.get_train_dataloader()
        steps = self.state.max_steps * self.args.gradient_accumulation_steps
        self._smaller_loader = {
            "train_dataloader": loader,
            "steps_in_epoch": len(loader) if has_length(loader) else steps,
        }
        self.callback_handler.train_dataloader = loader
        return self._smaller_loader
