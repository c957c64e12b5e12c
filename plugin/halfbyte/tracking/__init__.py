"""What a run writes: run.json, metrics.jsonl, plots, the model card, W&B, and progress on the terminal."""

from halfbyte.tracking.callback import Tracker
from halfbyte.tracking.record import RunRecord, peak_memory_bytes
from halfbyte.tracking.redaction import redact
from halfbyte.tracking.suggested import next_command, resume_command
from halfbyte.tracking.wandb_run import check_wandb, wandb_missing, wandb_ready

__all__ = [
    "RunRecord",
    "Tracker",
    "check_wandb",
    "next_command",
    "peak_memory_bytes",
    "redact",
    "resume_command",
    "wandb_missing",
    "wandb_ready",
]
