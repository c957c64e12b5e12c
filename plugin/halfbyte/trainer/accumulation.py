"""`on_oom: accumulate`: a step that runs out of memory is done again in smaller micro-batches, on all ranks.

The rank that failed is somewhere in a forward or backward, while the others go on. So that none waits for it
for ever, no gradient is reduced before all ranks have come through the step, and each collective of a trainer's
loss is preceded by a vote, in which the failed rank takes part in the others' place.
"""

import contextlib
import copy
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from halfbyte import distributed
from halfbyte.checkpoint.manifest import Manifest
from halfbyte.errors import Halted, UserError
from halfbyte.resilience.memory import advice
from halfbyte.trainer.exact_resume import counters, generators, restore_counters, restore_generators

# Trainers that make their batches in another way than the stock one are not cut up.
_STOCK = ("_inner_training_loop", "_run_epoch", "get_train_dataloader", "get_batch_samples")
_COLLECTIVES = ("gather", "reduce")  # of an Accelerator; `gather_for_metrics` calls the first

Record = Callable[[dict[str, int]], None]


class _OutOfMemory(Exception):  # noqa: N818 - not an error yet
    """Memory ran out in this step: here, if ``told`` says how, or on another rank."""

    def __init__(self, told: str | None) -> None:
        self.told = told


def refuse(trainer: Trainer) -> None:
    """Raise :class:`UserError` where `on_oom: accumulate` is not proven; on every rank, before training."""
    args, reason = trainer.args, None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        reason = "ranks that gather a divided base in the forward cannot leave it alone; launch with DDP"
    elif any(getattr(type(trainer), name) is not getattr(Trainer, name) for name in _STOCK):
        reason = f"{type(trainer).__name__} makes its batches itself, and they cannot be cut up"
    elif args.dataloader_drop_last:
        reason = "with dataloader_drop_last smaller micro-batches make longer epochs; take it out"
    if reason is not None:
        raise UserError(f"on_oom: accumulate: {reason}, or write `on_oom: stop`")


