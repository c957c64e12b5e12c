"""Runs of the command line that leave checkpoints, and what two of them must have in common."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from halfbyte.checkpoint import manifest
from halfbyte.cli import main
from tests import tiny

ROWS = {
    "sft": tiny.conversations,
    "dpo": tiny.preferences,
    "pretrain": tiny.texts,
    "kto": tiny.labelled,
    "reward": tiny.preferences,
}
STEPS, SAVED = 6, 3
# Of a row or of the state, what the clock decides.
_TIMED = ("time", "runtime", "per_second", "flos")

DEFAULTS = {
    "--max_steps": str(STEPS),
    "--logging_steps": "1",
    "--per_device_train_batch_size": "2",
    "--gradient_accumulation_steps": "1",
    "--learning_rate": "1e-2",
    "--lora_dropout": "0.1",
    "--save_strategy": "steps",
    "--save_steps": str(SAVED),
    "--report_to": "none",
    "--dtype": "float32",
}


def options(model: Path, rows: str, output: Path, **given: str) -> list[str]:
    """The options of a run of six steps, dropout on, with checkpoints at 3 and 6."""
    values = {
        "--model_name_or_path": str(model),
        "--dataset_name": rows,
        "--output_dir": str(output),
        **DEFAULTS,
        **{f"--{key}": value for key, value in given.items()},
    }
    return [word for pair in values.items() for word in pair]


def run(recipe: str, arguments: list[str], *more: str) -> int:
    return main([recipe, *arguments, *more])


def interrupted(whole: Path, copy: Path, step: int = SAVED) -> Path:
    """What a kill after checkpoint-``step`` would have left of ``whole``: later rows, no later checkpoint."""
    shutil.copytree(whole / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    rows = [row for row in read_rows(whole) if row["step"] <= step + 1 and "train_runtime" not in row]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (copy / "metrics.jsonl").write_text(text + '{"step": 5, "lo', encoding="utf-8")
    shutil.copyfile(whole / "run.json", copy / "run.json")
    return copy


@dataclass(frozen=True)
class Finished:
    """A run of six steps with checkpoints at 2, 4 and 6."""

    output: Path
    model: Path
    rows: str

    def options(self, output: Path, **given: str) -> list[str]:
        return options(self.model, self.rows, output, save_steps="2", **given)

    def cut(self, copy: Path) -> Path:
        """What a kill in step 5 would have left of it: checkpoint-2 and checkpoint-4."""
        interrupted(self.output, copy, 4)
        shutil.copytree(self.output / "checkpoint-2", copy / "checkpoint-2")
        return copy


def read_rows(output: Path, log: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / log).read_text().splitlines()]


def assert_equal(one: Path, other: Path, step: int = STEPS) -> None:
    """Bit for bit: final weights, and weights, optimizer, scheduler, generators and counters of a checkpoint.

    The rows of metrics.jsonl are equal as well, but for what the clock says.
    """
    weights = "adapter_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    first, second = (entries(output / f"checkpoint-{step}") for output in (one, other))
    assert first.keys() == second.keys()
    differ = {name for name in first if first[name]["sha256"] != second[name]["sha256"]}
    # These name the output directory, or the seconds that something took.
    assert differ <= {"trainer_state.json", "training_args.json", "adapter_config.json", "README.md"}
    assert _untimed(read_rows(one)) == _untimed(read_rows(other))
    states = [
        json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
        for output in (one, other)
    ]
    for state in states:
        del state["log_history"]  # metrics.jsonl has the same rows, and those logged after the save
        state.pop("best_model_checkpoint")
    assert states[0] == states[1]


def entries(checkpoint: Path) -> dict[str, dict]:
    found, problems = manifest.check(checkpoint)
    assert found is not None
    assert not problems, problems
    return json.loads((checkpoint / manifest.NAME).read_text())["files"]


def _untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not any(word in k for word in _TIMED)} for row in rows]
