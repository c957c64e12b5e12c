"""What is fused, what the fusion report says, and what turns the fast step off."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from halfbyte import QLoRAPlugin, fast, loading, resolve
from halfbyte.errors import UserError
from halfbyte.fast import varlen
from halfbyte.fast.linear import FusedLinear4bit
from tests import tiny
from tests.fast import models
from tests.fast.test_parity import arguments

ModelDir = Callable[..., Path]


def build(
    model: Path, output: Path, *, plugin: QLoRAPlugin | None = None, **options
) -> tuple[SFTTrainer, fast.FusionReport]:
    plugin = plugin or QLoRAPlugin(dtype="float32")
    rows = Dataset.from_list(tiny.texts(8))
    args = arguments(output, **options)
    trainer = plugin.trainer(SFTTrainer, model=str(model), args=args, train_dataset=rows)
    return trainer, trainer.report.fusion


def fused(model: torch.nn.Module) -> int:
    return sum(isinstance(module, FusedLinear4bit) for module in model.modules())


def test_the_report_says_what_is_fused(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer, report = build(model_dir("llama"), tmp_path)
    assert fused(trainer.model) == 14
    found = report.as_dict()
    assert found["mode"] == "auto"
    assert found["layers"] == 2
    assert found["head"] == found["batches"] == "on"
    assert report.line() == (
        "fast: 2 layers fused (save level 3), 14 linears fused, chunked LM head, padding-free"
    )
    assert "get_train_dataloader" not in vars(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1
    assert "attention_mask" not in batch
    padded = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    assert padded["attention_mask"].shape[0] == 8


def test_none_is_plain_trl(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer, report = build(model_dir("llama"), tmp_path, plugin=QLoRAPlugin(dtype="float32", fast="none"))
    assert fused(trainer.model) == 0
    assert trainer.model.config._attn_implementation == "sdpa"
    assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 3
    assert report.as_dict() == {"mode": "none", "reason": "as given"}


@pytest.mark.parametrize(("option", "value"), [("torch_compile", True), ("use_liger_kernel", True)])
def test_what_fuses_for_itself_sets_none(option: str, value: bool, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert fast.refusal(args) is None
    setattr(args, option, value)
    assert option in (fast.refusal(args) or "")


def test_another_word_is_refused() -> None:
    with pytest.raises(UserError, match="write one of auto, none"):
        QLoRAPlugin(fast="off")


def test_a_loop_of_ones_own_gets_fused_linears(model_dir: ModelDir) -> None:
    model = QLoRAPlugin(dtype="float32").load(str(model_dir("opt")))
    assert fused(model) == 12
    assert fused(QLoRAPlugin(dtype="float32", fast="none").load(str(model_dir("opt")))) == 0


@pytest.mark.parametrize(
    ("options", "plugin", "level"),
    [
        ({"gradient_checkpointing": False}, {}, 3),
        ({}, {"memory_budget": "min"}, 0),
        ({}, {"memory_budget": "100GiB"}, 3),
    ],
)
def test_the_budget_sets_the_save_level(
    model_dir, tmp_path: Path, options: dict, plugin: dict, level: int
) -> None:
    plugin = QLoRAPlugin(dtype="float32", **plugin)
    _, report = build(model_dir("llama"), tmp_path, plugin=plugin, **options)
    assert report.level == level
    json.dumps(report.as_dict())


def test_a_budget_that_is_no_size_is_refused() -> None:
    with pytest.raises(UserError, match="memory_budget") as error:
        QLoRAPlugin(memory_budget="lots")
    assert error.value.option == "memory_budget"


def test_dora_is_named_and_trains(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer, report = build(model_dir("llama"), tmp_path, plugin=QLoRAPlugin(dtype="float32", use_dora=True))
    assert report.plain == {"default is Dora": 14}
    trainer.train()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


def test_requested_padding_stays(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer, report = build(model_dir("llama"), tmp_path, pad_to_multiple_of=16)
    assert "pad_to_multiple_of" in (report.batches or "")
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] % 16 == 0
    trainer.train()


def test_eager_attention_keeps_padding(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(dtype="float32", attn_implementation="eager")
    _, report = build(model_dir("llama"), tmp_path, plugin=plugin)
    assert "eager" in (report.batches or "")


def test_trained_added_tokens_keep_trls_head_and_autocast(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(dtype="bfloat16", additional_special_tokens=["<tool>"])
    trainer, report = build(model_dir("llama"), tmp_path, plugin=plugin, bf16=True)
    assert (report.autocast or "").startswith("kept")
    trainer.train()


def test_a_full_run_saves_a_model_anyone_can_load(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(load_in_4bit=False, use_peft=False)
    trainer, report = build(model_dir("llama"), tmp_path, plugin=plugin)
    assert report.head == "the output head is trained"
    assert report.batches == "on"
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    config = (tmp_path / "final" / "config.json").read_text(encoding="utf-8")
    assert varlen.IMPLEMENTATION not in config
    assert json.loads(config)["model_type"] == "llama"


def test_other_trainers_get_linears_only(model_dir: ModelDir, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"chosen": tiny.text(n), "rejected": tiny.text(n + 1)} for n in range(6)])
    plugin = QLoRAPlugin(dtype="float32", lora_task_type="SEQ_CLS")
    args = arguments(tmp_path, RewardConfig)
    trainer = plugin.trainer(RewardTrainer, model=str(model_dir("llama")), args=args, train_dataset=rows)
    assert fused(trainer.model) == 14
    assert trainer.report.fusion.head is None
    assert not trainer.unpads_batches
    trainer.train()


def test_the_adapter_saves_and_loads_as_pefts(model_dir: ModelDir, tmp_path: Path) -> None:
    from peft import PeftModel

    trainer, _ = build(model_dir("llama"), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    plugin = QLoRAPlugin(dtype="float32", fast="none")
    plain, _ = loading._load_base(plugin, resolve.for_loop(plugin, str(model_dir("llama"))), False, {})
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "final")).eval()
    ids = torch.arange(4, 24)[None]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(trainer.model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
        generated = trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


class OwnStep(DPOTrainer):
    """A trainer whose loss reads padded batches of its own."""

    def _compute_loss(self, model, inputs, return_outputs):
        raise NotImplementedError


@pytest.mark.parametrize("cls", [SFTTrainer, type("OwnSFT", (SFTTrainer,), {})])
def test_sft_has_all_parts(cls: type) -> None:
    assert fast.scope(cls) == fast.Scope(frozenset({"linears", "layers", "head", "padding_free"}), sides=1)


@pytest.mark.parametrize("cls", [DPOTrainer, type("OwnDPO", (DPOTrainer,), {})])
def test_dpo_has_all_parts(cls: type) -> None:
    assert fast.scope(cls) == fast.Scope(frozenset({"linears", "layers", "head", "padding_free"}), sides=2)


@pytest.mark.parametrize("cls", [OwnStep, RewardTrainer, Trainer])
def test_other_trainers_have_the_models_parts(cls: type) -> None:
    assert fast.scope(cls) == fast.Scope(frozenset({"linears", "layers"}), sides=2)


@pytest.mark.parametrize("parts", [set(), {"linears"}, {"layers"}, {"head"}, {"linears", "layers"}])
def test_a_scope_limits_what_is_fused(parts: set[str]) -> None:
    model = models.make("llama")
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    report = fast.fuse(model, scope=fast.Scope(frozenset(parts)))
    assert (report.linears, fused(model)) == ((14, 14) if "linears" in parts else (0, 0))
    assert report.layers == (2 if "layers" in parts else 0)
    assert report.head == ("on" if "head" in parts else None)
    assert report.batches is None


def test_a_report_is_immutable() -> None:
    with pytest.raises(AttributeError):
        fast.FusionReport().layers = 3


def test_importing_registers_nothing() -> None:
    code = (
        "import halfbyte.fast, transformers as t; from halfbyte.fast import varlen as b\n"
        "assert b.IMPLEMENTATION not in t.AttentionInterface().valid_keys()\n"
        "assert b.IMPLEMENTATION not in t.AttentionMaskInterface().valid_keys()\n"
        "b.register(); b.register()\n"
        "assert t.AttentionInterface()[b.IMPLEMENTATION] is b.attention\n"
        "assert t.AttentionMaskInterface()[b.IMPLEMENTATION] is b.mask"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_models_forward_keeps_its_signature(model_dir: ModelDir, tmp_path: Path) -> None:
    """`generate` and the Trainer read it."""
    trainer, _ = build(model_dir("llama"), tmp_path)
    base = trainer.model.get_base_model()
    assert inspect.signature(base.forward) == inspect.signature(MethodType(type(base).forward, base))
