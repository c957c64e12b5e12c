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
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from halfbyte import QLoRAPlugin
from halfbyte.errors import UserError
from tests import launch, plain_trl, tiny
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
    qlora = QLoRAPlugin(lora_r=4, dtype="float32")
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


def test_a_trainer_over_a_model_that_load_made(model_dir: ModelDir, tmp_path: Path) -> None:
    """It trains as if the trainer had loaded it: the same adapter, the same step, the same fusion."""
    base, rows = str(model_dir("llama")), Dataset.from_list(tiny.conversations(8))

    def ended(given: Any, plugin: QLoRAPlugin, **changed: Any) -> tuple[dict[str, torch.Tensor], str]:
        args = trl.SFTConfig(**options(tmp_path, **changed))
        trainer = plugin.trainer(trl.SFTTrainer, model=given, args=args, train_dataset=rows)
        trainer.train()
        return trained(trainer.model), trainer.report.fusion.line()

    plugin = QLoRAPlugin(lora_r=4, dtype="float32")
    changed = {"gradient_checkpointing": False}  # load() turned it on
    torch.manual_seed(42)  # the seed of the arguments
    one, line = ended(plugin.load(base), plugin, **changed)
    other, same = ended(base, plugin, **changed)
    assert line == same
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_model_that_load_did_not_make_is_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    base, plugin = str(model_dir("llama")), QLoRAPlugin(dtype="float32")
    args, rows = trl.SFTConfig(**options(tmp_path)), Dataset.from_list(tiny.texts(4))
    strange = AutoModelForCausalLM.from_pretrained(base)
    others = QLoRAPlugin(dtype="float32", lora_r=4).load(base)
    used = plugin.load(base)
    plugin.trainer(trl.SFTTrainer, model=used, args=args, train_dataset=rows)
    for model in (strange, others, used, 3):
        with pytest.raises(
            UserError, match=r"^model: \w+ is not a model that this plugin loaded; give a name"
        ):
            plugin.trainer(trl.SFTTrainer, model=model, args=args, train_dataset=rows)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(
        UserError, match=r"model: it was loaded without rows .*plugin.load\(..., tokenizer=tokenizer"
    ):
        plugin.trainer(
            trl.SFTTrainer, model=plugin.load(base), args=args, train_dataset=rows, processing_class=tokenizer
        )


def test_the_trainer_of_transformers_itself(model_dir: ModelDir, tmp_path: Path) -> None:
    """Its training arguments lack fields that TRL's have."""
    rows = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [5, 6, 7, 8]}] * 8
    arguments = {"model": str(model_dir("llama")), "args": TrainingArguments(**options(tmp_path))}
    plugin = QLoRAPlugin(lora_r=4, dtype="float32")
    trainer = plugin.trainer(
        Trainer, **arguments, train_dataset=Dataset.from_list(rows), data_collator=default_data_collator
    )
    start = trained(trainer.model)
    trainer.train()
    assert all(
        not torch.equal(start[name], end) for name, end in trained(trainer.model).items() if "lora_B" in name
    )
    again = plugin.trainer(trl.SFTTrainer, **arguments, train_dataset=Dataset.from_list(tiny.texts(8)))
    again.train()
    assert again.state.global_step == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peft_config": LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj"], use_dora=True)},
         r"peft_config: .*`QLoRAPlugin\(lora_r=4, lora_alpha=9, lora_target_modules=\['q_proj'\], use_dora=True\)`"),
        ({"quantization_config": {}}, "quantization_config: the plugin quantizes the base; write `load_in_4bit`"),
        ({"ref_model": "x"}, "ref_model: the reference is the base without its adapter"),
        ({"tokenizer": 3}, "tokenizer: trainers call it `processing_class`"),
        ({"model_init": lambda: None}, "model_init: the plugin loads the model; write `model`"),
        ({"args": None}, "args: NoneType are no training arguments; write the config of the trainer"),
        ({"args": {}}, "args: dict are no training arguments"),
    ],
)  # fmt: skip
def test_arguments_that_would_undo_the_plugin_are_answered(tmp_path: Path, given: dict, message: str) -> None:
    arguments = {"model": "a-model", "args": trl.SFTConfig(**options(tmp_path)), **given}
    with pytest.raises(UserError, match=message):
        QLoRAPlugin().trainer(trl.SFTTrainer, **arguments)


def test_a_merge_is_made_on_the_dequantized_base(model_dir: ModelDir, tmp_path: Path) -> None:
    """As plugin/README says; on the base in four bits it is inexact, and upstream cannot save it."""
    base = str(model_dir("llama"))
    model = QLoRAPlugin(dtype="float32").load(base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(8)[None]
    trained = model.eval()(ids).logits
    with pytest.raises(NotImplementedError):
        model.merge_and_unload().save_pretrained(tmp_path / "broken")
    whole = AutoModelForCausalLM.from_pretrained(base, quantization_config=plain_trl.nf4()).dequantize()
    PeftModel.from_pretrained(whole, tmp_path / "adapter").merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, trained, atol=1e-5)


@pytest.mark.distributed
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
