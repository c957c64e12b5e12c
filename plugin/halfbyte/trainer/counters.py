"""What a Trainer and TRL's trainers count between two rows of the log: kept, restored, written in JSON's types."""

import copy
from collections.abc import Mapping
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


def counters(trainer: Trainer) -> dict[str, Any]:
    """A copy of what a TRL trainer counts in each micro-batch."""
    return {name: copy.deepcopy(getattr(trainer, name)) for name in _OF_A_STEP if hasattr(trainer, name)}


def restore_counters(trainer: Trainer, kept: Mapping[str, Any]) -> None:
    """Put back what :func:`counters` returned."""
    for name, value in kept.items():
        setattr(trainer, name, value)


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
