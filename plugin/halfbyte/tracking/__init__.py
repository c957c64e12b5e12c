"""What a run writes: run.json, metrics.jsonl, plots, the model card, W&B, and progress on the terminal.

Names are imported when they are used: a recipe takes its figures from here, and importing it must not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.tracking.callback import Tracker
    from halfbyte.tracking.installed import check_trackers
    from halfbyte.tracking.record import RunRecord, peak_memory_bytes
    from halfbyte.tracking.suggested import again_command, next_command, resume_command
    from halfbyte.tracking.wandb_login import check_wandb, wandb_missing, wandb_ready

_PLACES = {
    "again_command": "suggested",
    "RunRecord": "record",
    "Tracker": "callback",
    "check_trackers": "installed",
    "check_wandb": "wandb_login",
    "next_command": "suggested",
    "peak_memory_bytes": "record",
    "resume_command": "suggested",
    "wandb_missing": "wandb_login",
    "wandb_ready": "wandb_login",
}

__all__ = [
    "RunRecord",
    "Tracker",
    "again_command",
    "check_trackers",
    "check_wandb",
    "next_command",
    "peak_memory_bytes",
    "resume_command",
    "wandb_missing",
    "wandb_ready",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
