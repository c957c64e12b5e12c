"""The Python API: QLoRAPlugin under any TRL trainer, and under an Accelerator loop of one's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from halfbyte import QLoRAPlugin
from halfbyte.errors import UserError
from tests import launch, tiny
from tests.distributed import loop

ModelDir = Callable[..., Path]


def options(directory: Path, **changed: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **changed,
    }


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def labelled(rows: int) -> list[dict[str, Any]]:
    return [
        {"prompt": tiny.text(n), "completion": " " + tiny.text(n + 1), "label": n % 2 == 0}
        for n in range(rows)
    ]


TRAINERS = {
    "SFT": tiny.conversations,
    "DPO": tiny.preferences,
    "Reward": tiny.preferences,
    "KTO": labelled,
}


@pytest.mark.parametrize("name", TRAINERS)
def test_any_trl_trainer_trains_the_adapters_alone(model_dir: ModelDir, tmp_path: Path, name: str) -> None:
    config, trainer_cls = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    qlora = QLoRAPlugin(
        lora_r=4, dtype="float32", lora_task_type="SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    )
    trainer = qlora.trainer(
        trainer_cls,
        model=str(model_dir("llama")),
        args=config(**options(tmp_path)),
        train_dataset=Dataset.from_list(TRAINERS[name](8)),
    )
    assert isinstance(trainer, trainer_cls)
    base, start = frozen(trainer.model), trained(trainer.model)
    assert {weight.dtype for weight in start.values()} == {torch.float32}
    trainer.train()
    assert trainer.state.global_step == 2
    end = trained(trainer.model)
    still = [n for n in start if "lora_B" in n and torch.equal(start[n], end[n])]
    assert not still, f"these did not train: {still}"
    if name == "Reward":
        assert any("score" in n and not torch.equal(start[n], end[n]) for n in start)
    assert {weight.dtype for weight in end.values()} == {torch.float32}
    assert all(torch.equal(weight, base[n]) for n, weight in frozen(trainer.model).items())
    assert trainer.report.coverage.four_bit_share == 1.0


def test_the_seed_decides_where_a_fresh_adapter_starts(model_dir: ModelDir, tmp_path: Path) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        trainer = QLoRAPlugin(dtype="float32").trainer(
            trl.SFTTrainer,
            model=str(model_dir("llama")),
            args=trl.SFTConfig(**options(tmp_path, seed=seed)),
            train_dataset=Dataset.from_list(tiny.texts(8)),
        )
        return trained(trainer.model)

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_loop_of_one_s_own(model_dir: ModelDir) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    qlora = QLoRAPlugin(lora_r=4, dtype="float32")
    model = qlora.load(str(model_dir("llama")))
    base, start = frozen(model), trained(model)
    assert {weight.dtype for weight in start.values()} == {torch.float32}
    optimizer = qlora.optimizer(model, lr=1e-2)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    loader = DataLoader(loop.rows(str(model_dir("llama")), 4), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = loop.steps(accelerator, model, optimizer, loader, 3)
    assert losses[0] > losses[1] > losses[2]
    end = trained(model)
    assert all(not torch.equal(start[name], end[name]) for name in start if "lora_B" in name)
    assert {weight.dtype for weight in end.values()} == {torch.float32}
    assert all(torch.equal(weight, base[name]) for name, weight in frozen(model).items())


def test_a_loaded_model_is_refused_in_one_sentence(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(dtype="float32")
    model = plugin.load(str(model_dir("llama")))
    with pytest.raises(UserError, match=r"model: PeftModelForCausalLM is a loaded model; give a name"):
        plugin.trainer(trl.SFTTrainer, model=model, args=trl.SFTConfig(**options(tmp_path)))


def test_two_processes_do_what_one_does(model_dir: ModelDir, tmp_path: Path) -> None:
    """The loop and a TRL trainer, on one process here and on two under ``accelerate launch``."""
    arguments = (str(model_dir("llama")), str(tmp_path))
    done = launch.accelerate(*arguments, module="tests.distributed.loop", cwd=launch.ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    alone = loop.run(str(model_dir("llama")), str(tmp_path), processes=1)
    assert first["loop"] == pytest.approx(alone["loop"], abs=1e-5)
    assert first["trainer"] == pytest.approx(alone["trainer"], abs=1e-5)
    assert first["world_size"] == 2
