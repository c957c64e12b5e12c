"""What a Trainer and TRL's trainers count between two rows of the log: kept, restored, written in JSON's types."""

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from transformers import Trainer

# Upstream forgets these over a resume.
COUNTERS = (
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_total_train_tokens",
    "_figure_weights",
    "_stored_figures",
    "_step_rows",
)
_OF_A_STEP = (
    "_metrics",
    "_figure_weights",
    "_stored_figures",
    "_total_train_tokens",
    "_step",
    "_step_rows",
    "_session_rows",
)
# Of these, what stands under "train" and "eval" apart.
_BY_MODE = ("_metrics", "_figure_weights", "_stored_figures")


def counters(trainer: Trainer) -> dict[str, Any]:
    """A copy of what a TRL trainer counts in each micro-batch."""
    return {name: copy.deepcopy(getattr(trainer, name)) for name in _OF_A_STEP if hasattr(trainer, name)}


def restore_counters(trainer: Trainer, kept: Mapping[str, Any]) -> None:
    """Put back what :func:`counters` returned."""
    for name, value in kept.items():
        setattr(trainer, name, value)


def begin_evaluation(trainer: Trainer) -> None:
    """Discard what an evaluation before this one has summed up and not logged: it was cut off, raised, or predicted."""
    for name in _BY_MODE:
        sums = getattr(trainer, name, None)
        if isinstance(sums, Mapping) and isinstance(found := sums.get("eval"), MutableMapping):
            found.clear()


def without_evaluation(value: Any) -> Any:
    """``value`` of a counter without the sums of an evaluation, which a resume begins again."""
    if isinstance(value, Mapping) and isinstance(value.get("eval"), Mapping):
        return {**value, "eval": {}}
    return value


def plain(value: Any) -> Any:
    """``value`` in JSON's types, numbers exactly; TypeError for what has none."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    raise TypeError(type(value).__name__)
