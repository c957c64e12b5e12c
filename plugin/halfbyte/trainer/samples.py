"""Completions of `sample_prompts` while training, without a trace in it: by rank 0, or by all that hold shards."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from trl import DPOTrainer, KTOTrainer
from trl.trainer.utils import use_adapter

from halfbyte import distributed
from halfbyte.errors import Halted, UserError
from halfbyte.terminal.wording import first_line, plural, say
from halfbyte.trainer.base import Mixin, Sampling
from halfbyte.trainer.completions import Completion, complete, evaluated
from halfbyte.trainer.reference_identity import REFERENCE

logger = logging.getLogger(__name__)

SECONDS = 60.0
"""How long one round of completions may take."""

_KEY = "halfbyte_samples"  # in trainer_state.json, beside the states of callbacks


class Samples(Mixin):
    """Completes the prompts at the end of a step, ahead of its save, so that a resume has every round once.

    A round that a signal cuts off is thrown away and made up for by the resumed run; one that takes longer than
    :data:`SECONDS` keeps what is done. A round that fails is reported, and is the last; training goes on, unless ranks
    that hold shards wait for the one that failed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sampled: set[int] = set()  # steps
        self._sampling_failed = False
        self._of_the_reference: list[Completion] | None = None
        super().__init__(*args, **kwargs)

    def make_ready(self) -> None:
        super().make_ready()
        if (sampling := self._sampling) is not None:
            _check_lengths(self.model, sampling)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        due = state.stateful_callbacks.pop(_KEY, None) is not None
        if self._sampling is not None:
            assert self.conduct is not None
            self._sampled = distributed.agree(self.conduct.tracker.sampled_steps())
            if due or (args.eval_on_start and self._sampling.steps is None):
                self._sample(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if (sampling := self._sampling) is None:
            return
        if sampling.steps is not None:
            due = state.global_step % sampling.steps == 0
        else:
            # An evaluation at the end of an epoch comes after the save of its last step.
            epoch = args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch or 0).is_integer()
            due = control.should_evaluate or epoch
        kept = args.load_best_model_at_end  # the run may end with the weights of another step
        if due or (state.global_step >= state.max_steps and not kept):
            self._sample(state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete with the weights that the run ends with, where that was not done at their step."""
        super().on_train_end(args, state, control, **kwargs)
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self._sampling is not None and state.global_step > 0:
            self._sample(state.best_global_step if best else state.global_step)

    @property
    def _sampling(self) -> Sampling | None:
        return self.conduct.samples if self.conduct is not None else None

    def _sample(self, step: int) -> None:
        """Complete all prompts and note the round of ``step``, unless it is there; on every rank."""
        if step in self._sampled:
            return
        self._sampled.add(step)
        assert self.conduct is not None
        signals = self.conduct.signals

        def work(hurry: Callable[[], bool]) -> bool:
            return self._sampling_failed or self._round(step, hurry)

        def work_here(hurry: Callable[[], bool]) -> bool:
            try:
                return work(hurry)
            except Exception as error:
                self._give_up(step, error)
                return True

        def stopped() -> bool:
            return signals.received is not None

        if not distributed.is_sharded(self.model):
            whole = distributed.on_the_first(work_here, stopped)
        else:
            try:
                whole = distributed.in_step(work, stopped)
            except Halted:
                raise
            except Exception as error:
                self._give_up(step, error)
                whole = True
        if not whole:
            self.state.stateful_callbacks[_KEY] = {"step": step}

    def _give_up(self, step: int, error: Exception) -> None:
        self._sampling_failed = True
        if self.is_world_process_zero():
            reason = f"{type(error).__name__}: {first_line(error)}"
            logger.warning("step %s: sample_prompts failed, and is left out from here on: %s", step, reason)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _round(self, step: int, hurry: Callable[[], bool]) -> bool:
        """Complete all prompts; return False if ``hurry()`` cut that off, and nothing is noted."""
        sampling, begun = self._sampling, time.monotonic()
        assert self.conduct is not None
        assert sampling is not None

        def ends() -> bool:
            return hurry() or time.monotonic() - begun > SECONDS

        policy = self._complete(self.model, ends)
        reference = self._reference_completions(ends)
        if hurry():
            return False
        rows = []
        for number, (prompt, completion) in enumerate(zip(sampling.prompts.prompts, policy, strict=False), 1):
            row = {
                "step": step,
                "number": number,
                "prompt": prompt.given,
                "completion": self._decoded(completion),
            }
            if reference is not None:
                if number > len(reference):
                    break
                row["reference"] = self._decoded(reference[number - 1])
            rows.append({**row, "ended": completion.ended})
        if (left := len(sampling.prompts.prompts) - len(rows)) > 0:
            say(
                f"step {step}: {plural(left, 'prompt')} of sample_prompts left out after {SECONDS:.0f} s",
                error=True,
            )
        if rows and self.is_world_process_zero():
            self.conduct.tracker.sampled(rows)
        return True

    def _complete(self, model: Any, ends: Callable[[], bool]) -> list[Completion]:
        sampling = self._sampling
        assert sampling is not None
        tokenizer: Any = self.processing_class
        return complete(
            model,
            [prompt.ids for prompt in sampling.prompts.prompts],
            max_new_tokens=sampling.max_new_tokens,
            stops=sampling.prompts.stops | {tokenizer.eos_token_id} - {None},
            pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
            batch_size=self.args.per_device_eval_batch_size,
            ends=ends,
        )

    def _reference_completions(self, ends: Callable[[], bool]) -> list[Completion] | None:
        """What the reference of a preference run makes of the prompts: once a session, as it stays what it is.

        None where there is none: for another kind of trainer, or where all weights are trained from precomputed
        log-probabilities.
        """
        if not issubclass(self.recipe_class, DPOTrainer | KTOTrainer):
            return None
        if self._of_the_reference is not None and not self.args.sync_ref_model:
            return self._of_the_reference
        model: Any = self.model
        if self.ref_model is not None:
            found = self._complete(self.accelerator.unwrap_model(self.ref_model), ends)
        elif isinstance(model, PeftModel):
            with evaluated(model), use_adapter(model, REFERENCE if REFERENCE in model.peft_config else None):
                found = self._complete(model, ends)
        else:
            return None
        sampling = self._sampling
        assert sampling is not None
        if len(found) == len(sampling.prompts.prompts) and all(each.ended != "time" for each in found):
            self._of_the_reference = found
        return found

    def _decoded(self, completion: Completion) -> str:
        tokenizer: Any = self.processing_class
        return str(tokenizer.decode(completion.ids, skip_special_tokens=True))


def _check_lengths(model: Any, sampling: Sampling) -> None:
    """Raise :class:`UserError` for a prompt that leaves no room for its completion."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(sampling.prompts.prompts, 1):
        if most is not None and len(prompt.ids) + sampling.max_new_tokens > most:
            raise UserError(
                f"prompt {number} has {plural(len(prompt.ids), 'token')}, and the model has positions for {most:,}; "
                f"sample_max_new_tokens is {sampling.max_new_tokens}",
                option="sample_prompts",
            )