def take_over(trainer: Trainer, manifest: Manifest | None, config: Mapping[str, Any], record: Record) -> None:
    """Go on in the micro-batches that the checkpoint's run was brought down to, unless the user changed them."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if manifest is None or any(config[key] != manifest.config.get(key) for key in keys):
        return
    rows, batches = (manifest.data_position.get(key) for key in ("rows_per_batch", "batches_per_step"))
    if rows is not None and batches is not None and rows != trainer.args.per_device_train_batch_size:
        _set(trainer, rows, batches)
        record({"from_step": manifest.step + 1, keys[0]: rows, keys[1]: batches})
        if trainer.is_world_process_zero():
            print(f"resume: micro-batches of {rows}, {batches} a step, as when memory ran out", flush=True)


class Accumulation(TrainerCallback):
    """Does a step again, from its start, with micro-batches a half (a third, ...) as large."""

    def __init__(self, trainer: Trainer, record: Record) -> None:
        self._trainer, self._record = trainer, record
        kind = trainer.accelerator.distributed_type
        self._several = kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        self._vote = torch.zeros(1, device=trainer.args.device)  # made now: later there may be no room for it
        self._inside = False
        self._loader: Any = None
        self._start: tuple[Any, ...] = ()
        self._epoch, trainer._run_epoch = trainer._run_epoch, self._run_epoch
        self._step, trainer.training_step = trainer.training_step, self._training_step
        for name in _COLLECTIVES if self._several else ():
            setattr(trainer.accelerator, name, self._voted(getattr(trainer.accelerator, name)))

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        self._start = (
            generators(),
            counters(trainer),
            trainer._tr_loss.clone(),
            trainer.current_flos,
            copy.copy(state.num_input_tokens_seen),
        )

    def _training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, whose gradients stay on this rank until all ranks have come through the last one."""
        accelerator, told = self._trainer.accelerator, None
        try:
            self._inside = True
            with accelerator.no_sync(model) if self._several else contextlib.nullcontext():
                loss = self._step(model, inputs, *args, **kwargs)
            reduced = self._flat_gradients() if self._several and accelerator.sync_gradients else []
        except torch.OutOfMemoryError as error:
            told = (str(error).splitlines() or [""])[0]
        finally:
            self._inside = False
        self._agree(told)
        for flat, gradients in reduced:
            torch.distributed.all_reduce(flat)
            flat /= self._trainer.args.world_size
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return loss

    def _agree(self, told: str | None) -> None:
        """Raise on every rank if memory ran out on one."""
        failed = told is not None
        if self._several:
            self._vote.fill_(float(failed))
            torch.distributed.all_reduce(self._vote, op=torch.distributed.ReduceOp.MAX)
            failed = bool(self._vote.item())
        if failed:
            raise _OutOfMemory(told)

    def _voted(self, collective: Any) -> Any:
        @functools.wraps(collective)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                self._agree(None)
            return collective(*args, **kwargs)

        return wrapped

    def _flat_gradients(self) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """The gradients in one piece for each dtype, beside the tensors they came from."""
        groups: dict[torch.dtype, list[torch.Tensor]] = {}
        for weight in self._trainer.model.parameters():
            if weight.requires_grad:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                groups.setdefault(weight.dtype, []).append(weight.grad)
        return [(torch.cat([g.flatten() for g in group]), group) for group in groups.values()]

    def _run_epoch(self, **given: Any) -> None:
        """The Trainer's pass over the loader; after a step that failed, another that begins at that step."""
        trainer = self._trainer
        begin, loaders = generators(), trainer.accelerator.gradient_state.dataloader_references
        resumed = given["resume_from_checkpoint"] is not None and given["epoch"] == given["epochs_trained"]
        skipped = given["steps_trained_in_current_epoch"] if resumed else 0
        first = trainer.state.global_step - skipped // trainer.args.gradient_accumulation_steps
        if self._loader is not None:
            given.update(self._loader)
        position: Any = contextlib.nullcontext()
        while True:
            try:
                with position:
                    self._epoch(**given)
                return
            except _OutOfMemory as error:
                told = error.told
            # Out of the handler: what was raised holds the frames, and they what the step had allocated.
            self._take_back(told)
            trainer.accelerator.gradient_state.dataloader_references = loaders
            given.update(self._smaller_batches())
            restore_generators(begin)  # a sampler may draw when the loader is begun
            done = trainer.state.global_step - first
            if done:
                given.update(
                    epochs_trained=given["epoch"],
                    steps_trained_in_current_epoch=done * trainer.args.gradient_accumulation_steps,
                    resume_from_checkpoint="memory",
                )
                position = self._at_the_start_of_the_step()

    def _take_back(self, told: str | None) -> None:
        """Leave the trainer, and the memory, as they were before the step."""
        trainer = self._trainer
        trainer.model.zero_grad()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        args, step = trainer.args, trainer.state.global_step + 1
        words = distributed.gather(told)
        rank, why = next((rank, word) for rank, word in enumerate(words) if word is not None)
        rows = args.per_device_train_batch_size
        if rows == 1:
            where = (
                f" (rank {rank}, in micro-batches of one)" if len(words) > 1 else " (micro-batches of one)"
            )
            raise Halted(advice(trainer, why + where))
        _, kept, loss, trainer.current_flos, trainer.state.num_input_tokens_seen = self._start
        restore_counters(trainer, kept)
        trainer._tr_loss.copy_(loss)
        parts = next(n for n in range(2, rows + 1) if rows % n == 0)  # the rows of a step stay the same
        _set(trainer, rows // parts, args.gradient_accumulation_steps * parts)
        split = {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        }
        self._record({"from_step": step, **split})
        if trainer.is_world_process_zero():
            now = ", ".join(f"{key} {value}" for key, value in split.items())
            print(
                f"step {step}: out of memory on rank {rank} ({why[:200]}); done again with {now}",
                file=sys.stderr,
                flush=True,
            )

    def _smaller_batches(self) -> dict[str, Any]:
        trainer = self._trainer
        loader = trainer.get_train_dataloader()
        steps = trainer.state.max_steps * trainer.args.gradient_accumulation_steps
        self._loader = {
            "train_dataloader": loader,
            "steps_in_epoch": len(loader) if has_length(loader) else steps,
        }
        trainer.callback_handler.train_dataloader = loader
        return self._loader

    @contextlib.contextmanager
    def _at_the_start_of_the_step(self) -> Iterator[None]:
        """Where the Trainer restores the generators of a checkpoint, restore those of the step."""
        trainer, state = self._trainer, self._start[0]
        stock = trainer._load_rng_state
        trainer._load_rng_state = lambda checkpoint: restore_generators(state)
        try:
            yield
        finally:
            trainer._load_rng_state = stock


def _set(trainer: Trainer, rows: int, batches: int) -> None:
    trainer.args.per_device_train_batch_size = rows
    trainer.args.gradient_accumulation_steps = batches
    trainer._train_batch_size = trainer.args.train_batch_size
    trainer.state.train_batch_size = trainer._train_batch_size


def accumulate(trainer: Trainer, record: Record) -> None:
    """Have ``trainer`` survive a lack of memory; on every rank, after the guards. ``record`` is told each change."""
    trainer.add_callback(Accumulation(trainer, record))
