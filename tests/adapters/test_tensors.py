"""Saved adapters whose tensors do not match are refused by name, before training; `~` is the home directory."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte import QLoRAPlugin, adapters
from halfbyte.errors import UserError

ModelDir = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 16 with trained embedding rows, and B away from zero."""
    torch.manual_seed(0)
    model = QLoRAPlugin(dtype="float32").load(str(model_dir("llama")), added_token_ids=[7])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return directory


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace(".layers.", ".layer."): tensor for name, tensor in tensors.items()}


def without_one_factor(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if not name.endswith("layers.1.mlp.up_proj.lora_B.weight")}


def without_one_module(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".layers.1.mlp.up_proj." not in name}


def without_rows(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "lora_" in name}


def with_one_more_module(tensors: Tensors) -> Tensors:
    more = {
        n.replace(".layers.1.", ".layers.2."): t.clone() for n, t in tensors.items() if "1.mlp.up_proj" in n
    }
    return tensors | more


def of_another_rank(tensors: Tensors) -> Tensors:
    ranks = {"lora_A": lambda t: t[:8], "lora_B": lambda t: t[:, :8]}
    return {
        name: next((cut(t) for key, cut in ranks.items() if key in name), t).contiguous()
        for name, t in tensors.items()
    }


def of_another_width(tensors: Tensors) -> Tensors:
    return {n: t[:, :8].contiguous() if "lora_A" in n else t for n, t in tensors.items()}


def not_finite(tensors: Tensors) -> Tensors:
    return {
        n: torch.full_like(t, float("nan")) if "1.mlp.up_proj.lora_B" in n else t for n, t in tensors.items()
    }


def whole_numbers(tensors: Tensors) -> Tensors:
    return {n: t.to(torch.int8) if "1.mlp.up_proj.lora_B" in n else t for n, t in tensors.items()}


# How the file is changed, what the message names, and whether the header alone shows it.
MISMATCHES = {
    "every key renamed": (renamed, r"\d+ tensors missing, the first \S+\.layers\.0\.\S+; \d+ \w+ unexpected", False),
    "one key dropped": (without_one_factor, r"layers\.1\.mlp\.up_proj\.lora_B\.weight is missing", True),
    "a module dropped": (without_one_module, r"2 tensors missing, the first \S+1\.mlp\.up_proj\.lora_A\.weight", False),
    "rows dropped": (without_rows, r"embed_tokens\S+trainable_tokens_delta is missing", False),
    "a module too many": (with_one_more_module, r"2 tensors unexpected, the first \S+\.layers\.2\.", False),
    "another rank": (of_another_rank, r"lora_A\.weight has rank 8, and adapter_config\.json says r = 16", True),
    "another width": (of_another_width, r"size mismatch for \S+lora_A", False),
}  # fmt: skip


