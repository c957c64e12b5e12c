"""What a model is trained for: which auto class loads it, and which of its modules stay in 16 bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.errors import UserError
from halfbyte.terminal.wording import suggestion


@dataclass(frozen=True)
class Task:
    """One kind of model, as transformers and PEFT name it.

    ``auto_class`` is the name of a class in transformers and ``peft_type`` that of a ``peft.TaskType``.
    ``unquantized`` are the names of the modules that stay in 16 bits beside the LM head, such as a new
    classification head. ``model_kwargs`` are passed to ``from_pretrained``.
    """

    name: str
    auto_class: str
    peft_type: str
    unquantized: tuple[str, ...] = ()
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)


CAUSAL_LM = Task("causal language modeling", "AutoModelForCausalLM", "CAUSAL_LM")

SEQUENCE_CLASSIFICATION = Task(
    "sequence classification",
    "AutoModelForSequenceClassification",
    "SEQ_CLS",
    # What transformers calls the new head, by architecture.
    unquantized=("score", "classifier", "classification_head"),
    model_kwargs={"num_labels": 1},
)
"""One score a sequence: reward models, and regression."""

SEQ2SEQ = Task("sequence to sequence", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")

TASKS = {task.peft_type: task for task in (CAUSAL_LM, SEQUENCE_CLASSIFICATION, SEQ2SEQ)}
"""The tasks by PEFT's names."""


# Trainer classes, of TRL and transformers, that train one kind of model only.
_TRAINERS = {"RewardTrainer": SEQUENCE_CLASSIFICATION, "Seq2SeqTrainer": SEQ2SEQ}


def by_trainer(trainer_cls: type) -> Task | None:
    """Return the one task of ``trainer_cls``, by its name or that of a base; None if it has several."""
    return next(
        (_TRAINERS[each.__name__] for each in trainer_cls.__mro__ if each.__name__ in _TRAINERS), None
    )


def by_peft_type(peft_type: str) -> Task:
    """Return the task that PEFT calls ``peft_type``. Raises :class:`UserError` for one that is not supported."""
    task = TASKS.get(peft_type)
    if task is None:
        raise UserError(
            f"the task type {peft_type!r} is not supported{suggestion(peft_type, TASKS)}\n"
            f"  supported: {', '.join(TASKS)}",
            option="lora_task_type",
        )
    return task
