"""The fast step equals plain TRL in float32, for every architecture, dropout, batch shape and mask."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin, fast, resolve
from halfbyte.fast import layer
from tests import plain_trl, tiny
from tests.plain_trl import Steps, assert_equal

ARCHITECTURES = ["llama", "opt", "qwen3", "gemma"]
Gradients = dict[str, torch.Tensor]


def arguments(output: Path, cls: type = SFTConfig, **options):
    options = {"max_steps": 2, "gradient_checkpointing_kwargs": {"use_reentrant": False}, **options}
    return plain_trl.arguments(cls, output, **options)


def plain(base: Path, dropout: float, dtype: torch.dtype = torch.float32) -> PeftModel:
    """PEFT on bitsandbytes, with an adapter whose B is not zero and whose values bfloat16 holds."""
    model = plain_trl.base(base, dtype)
    torch.manual_seed(0)
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
            parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def adapter(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    saved: dict[tuple[str, float], Path] = {}

    def get(arch: str, dropout: float) -> Path:
        if (arch, dropout) not in saved:
            path = saved[arch, dropout] = tmp_path_factory.mktemp(arch)
            plain(model_dir(arch), dropout).save_pretrained(path)
        return saved[arch, dropout]

    return get


def run_trl(
    base: Path,
    args,
    rows: Dataset,
    *,
    dropout: float = 0.0,
    cls: type = SFTTrainer,
    whole_adapter: bool = False,
) -> Steps:
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = plain(base, dropout, dtype)
    trainer = cls(
        model=model, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(base)
    )
    if whole_adapter or not args.bf16:
        plain_trl.keep_adapter_in_float32(trainer)
    return Steps.of(trainer)


def run_ours(
    base: Path, adapter: Path, args, rows: Dataset, *, cls: type = SFTTrainer, **options
) -> tuple[Steps, fast.FusionReport]:
    dtype = "bfloat16" if args.bf16 else "float32"
    plugin = QLoRAPlugin(dtype=dtype, adapter_name_or_path=str(adapter), **options)
    trainer = plugin.trainer(cls, model=str(base), args=args, train_dataset=rows)
    return Steps.of(trainer), trainer.report.fusion


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padding_and_label_masks(arch: str, model_dir, adapter, tmp_path: Path) -> None:
    # Conversations of several lengths with assistant-only labels: padded by TRL, not by us.
    rows = Dataset.from_list(tiny.conversations(12))
    options = {"assistant_only_loss": True}
    theirs = run_trl(model_dir(arch), arguments(tmp_path, **options), rows)
    ours, report = run_ours(model_dir(arch), adapter(arch, 0.0), arguments(tmp_path, **options), rows)
    assert_equal(ours, theirs)
    assert report.as_dict()["batches"] == report.as_dict()["head"] == "on"
    assert all(step.count_nonzero() > 0.99 * step.numel() for step in ours.gradients)


@pytest.mark.parametrize(
    "arch", ["llama", "gemma", *(pytest.param(arch, marks=pytest.mark.faults) for arch in ("opt", "qwen3"))]
)
def test_dropout_draws_the_same_masks(arch: str, model_dir, adapter, tmp_path: Path) -> None:
    # Rows of one length: a padded batch and a padding-free row then draw the same numbers.
    rows = Dataset.from_list([{"text": tiny.text(5 * n)} for n in range(12)])
    options = {"max_length": 6}
    theirs = run_trl(model_dir(arch), arguments(tmp_path, **options), rows, dropout=0.1)
    ours, _ = run_ours(model_dir(arch), adapter(arch, 0.1), arguments(tmp_path, **options), rows)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_packing(arch: str, dropout: float, model_dir, adapter, tmp_path: Path) -> None:
    rows = Dataset.from_list(tiny.conversations(40))
    options = {"packing": True, "max_length": 64, "assistant_only_loss": True}
    theirs = run_trl(model_dir(arch), arguments(tmp_path, **options), rows, dropout=dropout)
    ours, _ = run_ours(model_dir(arch), adapter(arch, dropout), arguments(tmp_path, **options), rows)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("arch", ["granite", "llama", "opt"])
def test_preferences_on_trees(arch: str, model_dir, adapter, tmp_path: Path) -> None:
    rows = Dataset.from_list(tiny.preferences(12))
    ours, report = run_ours(
        model_dir(arch), adapter(arch, 0.1), arguments(tmp_path, DPOConfig), rows, cls=DPOTrainer
    )
    theirs, _ = run_ours(
        model_dir(arch), adapter(arch, 0.1), arguments(tmp_path, DPOConfig), rows, cls=DPOTrainer, fast="none"
    )
    assert_equal(ours, theirs)
    assert (report.head, report.batches, report.trees) == ("on", "on", True)


@pytest.mark.parametrize(("bf16", "within"), [(False, 1e-4), (True, 1e-2)])
def test_thirty_steps_without_checkpointing(
    bf16: bool, within: float, model_dir, adapter, tmp_path: Path
) -> None:
    rows = Dataset.from_list(tiny.texts(60))
    options = {
        "gradient_checkpointing": False,
        "max_steps": 30,
        "gradient_accumulation_steps": 1,
        "bf16": bf16,
    }
    # In bfloat16 too with a float32 adapter: TRL's rounding of it moves a loss by 0.0092, all else by 0.0008.
    theirs = run_trl(model_dir("llama"), arguments(tmp_path, **options), rows, whole_adapter=True)
    ours, _ = run_ours(model_dir("llama"), adapter("llama", 0.0), arguments(tmp_path, **options), rows)
    assert len(ours.losses) == 30
    assert theirs.losses[0] - theirs.losses[-1] > 5 * within  # they have something to agree on
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        assert abs(a - b) <= within


def test_every_save_level(model_dir, adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced as a resume forces it, and as ``memory_budget: auto`` chooses."""
    rows = Dataset.from_list([{"text": tiny.text(5 * n)} for n in range(12)])
    base, options = model_dir("llama"), {"max_length": 6}
    theirs = run_trl(base, arguments(tmp_path, **options), rows, dropout=0.1)
    decide = resolve.for_arguments
    for level in (None, *layer.LEVELS):
        monkeypatch.setattr(resolve, "for_arguments", lambda *a, n=level: replace(decide(*a), save_level=n))
        ours, report = run_ours(base, adapter("llama", 0.1), arguments(tmp_path, **options), rows)
        assert report.level == (3 if level is None else level)
        assert_equal(ours, theirs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16_gradients_are_as_good_as_trls(arch: str, model_dir, adapter, tmp_path: Path) -> None:
    rows = Dataset.from_list(tiny.conversations(12))
    options = {"max_steps": 1}
    exact = run_trl(model_dir(arch), arguments(tmp_path, **options), rows).gradients[0]
    theirs = run_trl(model_dir(arch), arguments(tmp_path, bf16=True, **options), rows).gradients[0]
    ours, report = run_ours(
        model_dir(arch), adapter(arch, 0.0), arguments(tmp_path, bf16=True, **options), rows
    )
    assert report.autocast == "off: all in torch.bfloat16"
    assert (ours.gradients[0] - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_metrics_are_trls(model_dir, adapter, tmp_path: Path) -> None:
    rows = Dataset.from_list(tiny.conversations(12))
    logged = []
    for choice in ("auto", "none"):
        plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter("llama", 0.0)), fast=choice)
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
        trainer = plugin.trainer(
            SFTTrainer, model=str(model_dir("llama")), args=args, train_dataset=rows, eval_dataset=rows
        )
        trainer.train()
        logged.append(trainer.state.log_history)
    for a, b in zip(*logged, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.endswith(("runtime", "per_second", "flos")):
                assert a[key] == pytest.approx(b[key], abs=2e-5, rel=1e-5), key
