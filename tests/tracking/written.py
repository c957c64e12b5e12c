"""Run directories as a run leaves them, without training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.tracking.figures import LANGUAGE_MODELING, PREFERENCES, Figures

FIGURES = {"sft": LANGUAGE_MODELING, "dpo": PREFERENCES}


def write_run(
    directory: Path,
    losses: Sequence[float] = (2.0, 1.5, 1.0),
    *,
    recipe: str = "sft",
    figures: Figures | None = None,
    rows: Sequence[dict[str, Any]] = (),
    record: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a run of 10 steps between ``losses``, of evaluations, with more ``rows``; return its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    logged = [{"step": 10 * n, "epoch": n, "time": 0.0, "eval_loss": loss} for n, loss in enumerate(losses)]
    logged += [{"step": 10 * n, "time": 0.0, "loss": loss + 0.1} for n, loss in enumerate(losses) if n]
    text = "".join(f"{json.dumps(row)}\n" for row in sorted([*logged, *rows], key=lambda row: row["step"]))
    (directory / "metrics.jsonl").write_text(text, encoding="utf-8")
    values = {
        "status": "completed",
        "recipe": recipe,
        "config": {
            **{
                "output_dir": str(directory),
                "model_name_or_path": "owner/base",
                "dataset_name": "/data/chat",
            },
            **{"learning_rate": 1e-4, "lora_r": 16, "lora_target_modules": ["all-linear"], "use_dora": False},
            "max_steps": 20,
            **config,
        },
        "versions": {"torch": "2.13.0"},
        "base": {"name": "owner/base", "sha": "b" * 64},
        "data": {"rows": 56, "sha": "d" * 64, "eval": {"rows": 8, "sha": "e" * 64}},
        "strategy": {"name": "single", "world_size": 1},
        "steps": 10 * (len(losses) - 1),
        "total_steps": 20,
        "tokens_per_second": 1234.5,
        "peak_memory_bytes": [2**30, 2**31],
        "figures": (figures or FIGURES[recipe]).as_dict(),
        **(record or {}),
    }
    (directory / "run.json").write_text(json.dumps(values), encoding="utf-8")
    return directory
