"""Adapters on experts: what is refused before a step, what gets none, and what is said of it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from halfbyte import QLoRAPlugin
from halfbyte.adapters import options_of
from halfbyte.adapters.experts import routers, taken_for_experts
from halfbyte.errors import UserError
from halfbyte.quantization import stacks_of
from tests import architectures, experts

ModelDir = Callable[..., Path]
IDS = torch.arange(4, 36).view(2, 16)
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


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Bases with shared experts whose names PEFT maps to the stacks."""
    root = tmp_path_factory.mktemp("shared")
    return functools.cache(lambda family: experts.save(root / family, family))


def test_what_gets_no_adapter_is_said(shared: Callable[[str], str], capsys) -> None:
    """PEFT drops no inputs of a parameter."""
    QLoRAPlugin(dtype="float32", lora_dropout=0.1).load(shared("qwen3_next"))
    said = capsys.readouterr().err
    assert (
        "names PEFT reads as those of experts (`lora_dropout: 0` adds them): model.layers.*.mlp.shared_expert.down_proj"
        in said
    )
    assert "2 layers that route to experts: model.layers.*.mlp.shared_expert_gate" in said
    assert (
        "the 4 experts of 2 layers (98,304 weights), which `lora_target_parameters: [experts.down_proj, "
        in said
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [("glm4_moe", "shared_experts"), ("qwen3_next", "shared_expert"), ("hunyuan_v1_moe", "shared_mlp")],
)
@torch.no_grad()
def test_shared_experts_are_adapted_as_plain_peft_loads_them(
    shared: Callable[[str], str], tmp_path: Path, family: str, name: str
) -> None:
    base = shared(family)
    model = QLoRAPlugin(dtype="float32", lora_target_parameters=STACKS).load(base).eval()
    adapted = [path.partition(".lora_A")[0] for path, _ in model.named_parameters() if ".lora_A" in path]
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        assert any(path.endswith(f".{name}.{leaf}") for path in adapted)
    assert not any(path.endswith(("gate", ".wg")) for path in adapted), "routers stay as they are"
    for seed, (_, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(seed)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    expected = model(IDS).logits
    # The weights of training, dense, under PEFT alone.
    dense = experts.rounded(base, experts.load(base))
    plain = PeftModel.from_pretrained(dense, tmp_path).eval()
    assert (plain(IDS).logits - expected).norm() <= 1e-5 * expected.norm()
    continued = QLoRAPlugin(dtype="float32").load(str(tmp_path)).eval()
    assert torch.equal(continued(IDS).logits, expected)
    options = options_of(str(tmp_path), {"lora_target_parameters": STACKS})
    assert {"gate_proj", "q_proj" if family != "qwen3_next" else "out_proj"} <= set(
        options["lora_target_modules"]
    )
    # A second adapter, as a reference is.
    continued.add_adapter("reference", continued.peft_config["default"])
    kept = [path for path, _ in continued.named_parameters() if ".lora_A.reference" in path]
    assert len(kept) == len(adapted)


def test_excluded_shared_experts_get_no_adapter(shared: Callable[[str], str]) -> None:
    plugin = QLoRAPlugin(dtype="float32", lora_exclude_modules=["shared_expert.up_proj"])
    found = [path for path, _ in plugin.load(shared("qwen3_next")).named_parameters() if ".lora_A" in path]
    assert not any("up_proj" in path for path in found)
    assert any("shared_expert.gate_proj" in path for path in found)


def test_routers_are_told_from_projections(shared: Callable[[str], str]) -> None:
    model = architectures.model("qwen2_moe")
    linears = {
        name: module for name, module in model.named_modules() if hasattr(module, "weight") and "mlp" in name
    }
    stacks = {name: value.shape for name, value in model.state_dict().items() if value.dim() == 3}
    found = routers(linears, stacks)
    assert {name.rpartition(".")[2] for name in found} == {"gate", "shared_expert_gate"}
    assert not taken_for_experts(architectures.model("llama"), ["model.layers.0.mlp.gate_proj"])
    packed = experts.load(shared("hunyuan_v1_moe"))
    path = "model.layers.0.mlp.gate.wg"  # a linear layer: packed, its weight has no rows
    assert routers({path: packed.get_submodule(path)}, stacks_of(packed)) == {path}
