"""Runs of one configuration on any number of processes, and what each rank was left with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launch, packages, tiny
from tests.distributed import witness

GLOBAL_BATCH = 6
ROWS = {"sft": tiny.conversations, "dpo": tiny.preferences}


@dataclass(frozen=True)
class Outcome:
    """What a finished run left: its directory, its losses, and the adapter of every rank."""

    output: Path
    stdout: str
    adapters: list[dict[str, torch.Tensor]]

    @property
    def record(self) -> dict:
        return json.loads((self.output / "run.json").read_text())

    @property
    def losses(self) -> list[float]:
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which the witness recipes are installed."""
    installed = packages.write(tmp_path_factory.mktemp("site"), "witness", witness.ENTRY_POINTS)
    return f"{installed}:{launch.ROOT}"


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory, model_dir, site: str) -> Callable[..., Outcome]:
    """``train("sft", processes=2)``: six fp32 steps over the same global batches on any number of processes."""

    def run(recipe: str, *, processes: int, adapter: Path | None = None, base: str | None = None) -> Outcome:
        root = tmp_path_factory.mktemp(f"{recipe}-{processes}")
        output, seen = root / "run", root / "seen"
        config = {
            "model_name_or_path": (base or str(model_dir("llama"))) if adapter is None else None,
            "adapter_name_or_path": str(adapter) if adapter is not None else None,
            "dataset_name": tiny.write_rows(root / "rows", ROWS[recipe](40)),
            "per_device_train_batch_size": GLOBAL_BATCH // processes,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "lora_target_modules": "all-linear",
            "dtype": "float32",
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "witness_dir": str(seen),
            "output_dir": str(output),
        }
        lines = [f"{key}: {value}" for key, value in config.items() if value is not None]
        (root / "run.yaml").write_text("\n".join(lines) + "\n")
        arguments = ["--config", str(root / "run.yaml")]
        stdout = ""
        if processes == 1:
            from halfbyte import run

            assert run.main(f"witness-{recipe}", getattr(witness, recipe), arguments) == 0
        else:
            done = launch.accelerate(f"witness-{recipe}", *arguments, processes=processes, PYTHONPATH=site)
            assert done.returncode == 0, done.stderr[-4000:]
            stdout = done.stdout
        adapters = [load_file(seen / f"rank-{rank}.safetensors") for rank in range(processes)]
        return Outcome(output, stdout, adapters)

    return run


@pytest.fixture(scope="session")
def reference(train: Callable[..., Outcome]) -> Callable[[str], Outcome]:
    """``reference("sft")``: the one-process run that the others are held against, made once."""
    made: dict[str, Outcome] = {}

    def get(recipe: str) -> Outcome:
        if recipe not in made:
            made[recipe] = train(recipe, processes=1)
        return made[recipe]

    return get


def assert_equal_runs(run: Outcome, one: Outcome, processes: int) -> None:
    """Equal losses and adapters as one process, one adapter on all ranks, and that adapter saved."""
    told = dict(run.record["strategy"])
    assert told.pop("base_bytes_per_rank") == [run.record["base"]["bytes_4bit"]] * processes
    assert told == {"name": "ddp", "world_size": processes, "devices": ["cpu"] * processes}
    assert len(run.losses) == 6
    assert run.losses == pytest.approx(one.losses, abs=1e-5)
    for adapter in run.adapters[1:]:
        assert furthest(adapter, run.adapters[0]) == 0.0
    assert furthest(run.adapters[0], one.adapters[0]) <= 1e-5
    saved = load_file(run.output / "adapter_model.safetensors")
    held = {name.replace(".default", ""): weight for name, weight in run.adapters[0].items()}
    assert furthest(saved, held) == 0.0
    assert run.stdout.count("step 1/6") == 1, "one rank prints"


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two adapters' weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
