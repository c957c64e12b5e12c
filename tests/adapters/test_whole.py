"""Modules that are trained in full beside an adapter: each is there, and has weights that training can change."""

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from halfbyte.errors import UserError
from tests import architectures, tiny
from tests.checkpoint.runs import options

ModelDir = Callable[..., Path]
REFUSED = {
    "nowhere": "'nowhere' matches no module; take it out",
    "lm_heat": r"'lm_heat' matches no module; did you mean lm_head\?$",
    "o_proj": r"'o_proj' is or holds model\.layers\.0\.self_attn\.o_proj, whose weights are quantized",
    "experts": r"'experts' is or holds model\.layers\.0\.mlp\.experts, whose weights are quantized",
    "mlp": r"'mlp' is or holds model\.layers\.0\.mlp, .*write `load_in_4bit: false`",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_in_full_is_refused(model_dir: ModelDir, name: str) -> None:
    plugin = QLoRAPlugin(dtype="float32", lora_modules_to_save=[name])
    with pytest.raises(UserError, match=f"lora_modules_to_save: {REFUSED[name]}"):
        plugin.load(str(model_dir("qwen3_moe")))


@pytest.mark.parametrize(
    ("name", "in_4_bits"), [("gate", True), ("norm", True), ("lm_head", True), ("experts", False)]
)
def test_what_has_plain_weights_is_trained(model_dir: ModelDir, name: str, in_4_bits: bool) -> None:
    plugin = QLoRAPlugin(dtype="float32", lora_modules_to_save=[name], load_in_4bit=in_4_bits)
    model = plugin.load(str(model_dir("qwen3_moe")))
    trained = [path for path, each in model.named_parameters() if each.requires_grad]
    assert any(f"{name}.modules_to_save.default" in path for path in trained)


def test_a_plan_refuses_what_its_run_does(model_dir: ModelDir, tmp_path: Path, capsys) -> None:
    data = tiny.write_rows(tmp_path / "rows", tiny.texts(12))
    given = options(
        model_dir("qwen3_moe"), data, tmp_path / "run", lora_modules_to_save="experts", lora_dropout="0"
    )
    said = []
    for words in (["plan", "sft"], ["sft"]):
        assert main([*words, *given]) == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]


def test_a_part_that_text_does_not_reach_is_refused(tmp_path: Path) -> None:
    plugin = QLoRAPlugin(dtype="float32", lora_modules_to_save=["multi_modal_projector"])
    with pytest.raises(
        UserError, match=r"'multi_modal_projector' is model\.multi_modal_projector, which text"
    ):
        plugin.load(architectures.save(tmp_path / "base", "gemma3"))
