"""What a run writes: run.json, metrics.jsonl, plots, the model card, W&B, and progress on the terminal."""

from halfbyte.tracking.callback import Tracker, track
from halfbyte.tracking.record import RunRecord, peak_memory_bytes
from halfbyte.tracking.redaction import redact
from halfbyte.tracking.wandb_run import check_wandb, wandb_missing, wandb_ready

__all__ = [
    "RunRecord",
    "Tracker",
    "check_wandb",
    "peak_memory_bytes",
    "redact",
    "track",
    "wandb_missing",
    "wandb_ready",
]
