"""What makes a resumed run equal to one that was never interrupted, beyond what the Trainer restores.

The Trainer restores weights, optimizer, scheduler, its state and the random generators. It forgets the losses and
metrics gathered since the last row of the log and TRL's count of tokens; it takes a stream for one endless epoch, and
has samplers draw their order again; an evaluation draws from the generators that training uses; the row and the
evaluation of an epoch come after the save of its last step, behind which a resume begins; a finished run trains a step
too many; and DDP rebuilds its buckets.
"""

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, has_length

from halfbyte.checkpoint.generators import generators_kept
from halfbyte.terminal.wording import say
from halfbyte.trainer.base import Mixin
from halfbyte.trainer.counters import COUNTERS, counters, plain, restore_counters, without_evaluation


class ExactResume(Mixin):
    """Resumes from ``conduct.checkpoint`` as if the run had not stopped, or begins at step 0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The epoch, from 0, the steps before it, and torch's generator when it began.
        self._exact_epoch, self._exact_steps_before = -1, 0
        self._exact_generator = torch.get_rng_state()
        self._exact_within_epoch = False  # whether the resume begins within an epoch
        self._exact_between_epochs = False
        self._exact_nothing_left = False
        self._exact_evaluated = -1  # the last step of the epoch that was evaluated before its end
        super().__init__(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate and leave the generators alone: when an evaluation runs decides nothing about training."""
        with generators_kept():
            return super().evaluate(*args, **kwargs)

    def write_beside_checkpoint(self, directory: Path) -> None:
        """Write what this rank has gathered since the last row of the log as progress_RANK.json.

        What an unfinished evaluation has summed up is not written: the resumed run begins it again.
        """
        super().write_beside_checkpoint(directory)
        values: dict[str, Any] = {
            name: plain(without_evaluation(getattr(self, name))) for name in COUNTERS if hasattr(self, name)
        }
        values["_tr_loss"] = self._tr_loss.item()
        values["_pass"] = self._exact_epoch
        values["_steps"] = self.state.global_step - self._exact_steps_before
        values["_generator"] = base64.b64encode(bytes(self._exact_generator.tolist())).decode()
        with contextlib.suppress(TypeError):  # a third-party trainer may keep other things under this name
            values["_metrics"] = plain(without_evaluation(getattr(self, "_metrics", {})))
        (directory / self._progress_file()).write_text(json.dumps(values), encoding="utf-8")

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_epoch_begin(args, state, control, **kwargs)
        self._exact_epoch += 1
        if not self._exact_within_epoch:
            self._exact_steps_before, self._exact_generator = state.global_step, torch.get_rng_state()
        else:
            # Some samplers draw their order from it; the Trainer then restores what the checkpoint has.
            torch.set_rng_state(self._exact_generator)
        self._exact_within_epoch = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the row and the evaluation of an epoch come before its last step is saved, or stopped at."""
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step < state.max_steps and not float(state.epoch).is_integer():
            return
        control.should_log = control.should_log or args.logging_strategy == IntervalStrategy.EPOCH
        if args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch:
            control.should_evaluate, self._exact_evaluated = True, state.global_step

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_epoch_end(args, state, control, **kwargs)
        if state.global_step == self._exact_evaluated:
            control.should_evaluate = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if (checkpoint := self._checkpoint()) is not None:
            self._restore_counters(checkpoint)
            self._find_best(state)
            self._exact_nothing_left = state.global_step >= state.max_steps
        self._lay_out_buckets()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Correct the closing loss: upstream divides the loss of the whole run by the steps of this session."""
        super().on_log(args, state, control, **kwargs)
        logs = kwargs.get("logs")
        if self._checkpoint() is not None and logs is not None and "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(state.global_step, 1)
            state.log_history[-1]["train_loss"] = logs["train_loss"]

    def _checkpoint(self) -> Path | None:
        return self.conduct.checkpoint if self.conduct is not None else None

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Find the epoch and the micro-batches to skip in it: upstream does not know where a stream began again."""
        begun, batches = super()._init_training_state(*args, **kwargs)
        batches_per_step = self.args.gradient_accumulation_steps
        checkpoint = self._checkpoint()
        path = checkpoint / self._progress_file() if checkpoint is not None else None
        if path is not None and path.is_file():
            place = json.loads(path.read_text(encoding="utf-8"))
            if not has_length(self.train_dataset):
                begun, batches = place["_pass"], place["_steps"] * batches_per_step
            if batches:
                drawn = list(base64.b64decode(place["_generator"]))
                self._exact_generator = torch.tensor(drawn, dtype=torch.uint8)
                self._exact_within_epoch = True
            else:
                self._exact_between_epochs = True
        self._exact_epoch = begun - 1
        self._exact_steps_before = self.state.global_step - batches // batches_per_step
        return begun, batches

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._exact_between_epochs:
            # Between two epochs the Trainer restores the generators after it has announced the second.
            self._exact_generator = torch.get_rng_state()

    def _run_epoch(self, **kwargs: Any) -> None:
        if self._exact_nothing_left:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _restore_counters(self, checkpoint: Path) -> None:
        path = checkpoint / self._progress_file()
        if not path.is_file():  # another world size, which the user has allowed
            say(
                "resume: on another number of processes the random generators are seeded again: close, not bit for bit"
            )
            return
        values = json.loads(path.read_text(encoding="utf-8"))
        for name in COUNTERS:
            if name in values:
                setattr(self, name, without_evaluation(values[name]))
        self._tr_loss.fill_(values["_tr_loss"])
        for mode, series in without_evaluation(values.get("_metrics", {})).items():
            self._metrics[mode].update(series)

    def _find_best(self, state: TrainerState) -> None:
        """Set where the best checkpoint is now: the state has the path it was saved under."""
        if state.best_global_step is None:
            return
        best = Path(self.args.output_dir) / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        if state.best_model_checkpoint is None and self.args.load_best_model_at_end:
            say(
                f"resume: {best.name}, the best so far, is not in {best.parent}; it cannot be loaded at the end"
            )

    def _lay_out_buckets(self) -> None:
        """Have DDP settle its buckets before the first step, by two backwards that leave no trace.

        DDP rebuilds its buckets after the first backward. Three or more ranks then add in another order, so that the
        first step of a session differs from the same step in the middle of one. Two ranks cannot.
        """
        model = self.model_wrapped
        if not isinstance(model, DistributedDataParallel) or self.args.world_size < 3:
            return
        stock = self.recipe_class._prepare_inputs is Trainer._prepare_inputs
        if not stock or not hasattr(self.train_dataset, "__getitem__"):
            say("resume: on 3 or more processes this trainer resumes closely, not bit for bit")
            return
        collate = self._get_collator_with_removed_columns(self.data_collator, "buckets")
        rows = [self.train_dataset[0]] * self.args.per_device_train_batch_size
        with generators_kept():
            kept = counters(self)
            self.current_gradient_accumulation_steps = 1
            for _ in range(2):
                batch, items = super().get_batch_samples(iter([collate(rows)]), 1, self.args.device)
                self.accelerator.gradient_state._set_sync_gradients(True)
                super().training_step(model, batch[0], items)  # below the checks
            model.zero_grad()
            restore_counters(self, kept)

    def _progress_file(self) -> str:
        return f"progress_{self.args.process_index}.json"
