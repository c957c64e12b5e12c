"""What is trained is said: how many parameters, of which modules, and what beside adapters."""

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte import QLoRAPlugin
from halfbyte.adapters import trained_line, trained_parameters

ALL = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({}, f"LoRA of rank 16 on {ALL}"),
        ({"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 4}, "LoRA of rank 4 on q_proj, v_proj"),
        ({"use_dora": True}, f"LoRA of rank 16 on {ALL}"),
        (
            {"lora_modules_to_save": ["lm_head"], "load_in_4bit": False},
            f"LoRA of rank 16 on {ALL}; lm_head whole",
        ),
        ({"use_peft": False, "load_in_4bit": False}, "all weights"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_is_trained(model_dir: Callable[..., Path], options: dict, modules: str) -> None:
    model = QLoRAPlugin(dtype="float32", **options).load(str(model_dir("llama")))
    line = trained_line(model)
    assert line.endswith(f"parameters, {modules}")
    assert trained_parameters(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_rows_of_tokens(model_dir: Callable[..., Path]) -> None:
    from halfbyte import adapters, loading
    from halfbyte.resolve import for_loop

    plugin = QLoRAPlugin(dtype="float32", additional_special_tokens=["<new>"])
    decisions = for_loop(plugin, str(model_dir("llama")))
    model = loading.load(plugin, decisions, added_token_ids=[5]).model
    assert adapters.trained_modules(model).startswith(f"LoRA of rank 16 on {ALL}; rows of ")
