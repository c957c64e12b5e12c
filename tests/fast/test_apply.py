"""What the fast step is applied to, what it says it did, and what turns it off."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin, fast
from halfbyte.errors import UserError
from halfbyte.fast.linear import FusedLinear4bit
from tests import tiny
from tests.fast.test_parity import arguments

ModelDir = Callable[..., Path]


def build(
    model: Path, output: Path, *, plugin: QLoRAPlugin | None = None, **options
) -> tuple[SFTTrainer, fast.Path]:
    plugin = plugin or QLoRAPlugin(dtype="float32")
    rows = Dataset.from_list(tiny.texts(8))
    args = arguments(output, **options)
    return plugin.trainer(SFTTrainer, model=str(model), args=args, train_dataset=rows), plugin.fast_path


def fused(model: torch.nn.Module) -> int:
    return sum(isinstance(module, FusedLinear4bit) for module in model.modules())


def test_auto_says_what_runs(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer, path = build(model_dir("llama"), tmp_path)
    assert fused(trainer.model) == 14
    found = path.as_dict()
    assert found["mode"] == "auto"
    assert found["layers"] == 2
    assert found["head"] == found["batches"] == "on"
    assert "head in tiles" in path.line()
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1
    assert "attention_mask" not in batch
    padded = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    assert padded["attention_mask"].shape[0] == 8


def test_none_is_plain_trl(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer, path = build(model_dir("llama"), tmp_path, plugin=QLoRAPlugin(dtype="float32", fast="none"))
    assert fused(trainer.model) == 0
    assert trainer.model.config._attn_implementation == "sdpa"
    assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 3
    assert path.as_dict() == {"mode": "none", "reason": "as given"}


@pytest.mark.parametrize(("option", "value"), [("torch_compile", True), ("use_liger_kernel", True)])
def test_what_fuses_for_itself_sets_none(option: str, value: bool, tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert fast.refusal(args) is None
    setattr(args, option, value)
    assert option in (fast.refusal(args) or "")


def test_another_word_is_refused() -> None:
    with pytest.raises(UserError, match="write `auto` or `none`"):
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
    _, path = build(model_dir("llama"), tmp_path, plugin=plugin, **options)
    assert path.level == level
    json.dumps(path.as_dict())


def test_a_budget_that_is_no_size_is_refused() -> None:
    with pytest.raises(UserError, match="memory_budget"):
        QLoRAPlugin(memory_budget="lots")


def test_dora_is_named_and_trains(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer, path = build(model_dir("llama"), tmp_path, plugin=QLoRAPlugin(dtype="float32", use_dora=True))
    assert path.plain == {"default is Dora": 14}
    trainer.train()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


def test_padding_that_is_asked_for_stays(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer, path = build(model_dir("llama"), tmp_path, pad_to_multiple_of=16)
    assert "pad_to_multiple_of" in (path.batches or "")
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] % 16 == 0
    trainer.train()


def test_eager_attention_keeps_padding(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(dtype="float32", attn_implementation="eager")
    _, path = build(model_dir("llama"), tmp_path, plugin=plugin)
    assert "eager" in (path.batches or "")


def test_trained_added_tokens_keep_trls_head_and_autocast(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(dtype="bfloat16", additional_special_tokens=["<tool>"])
    trainer, path = build(model_dir("llama"), tmp_path, plugin=plugin, bf16=True)
    assert (path.autocast or "").startswith("kept")
    trainer.train()


def test_a_full_run_saves_a_model_anyone_can_load(model_dir: ModelDir, tmp_path: Path) -> None:
    plugin = QLoRAPlugin(load_in_4bit=False, use_peft=False)
    trainer, path = build(model_dir("llama"), tmp_path, plugin=plugin)
    assert path.head == "the output head is trained"
    assert path.batches == "on"
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    config = (tmp_path / "final" / "config.json").read_text(encoding="utf-8")
    assert "sdpa_by_document" not in config
    assert json.loads(config)["model_type"] == "llama"


def test_other_trainers_get_linears_only(model_dir: ModelDir, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"chosen": tiny.text(n), "rejected": tiny.text(n + 1)} for n in range(6)])
    plugin = QLoRAPlugin(dtype="float32", lora_task_type="SEQ_CLS")
    args = arguments(tmp_path, RewardConfig)
    trainer = plugin.trainer(RewardTrainer, model=str(model_dir("llama")), args=args, train_dataset=rows)
    assert fused(trainer.model) == 14
    assert plugin.fast_path.head is None
    trainer.train()


def test_the_adapter_saves_and_loads_as_pefts(model_dir: ModelDir, tmp_path: Path) -> None:
    from peft import PeftModel

    trainer, _ = build(model_dir("llama"), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    plain = QLoRAPlugin(dtype="float32", fast="none")._load_base(
        str(model_dir("llama")), "main", torch.device("cpu"), False, {}
    )
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "final")).eval()
    ids = torch.arange(4, 24)[None]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(trainer.model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
        generated = trainer.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
