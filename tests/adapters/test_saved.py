"""Saved adapters: continued exactly, on their own base, with their own options and revision, from disk or the hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte import QLoRAPlugin, resolve
from halfbyte.errors import UserError
from tests.adapters.build import sft

ModelDir = Callable[..., Path]


def test_sft_continues_an_adapter_exactly(sft_adapter: Path, tmp_path: Path, model_dir: ModelDir) -> None:
    from safetensors.torch import load_file

    trainer = sft(
        QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter)), model_dir("llama"), tmp_path
    )
    saved = load_file(sft_adapter / "adapter_model.safetensors")
    named = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert named.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(named[name], value), name


def test_an_adapter_of_another_base_is_an_error_that_names_both(
    model_dir: ModelDir, sft_adapter: Path
) -> None:
    other = model_dir("llama", seed=1)
    with pytest.raises(UserError, match="was trained on the base") as error:
        QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter)).load(str(other))
    assert str(model_dir("llama")) in str(error.value)
    assert str(other) in str(error.value)


def test_the_recorded_fingerprint_decides_over_the_name(
    model_dir: ModelDir, sft_adapter: Path, tmp_path: Path
) -> None:
    import shutil

    from halfbyte.quantization import fingerprint

    moved, adapter = tmp_path / "moved", tmp_path / "adapter"
    shutil.copytree(model_dir("llama"), moved)
    shutil.copytree(sft_adapter, adapter)
    (adapter / "run.json").write_text(json.dumps({"base": {"sha": fingerprint(str(model_dir("llama")))}}))
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter))
    plugin.load(str(moved))
    with pytest.raises(UserError, match="was trained on the base"):
        plugin.load(str(model_dir("llama", seed=1)))


IGNORED = {
    "rank": ({"lora_r": 64}, "lora_r: 64 is not what the adapter"),
    "alpha": ({"lora_alpha": 1}, "lora_alpha: 1 is not"),
    "DoRA": ({"use_dora": True}, "use_dora: True is not"),
    "targets": ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: q_proj is not"),
    "initialization": ({"init_lora_weights": "eva"}, "init_lora_weights: the adapter"),
    "no adapters": ({"use_peft": False, "load_in_4bit": False}, "use_peft: false trains the base without"),
}


@pytest.mark.parametrize("case", IGNORED)
def test_what_a_saved_adapter_would_ignore_is_refused_before_the_base_is_loaded(
    sft_adapter: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = IGNORED[case]
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter), **options)

    def load_base(*args, **kwargs):
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("halfbyte.quantization.load_base", load_base)
    with pytest.raises(UserError, match=message) as error:
        plugin.load()
    assert case == "no adapters" or error.value.option == message.partition(":")[0]


def test_new_tokens_on_a_saved_adapter_are_refused(sft_adapter: Path) -> None:
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter))
    with pytest.raises(
        UserError, match=r"additional_special_tokens: the adapter .* was trained without them"
    ):
        plugin.load(added_token_ids=[5])


def test_the_revision_of_the_base_goes_with_the_adapter(model_dir: ModelDir, tmp_path: Path) -> None:
    first = QLoRAPlugin(dtype="float32", model_revision="v1").load(str(model_dir("llama")))
    first.save_pretrained(tmp_path / "adapter")
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(tmp_path / "adapter"))
    assert resolve.for_loop(plugin, None).revision == "v1"
    assert resolve.for_loop(QLoRAPlugin(dtype="float32"), "x/y").revision == "main"


def test_an_adapter_of_the_hub(sft_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's client keeps it on disk, since there is no network here."""
    import shutil

    cached = tmp_path / "models--them--adapter"
    shutil.copytree(sft_adapter, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path="them/adapter")
    local = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter))
    assert resolve.for_loop(plugin, None).base == resolve.for_loop(local, None).base
    trained, same = (
        {n: p for n, p in m.load().named_parameters() if p.requires_grad} for m in (plugin, local)
    )
    assert trained
    assert all(torch.equal(trained[name], same[name]) for name in same)
    with pytest.raises(
        UserError, match="'them/none' is no directory and not in the hub's local cache, and HF_HUB_OFFLINE"
    ):
        QLoRAPlugin(adapter_name_or_path="them/none").load()


def test_a_damaged_adapter_directory_is_a_users_error(model_dir: ModelDir, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{not json")
    with pytest.raises(UserError, match="not a PEFT adapter configuration"):
        QLoRAPlugin(adapter_name_or_path=str(tmp_path)).load()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        QLoRAPlugin(adapter_name_or_path=str(tmp_path)).load()
    with pytest.raises(UserError, match="no model"):
        QLoRAPlugin().load()
