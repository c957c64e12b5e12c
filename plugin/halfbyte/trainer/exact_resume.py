"""What makes a resumed run equal to one that was never interrupted, beyond what the Trainer restores.

The Trainer restores weights, optimizer, scheduler, its state and the random generators. It forgets the
losses and metrics gathered since the last row of the log and TRL's count of tokens; it takes a stream for one
endless pass, and has samplers draw their order anew; an evaluation draws from the generators that training
uses; a finished run trains a step too many; and DDP lays out its buckets anew.
"""

import base64
import contextlib
import copy
import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

_COUNTERS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")


def make_exact(trainer: Trainer, checkpoint: Path | None) -> None:
    """Have ``trainer`` go on from ``checkpoint`` (None: begin) as if it had not stopped.

    On every rank, before the trackers are added, which read what is restored here.
    """
    trainer.evaluate = _without_drawing(trainer.evaluate)
    trainer.add_callback(_Exactness(trainer, checkpoint))


def write_progress(trainer: Trainer, directory: Path) -> None:
    """Write what this rank has gathered since the last row of the log as progress_RANK.json."""
    values: dict[str, Any] = {name: getattr(trainer, name) for name in _COUNTERS if hasattr(trainer, name)}
    values["_tr_loss"] = trainer._tr_loss.item()
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _Exactness):
            values |= callback.place()
    with contextlib.suppress(TypeError):  # a stranger's trainer may keep other things under this name
        values["_metrics"] = _plain(getattr(trainer, "_metrics", {}))
    (directory / _file(trainer)).write_text(json.dumps(values), encoding="utf-8")


def generators() -> tuple[Any, ...]:
    """The states of Python's, NumPy's and torch's random generators, those of every CUDA device among them."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def restore_generators(states: tuple[Any, ...]) -> None:
    """Put the generators back to what :func:`generators` returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state_all(states[3])


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the random generators after the block as they were before it."""
    states = generators()
    try:
        yield
    finally:
        restore_generators(states)


def counters(trainer: Trainer) -> dict[str, Any]:
    """A copy of what a TRL trainer counts in each micro-batch."""
    names = ("_metrics", "_total_train_tokens", "_step")
    return {name: copy.deepcopy(getattr(trainer, name)) for name in names if hasattr(trainer, name)}


def restore_counters(trainer: Trainer, kept: dict[str, Any]) -> None:
    """Put back what :func:`counters` returned."""
    for name, value in kept.items():
        setattr(trainer, name, value)


class _Exactness(TrainerCallback):
    def __init__(self, trainer: Trainer, checkpoint: Path | None) -> None:
        self._trainer, self._checkpoint = trainer, checkpoint
        self._pass, self._pass_began = -1, 0  # the pass over the data, from 0, and the steps before it
        self._generator, self._within = torch.get_rng_state(), False  # a resume begins within a pass
        self._init_state = trainer._init_training_state
        trainer._init_training_state = self._find_the_pass

    def place(self) -> dict[str, Any]:
        """Which pass over the data this is, from 0, the steps made in it, and torch's generator when it began."""
        drawn = base64.b64encode(bytes(self._generator.tolist())).decode()
        steps = self._trainer.state.global_step - self._pass_began
        return {"_pass": self._pass, "_steps": steps, "_generator": drawn}

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pass += 1
        if not self._within:
            self._pass_began, self._generator = state.global_step, torch.get_rng_state()
        else:
            # Some samplers draw their order from it; the Trainer then restores what the checkpoint has.
            torch.set_rng_state(self._generator)
        self._within = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        if self._checkpoint is not None:
            self._restore(self._checkpoint)
            self._find_best(state)
            args.eval_on_start = False  # it was done when the run began
            if state.global_step >= state.max_steps:
                trainer._run_epoch = self._nothing_left
        _lay_out_buckets(trainer)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Upstream divides the loss of the whole run by the steps of this session."""
        if self._checkpoint is not None and logs is not None and "train_loss" in logs:
            logs["train_loss"] = self._trainer._total_loss_scalar / max(state.global_step, 1)
            state.log_history[-1]["train_loss"] = logs["train_loss"]

    def _find_the_pass(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The pass and the batches to skip in it: upstream does not know where a stream began again."""
        begun, batches = self._init_state(*args, **kwargs)
        trainer, batches_per_step = self._trainer, self._trainer.args.gradient_accumulation_steps
        path = self._checkpoint / _file(trainer) if self._checkpoint is not None else None
        if path is not None and path.is_file():
            place = json.loads(path.read_text(encoding="utf-8"))
            if not has_length(trainer.train_dataset):
                begun, batches = place["_pass"], place["_steps"] * batches_per_step
            if batches:
                self._generator = torch.tensor(list(base64.b64decode(place["_generator"])), dtype=torch.uint8)
                self._within = True
            else:
                trainer._load_rng_state = self._noting(trainer._load_rng_state)
        self._pass = begun - 1
        self._pass_began = trainer.state.global_step - batches // batches_per_step
        return begun, batches

    def _noting(self, restore: Callable[[str], None]) -> Callable[[str], None]:
        """Between two passes the Trainer restores the generators after it has said that the pass begins."""

        def noted(checkpoint: str) -> None:
            restore(checkpoint)
            self._generator = torch.get_rng_state()

        return noted

    def _restore(self, checkpoint: Path) -> None:
        path = checkpoint / _file(self._trainer)
        if not path.is_file():  # another world size, which the user has allowed
            self._say(
                "on another number of processes the random generators start anew: close, not bit for bit"
            )
            return
        values = json.loads(path.read_text(encoding="utf-8"))
        for name in _COUNTERS:
            if name in values:
                setattr(self._trainer, name, values[name])
        self._trainer._tr_loss.fill_(values["_tr_loss"])
        for mode, series in values.get("_metrics", {}).items():
            self._trainer._metrics[mode].update(series)

    def _find_best(self, state: TrainerState) -> None:
        """Where the best checkpoint is now: the state has the path it was saved under."""
        if state.best_global_step is None:
            return
        best = Path(self._trainer.args.output_dir) / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        if state.best_model_checkpoint is None and self._trainer.args.load_best_model_at_end:
            self._say(
                f"{best.name}, the best so far, is not in {best.parent}: it cannot be loaded at the end"
            )

    def _say(self, line: str) -> None:
        if self._trainer.is_world_process_zero():
            print(f"resume: {line}", flush=True)

    def _nothing_left(self, **kwargs: Any) -> None:
        self._trainer.control.should_training_stop = True


