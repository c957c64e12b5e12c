"""`halfbyte merge` and `quantize` on a base with experts: what plain transformers then computes is what was trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.export.deltas import Deltas
from halfbyte.fast import experts as fused
from tests import experts, tiny
from tests.checkpoint.runs import options, read_rows

ModelDir = Callable[..., Path]
IDS = torch.arange(4, 36).view(2, 16)
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
GIVEN = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "learning_rate": "2e-2",
    "max_steps": "2",
    "lora_dropout": "0",
}


@pytest.fixture(scope="module")
def run(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    rows = tiny.write_rows(root / "rows", tiny.conversations(12))
    words = options(model_dir("qwen3_moe"), rows, root / "run", **GIVEN)
    assert main(["sft", *words, "--lora_target_parameters", *STACKS]) == 0
    return root / "run"


@torch.no_grad()
def test_a_merge_computes_what_was_trained(run: Path, model_dir: ModelDir, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    words = ["merge", str(run), "--output_dir", str(output), "--dtype", "float32", "--measure", "none"]
    assert main(words) == 0
    trained = PeftModel.from_pretrained(experts.load(model_dir("qwen3_moe")), str(run)).eval()
    fused.require(trained)
    expected = trained(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    assert (merged(IDS).logits - expected).norm() <= 1e-5 * expected.norm()
    with trained.disable_adapter():
        assert (trained(IDS).logits - expected).norm() > 1e-2 * expected.norm()
    with safe_open(output / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names, "as such models are published"


@pytest.mark.parametrize("targets", [STACKS, STACKS[:1], STACKS[1:]])
def test_an_update_is_that_of_peft_on_the_whole_model(
    model_dir: ModelDir, tmp_path: Path, targets: list[str]
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(model_dir("qwen3_moe"), dtype=torch.float32)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    shapes = {name: value.shape for name, value in before.items() if value.dim() == 3}
    model = get_peft_model(dense, LoraConfig(r=3, target_modules=["q_proj"], target_parameters=targets))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
    model.save_pretrained(tmp_path)
    whole = model.merge_and_unload().state_dict()
    deltas = Deltas([tmp_path], stacks=shapes)
    for name, shape in shapes.items():
        assert deltas.of(name) == any(name.endswith(target) for target in targets)
        found = deltas.apply(name, before[name], dense.get_submodule(name.rpartition(".")[0]))
        assert found.shape == shape
        torch.testing.assert_close(found, whole[name], rtol=1e-6, atol=1e-7)
    assert not any("experts" in name for name in deltas.unused)


def test_experts_are_added_up_and_not_combined_otherwise(run: Path) -> None:
    with pytest.raises(UserError, match="adapters on experts are added up; write `cat`"):
        Deltas([run, run], [0.5, 0.5], "svd")


def test_a_base_that_was_quantized_beforehand_trains(model_dir: ModelDir, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert (
        main(["quantize", str(model_dir("qwen3_moe")), "--output_dir", str(packed), "--dtype", "float32"])
        == 0
    )
    found, expected = experts.load(packed).state_dict(), experts.load(model_dir("qwen3_moe")).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("family", ["granitemoehybrid"])
def test_rows_of_a_run_without_a_router_s_loss_are_read(tmp_path: Path, family: str, capsys) -> None:
    """TRL can compute none for it, which the run said; reading its rows trains nothing."""
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    given = {**GIVEN, "eval_strategy": "steps", "eval_steps": "2", "router_aux_loss_coef": "0"}
    assert (
        main(
            ["sft", *options(Path(experts.save(tmp_path / "base", family)), rows, tmp_path / "run", **given)]
        )
        == 0
    )
    merge = ["merge", str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"]
    assert main(merge) == 0
    printed = capsys.readouterr()
    assert "cannot be read" not in printed.err
    assert "measured on rows, split test" in printed.out + printed.err


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_run_on_a_packed_base_computes_as_it_says_and_is_merged_for_plain_transformers(
    model_dir: ModelDir, tmp_path: Path, name: str
) -> None:
    """Packed in bfloat16 and trained in float32: nothing is rounded to bfloat16 on the way, fused or not."""
    packed = tmp_path / "packed"
    words = ["quantize", str(model_dir(name)), "--output_dir", str(packed), "--dtype", "bfloat16"]
    assert main(words) == 0
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    losses = []
    for fast in ("none", "auto"):
        words = options(packed, rows, tmp_path / fast, **GIVEN, fast=fast)
        assert main(["sft", *words]) == 0
        losses.append([row["loss"] for row in read_rows(tmp_path / fast) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)
    merged = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "auto"), "--output_dir", str(merged), "--dtype", "float32"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert not hasattr(plain.config, "quantization_config")
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(tmp_path / "auto"), fast="none")
    trained = plugin.load(str(packed)).eval()
    with torch.no_grad():
        found, expected = plain(IDS).logits, trained(IDS).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