def changed(saved: Path, into: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(saved, into)
    save_file(change(load_file(saved / WEIGHTS)), into / WEIGHTS, metadata={"format": "pt"})
    return into


@pytest.mark.parametrize("case", MISMATCHES)
def test_tensors_that_do_not_match_are_refused_by_name(saved: Path, tmp_path: Path, case: str) -> None:
    change, named, _ = MISMATCHES[case]
    directory = changed(saved, tmp_path / "checkpoint-5", change)
    with pytest.raises(UserError, match=named) as error:
        QLoRAPlugin(dtype="float32", adapter_name_or_path=str(directory)).load()
    assert str(directory) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("case", [case for case, (*_, header) in MISMATCHES.items() if header])
def test_what_the_header_shows_is_refused_before_the_base_is_loaded(
    saved: Path, tmp_path: Path, case: str
) -> None:
    change, named, _ = MISMATCHES[case]
    with pytest.raises(UserError, match=named):
        adapters.options_of(str(changed(saved, tmp_path / "adapter", change)), {})


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_checkpoint_is_checked_against_the_model_that_it_resumes(
    saved: Path, model_dir: ModelDir, tmp_path: Path, case: str
) -> None:
    model = QLoRAPlugin(dtype="float32").load(str(model_dir("llama")), added_token_ids=[7])
    adapters.check_checkpoint(model, str(saved))
    change, named, _ = MISMATCHES[case]
    with pytest.raises(UserError, match=named):
        adapters.check_checkpoint(model, str(changed(saved, tmp_path / "checkpoint-5", change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_finite, r"layers\.1\.mlp\.up_proj\.lora_B\S+ has values that are not finite"),
        (whole_numbers, r"layers\.1\.mlp\.up_proj\.lora_B\S+ is in I8, not in floating point"),
    ],
)
def test_values_that_cannot_be_trained_are_refused(saved: Path, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        QLoRAPlugin(dtype="float32", adapter_name_or_path=str(changed(saved, tmp_path / "a", change))).load()


def without_the_head(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}


def with_a_smaller_head(tensors: Tensors) -> Tensors:
    return {name: t[:10].contiguous() if "lm_head" in name else t for name, t in tensors.items()}


def test_modules_trained_in_full_are_compared_too(model_dir: ModelDir, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    plugin = QLoRAPlugin(dtype="float32", lora_modules_to_save=["lm_head"])
    plugin.load(str(model_dir("llama"))).save_pretrained(saved)
    for change, message in (
        (without_the_head, "lm_head.weight is missing"),
        (with_a_smaller_head, r"size mismatch for \S+lm_head"),
    ):
        directory = changed(saved, tmp_path / change.__name__, change)
        with pytest.raises(UserError, match=message):
            QLoRAPlugin(dtype="float32", adapter_name_or_path=str(directory)).load()


def test_a_matching_adapter_is_loaded_bit_for_bit(saved: Path) -> None:
    adapters.options_of(str(saved), {})
    model = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(saved)).load()
    loaded = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    kept = load_file(saved / WEIGHTS)
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
    assert {parameter.dtype for parameter in loaded.values()} == {torch.float32}


@pytest.mark.parametrize("arch", ["qwen3", "gemma", "opt"])
def test_tied_heads_and_other_architectures_are_not_refused(
    model_dir: ModelDir, tmp_path: Path, arch: str
) -> None:
    first = QLoRAPlugin(dtype="float32").load(str(model_dir(arch)), added_token_ids=[7])
    first.save_pretrained(tmp_path)
    adapters.check_checkpoint(
        QLoRAPlugin(dtype="float32", adapter_name_or_path=str(tmp_path)).load(), str(tmp_path)
    )


def test_damaged_or_absent_weights_and_unknown_kinds_are_refused(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    shutil.copytree(saved, directory)
    whole = (directory / WEIGHTS).read_bytes()
    for size in (0, 5, 100, len(whole) // 2):
        (directory / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{re.escape(str(directory / WEIGHTS))} is damaged: "):
            adapters.options_of(str(directory), {})
    (directory / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"holds no adapter weights: it has no {WEIGHTS}"):
        adapters.options_of(str(directory), {})
    config = json.loads((directory / "adapter_config.json").read_text())
    for kind in ("LORRA", None, ["LORA"]):
        (directory / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
        with pytest.raises(UserError, match="unknown peft_type"):
            adapters.options_of(str(directory), {})


def test_a_tilde_is_the_home_directory(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    own, here = adapters.base_of(str(saved)), str(tmp_path / "adapter")
    assert adapters.resolve(None, "~/adapter") == (own, here)
    assert adapters.resolve("~/adapter", None) == (own, here)
    assert adapters.resolve("~/adapter", str(tmp_path / "adapter")) == (own, here)
    assert adapters.resolve("~/base", "~/adapter") == (str(tmp_path / "base"), here)
    assert adapters.resolve("~/base", None) == (str(tmp_path / "base"), None)
    assert adapters.directory_of("~/adapter") == tmp_path / "adapter"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "~/base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert adapters.base_of(here) == str(tmp_path / "base")
