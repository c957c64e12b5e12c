"""Runs under the strategies that shard the base, on CPUs, against one process on the same global batches."""

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from halfbyte import recipe as recipes
from halfbyte.run import main
from tests import launch, tiny
from tests.distributed import optimizers

GLOBAL_BATCH = 6
ROWS = {
    "sft": tiny.conversations,
    "dpo": tiny.preferences,
    "kto": tiny.labelled,
    "reward": tiny.preferences,
}
# What shows, without a reference model, that reloaded weights are those that were evaluated.
EVALUATED = {"sft": ["eval_loss"], "dpo": ["eval_logps/chosen", "eval_logps/rejected"]}
TRAINERS: dict[str, tuple[type, type]] = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


# One step of plain descent with a learning rate of one moves every adapter by its gradient.
ONE_DESCENT: dict[str, Any] = {
    "eval_strategy": "no",
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 1,
}


@dataclass(frozen=True)
class Finished:
    """What a finished run left in its directory."""

    output: Path
    rows: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.output / "run.json").read_text())

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "adapter_model.safetensors")

    def logged(self, key: str = "loss") -> list[float]:
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [row[key] for row in rows if key in row]


def start(
    strategy: str,
    processes: int,
    *words: str,
    shim: bool = True,
    module: str | None = None,
    executed: bool = False,
    **extra: str,
) -> subprocess.CompletedProcess[str]:
    """``accelerate launch --config_file launch/STRATEGY.yaml ... WORDS`` with CPU ranks, sharded by the shim.

    Another ``module`` than halfbyte installs the shim itself.
    """
    if module is None:
        module = "tests.distributed.gloo_as_gpu" if strategy in ("fsdp2", "zero3") and shim else "halfbyte"
    if strategy == "fsdp2" and shim:
        extra = {**extra, "ACCELERATE_TORCH_DEVICE": "cpu"}
    paths = [str(launch.ROOT), os.environ.get("PYTHONPATH", ""), extra.pop("PYTHONPATH", "")]
    extra["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return launch.accelerate(
        *words,
        processes=processes,
        config=strategy,
        module=module,
        cwd=launch.ROOT,
        executed=executed,
        **extra,
    )


def train(
    root: Path, recipe: str, strategy: str, processes: int, options: Mapping[str, Any], **extra: str
) -> Finished:
    """Six float32 steps of ``recipe`` in ``root``; ``options`` are added to the configuration."""
    if strategy == "zero3" and processes > 1 and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed, which `make test-distributed` installs")
    kind = recipe.removeprefix("sharded-")
    rows = root / "rows"
    output = root / "run"
    config = {
        "dataset_name": tiny.write_rows(rows, ROWS[kind](40)),
        "output_dir": str(output),
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "learning_rate": 1e-3,
        "dtype": "float32",
        "use_cpu": True,  # deliberate: ranks without a GPU are accepted
        "max_steps": 6,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        **options,
    }
    lines = [f"{key}: {value}" for key, value in config.items() if value is not None]
    (root / "run.yaml").write_text("\n".join(lines) + "\n")
    words = (recipe, "--config", str(root / "run.yaml"))
    if processes == 1:
        here = optimizers.sft if recipe == "sharded-sft" else recipes.load(recipe)
        assert main(recipe, here, list(words[1:])) == 0
        return Finished(output, rows)
    done = start(strategy, processes, *words, **extra)
    assert done.returncode == 0, done.stderr[-6000:]
    return Finished(output, rows)


def resumed(root: Path, run: Finished, step: int) -> dict[str, Any]:
    """The options that continue from a copy of ``run``'s checkpoint at ``step``, made in ``root``."""
    copy = root / f"checkpoint-{step}"
    shutil.copytree(run.output / copy.name, copy)
    return {"allow_config_change": ["dataset_name"], "resume_from_checkpoint": str(copy)}


def assert_equal(one: Finished, other: Finished, within: float = 1e-5) -> None:
    """Both took the same steps and ended with the same adapter."""
    for key in ("loss", "eval_loss"):
        assert len(one.logged(key)) == len(other.logged(key)) > 0
        assert max(abs(a - b) for a, b in zip(one.logged(key), other.logged(key), strict=True)) <= within, key
    assert furthest(one.adapter, other.adapter) <= within


def assert_resumed(whole: Finished, resumed: Finished) -> None:
    """The second resumed from the first's step 3 and ended bit for bit as it did."""
    assert furthest(whole.adapter, resumed.adapter) == 0.0
    assert whole.logged()[3:] == resumed.logged()


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def evaluate(recipe: str, run: Finished, scratch: Path) -> dict[str, float]:
    """Load the saved adapter in one process and evaluate it on the run's held-out rows."""
    trainer_cls, config = TRAINERS[recipe]
    rows = load_dataset(
        "json", data_files=str(run.rows / "test.jsonl"), split="train", cache_dir=str(scratch)
    )
    args = config(output_dir=str(scratch), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    plugin = QLoRAPlugin(adapter_name_or_path=str(run.output), dtype="float32")
    trainer = plugin.trainer(trainer_cls, args=args, train_dataset=rows, eval_dataset=rows)
    metrics = trainer.evaluate()
    return {key: metrics[key] for key in EVALUATED[recipe]}


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory, model_dir: Any) -> Callable[[str], Finished]:
    """``one_process("dpo on sft")``: the run that every strategy is compared with, made once."""
    made: dict[str, Finished] = {}

    def get(cell: str) -> Finished:
        if cell not in made:
            root = tmp_path_factory.mktemp(cell.replace(" ", "-"))
            made[cell] = train(root, cell[:3], "", 1, beginning(cell, model_dir, get))
        return made[cell]

    return get


def beginning(cell: str, model_dir: Any, one_process: Callable[[str], Finished]) -> dict[str, str]:
    """What the run of ``cell`` starts from: the base, or the adapter of the SFT run."""
    if cell == "dpo on sft":
        return {"adapter_name_or_path": str(one_process("sft").output)}
    return {"model_name_or_path": str(model_dir("llama"))}
