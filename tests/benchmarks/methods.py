"""QLoRA, LoRA on the 16-bit base and full fine-tuning: one base, one set of rows, and a held-out loss."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.cli import main
from halfbyte.demo import stages
from halfbyte.errors import Halted


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: its options, and the learning rates to choose from."""

    options: Mapping[str, Any]
    rates: tuple[float, ...]


METHODS = {
    "QLoRA": Method({}, (1e-3, 2e-3, 4e-3)),
    "LoRA on the bfloat16 base": Method({"load_in_4bit": False}, (1e-3, 2e-3, 4e-3)),
    # Of a model this small the head is a large part, and full fine-tuning trains it.
    "QLoRA, the head trained too (float32)": Method(
        {"lora_modules_to_save": "lm_head", "dtype": "float32"}, (1e-3, 2e-3, 4e-3)
    ),
    "full fine-tuning": Method({"load_in_4bit": False, "use_peft": False}, (5e-4, 1e-3, 2e-3)),
}
SWEPT, REPORTED = 0, (1, 2, 3)  # seeds


@dataclass(frozen=True)
class Found:
    """The held-out loss of each learning rate of a method at one seed, and of each seed at the best of them."""

    swept: dict[float, float]
    losses: list[float]

    @property
    def rate(self) -> float:
        return min(self.swept, key=lambda rate: self.swept[rate])


def compare(
    base: Path, data: Path, directory: Path, *, size: stages.Size, seeds: Sequence[int] = REPORTED
) -> tuple[float, dict[str, Found]]:
    """The held-out loss before, and what each method found with the demo's SFT settings on ``data``."""
    before, found = 0.0, {}
    for name, method in METHODS.items():
        swept = {}
        for rate in method.rates:
            before, swept[rate] = _trained(base, data, directory, size, method, rate, SWEPT)
        rate = Found(swept, []).rate
        losses = [_trained(base, data, directory, size, method, rate, seed)[1] for seed in seeds]
        found[name] = Found(swept, losses)
    return before, found


def _trained(
    base: Path, data: Path, directory: Path, size: stages.Size, method: Method, rate: float, seed: int
) -> tuple[float, float]:
    """The held-out loss before and after one run."""
    options = {
        **stages.sft_training(size),
        "model_name_or_path": str(base),
        "dataset_name": str(data),
        "output_dir": str(directory / f"run-{len(list(directory.iterdir()))}"),
        # As many rows a step as the demo's two processes have together.
        "per_device_train_batch_size": 16,
        "dtype": "bfloat16",
        "save_strategy": "no",
        "learning_rate": rate,
        "seed": seed,
        **method.options,
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    if code := main(["sft", *words]):
        raise Halted(f"a run ended with status {code}: halfbyte sft {' '.join(words)}")
    metrics = json.loads((Path(options["output_dir"]) / "run.json").read_text(encoding="utf-8"))["metrics"]
    return metrics["before"]["eval_loss"], metrics["eval"]["eval_loss"]


def table(before: float, found: Mapping[str, Found]) -> list[str]:
    """One row a method: its learning rate, the mean over seeds and their spread, and what it is from the last's."""
    *_, last = found
    rows = [
        "| method | learning rate | swept, one seed | held-out loss | sd | each seed | less the last's, same seed |",
        "|---|---|---|---|---|---|---|",
        f"| none | | | {before:.4f} | | | |",
    ]
    for name, each in found.items():
        differences = [one - other for one, other in zip(each.losses, found[last].losses, strict=True)]
        swept = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in each.swept.items())
        rows.append(
            f"| {name} | {each.rate:g} | {swept} | {statistics.mean(each.losses):.4f} | {_deviation(each.losses)} "
            f"| {', '.join(f'{loss:.4f}' for loss in each.losses)} "
            f"| {'' if name == last else f'{statistics.mean(differences):+.4f}, sd {_deviation(differences)}'} |"
        )
    return rows


def _deviation(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
