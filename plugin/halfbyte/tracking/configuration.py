"""What a tracker records of a run beside its options: what it stands on, and what was decided and predicted for it."""

from typing import Any

from halfbyte.tracking.record import RunRecord

_ABOUT = (
    *("recipe", "run_id", "versions", "base", "data", "tokenizer", "lineage", "fast", "batching", "strategy"),
    "memory",
)


def about(record: RunRecord) -> dict[str, Any]:
    """Return what ``run.json`` says of the run before its first step, by key and without secrets."""
    values = record.as_dict()
    return {key: values[key] for key in _ABOUT if key in values}