def _lay_out_buckets(trainer: Trainer) -> None:
    """Have DDP settle its buckets before the first step, by two backwards that leave no trace.

    DDP lays its buckets out anew after the first backward. Three or more ranks then add in another order, so
    that the first step of a session differs from the same step in the middle of one. Two ranks cannot.
    """
    model = trainer.model_wrapped
    if not isinstance(model, DistributedDataParallel) or trainer.args.world_size < 3:
        return
    if type(trainer)._prepare_inputs is not Trainer._prepare_inputs or not hasattr(
        trainer.train_dataset, "__getitem__"
    ):
        if trainer.is_world_process_zero():
            print("resume: on 3 or more processes this trainer resumes closely, not bit for bit", flush=True)
        return
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, "buckets")
    rows = [trainer.train_dataset[0]] * trainer.args.per_device_train_batch_size
    with generators_kept():
        kept = counters(trainer)
        trainer.current_gradient_accumulation_steps = 1
        for _ in range(2):
            batch, items = trainer.get_batch_samples(iter([collate(rows)]), 1, trainer.args.device)
            trainer.accelerator.gradient_state._set_sync_gradients(True)
            type(trainer).training_step(trainer, model, batch[0], items)  # not as wrapped by the guards
        model.zero_grad()
        restore_counters(trainer, kept)


def _without_drawing(evaluate: Any) -> Any:
    """``evaluate`` that leaves the generators alone: when it is done decides nothing about training."""

    @functools.wraps(evaluate)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with generators_kept():
            return evaluate(*args, **kwargs)

    return wrapped


def _file(trainer: Trainer) -> str:
    return f"progress_{trainer.args.process_index}.json"


def _plain(value: Any) -> Any:
    """``value`` in JSON's types; TypeError for what has none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    raise TypeError(type(value).__name__)
