"""Adapters on experts: what is refused before a step, what gets none, and what is said of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte import QLoRAPlugin
from halfbyte.adapters.experts import routers, taken_for_experts
from halfbyte.errors import UserError
from tests import architectures, experts

ModelDir = Callable[..., Path]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"lora_target_parameters": ["experts.gate_up"]}, "lora_target_parameters: 'experts.gate_up. matches"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout: PEFT drops no inputs of a parameter"),
    "dora": ({"use_dora": True}, "use_dora: PEFT has no DoRA of a parameter"),
    "eva": ({"init_lora_weights": "eva"}, "init_lora_weights: EVA reads the inputs of layers"),
    "excluded": ({"lora_exclude_modules": ["experts"]}, "lora_exclude_modules: 'experts' are experts, and PEFT"),
    "a name": ({"lora_target_modules": ["q_proj", "up_proj"]}, "lora_target_modules: on qwen3_moe PEFT reads up_proj"),
    "8 bits": ({"load_in_4bit": False, "load_in_8bit": True}, "load_in_8bit: experts would stay in 16 bits"),
}  # fmt: skip


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_adapted_is_refused(model_dir: ModelDir, options: tuple[dict[str, Any], str]) -> None:
    given, message = options
    with pytest.raises(UserError, match=message):
        QLoRAPlugin(dtype="float32", **{"lora_target_parameters": STACKS, **given}).load(
            str(model_dir("qwen3_moe"))
        )


def test_biases_of_experts_take_no_adapter(tmp_path: Path) -> None:
    base = experts.save(tmp_path / "base", "gpt_oss")
    plugin = QLoRAPlugin(dtype="float32", lora_target_parameters=["experts.gate_up_proj_bias"])
    with pytest.raises(UserError, match=r"'experts\.gate_up_proj_bias' matches no parameter"):
        plugin.load(base)


def test_a_router_is_adapted_by_its_name_alone(model_dir: ModelDir) -> None:
    base = str(model_dir("qwen3_moe"))
    by_name = QLoRAPlugin(dtype="float32", lora_target_parameters=["gate.weight"]).load(base)
    plain = QLoRAPlugin(dtype="float32").load(base)
    found = [
        {name for name, _ in model.named_parameters() if "gate.lora_A" in name} for model in (by_name, plain)
    ]
    assert [len(each) for each in found] == [2, 0]


def test_what_gets_no_adapter_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = architectures.save(tmp_path / "base", "qwen3_next")
    QLoRAPlugin(dtype="float32").load(base)
    said = capsys.readouterr().err
    assert "whose names PEFT reads as those of experts: model.layers.*.mlp.shared_expert.down_proj" in said
    assert (
        "the 4 experts of 2 layers (98,304 weights), which `lora_target_parameters: [experts.down_proj, "
        in said
    )


def test_routers_are_told_from_projections() -> None:
    model = architectures.model("qwen2_moe")
    linears = {
        name: module for name, module in model.named_modules() if hasattr(module, "weight") and "mlp" in name
    }
    stacks = {name: value.shape for name, value in model.state_dict().items() if value.dim() == 3}
    found = routers(linears, stacks)
    assert {name.rpartition(".")[2] for name in found} == {"gate", "shared_expert_gate"}
    assert not taken_for_experts(architectures.model("llama"), ["model.layers.0.mlp.gate_proj"])
