"""A merged model computes what the adapter on its 4-bit base computes, for every kind of adapter and layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from trl import SFTConfig

from halfbyte import QLoRAPlugin
from halfbyte.data import prepare_tokenizer
from halfbyte.errors import UserError
from halfbyte.export import merging
from halfbyte.export.deltas import Deltas
from halfbyte.export.origin import origin_of
from tests import tiny

ModelDir = Callable[..., Path]
IDS = torch.arange(40)[None] % tiny.VOCABULARY
TOKENS = ["<tool>", "<end>"]
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "one kind of layer": ("llama", {"lora_target_modules": ["q_proj"], "lora_r": 3}),
    "head saved whole": ("llama", {"lora_modules_to_save": ["lm_head"]}),
    "tokens added": ("llama", {"additional_special_tokens": TOKENS}),
    "tied head": ("qwen3", {}),
    "tied head, tokens added": ("qwen3", {"additional_special_tokens": TOKENS}),
    "biases": ("opt", {}),
    "fp4": ("llama", {"bnb_4bit_quant_type": "fp4"}),
    "no double quantization": ("llama", {"use_bnb_nested_quant": False}),
    "16-bit base": ("llama", {"load_in_4bit": False}),
    "files of another layout": (
        "qwen3_moe",
        {"lora_target_modules": ["q_proj", "o_proj"], "load_in_4bit": False},
    ),
}


def disturb(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(base: Path, directory: Path, options: dict[str, Any]) -> tuple[PeftModel, Any]:
    """An adapter that is not trivial, saved in ``directory`` as a run saves it; with its tokenizer."""
    more: dict[str, Any] = {}
    tokenizer = AutoTokenizer.from_pretrained(base)
    if names := options.get("additional_special_tokens"):
        args = SFTConfig(str(directory / "unused"), use_cpu=True, bf16=False)
        tokenizer, ids = prepare_tokenizer(str(base), training=args, additional_special_tokens=names)
        more = {"tokenizer": tokenizer, "added_token_ids": ids}
    model = disturb(QLoRAPlugin(dtype="float32", **options).load(str(base), **more))
    model.save_pretrained(directory)
    config = {
        "dtype": "float32",
        **{key: value for key, value in options.items() if "bit" in key or "bnb" in key},
    }
    (directory / "run.json").write_text(json.dumps({"config": config}))
    return model, tokenizer


def write(
    adapters: list[Path], output: Path, *, weights: list[float] | None = None, **given: Any
) -> merging.Merged:
    output.mkdir()
    origin, options = origin_of(adapters[0]), {"most": 10**5, "tokenizer": tiny.tokenizer(), **given}
    plain = merging.skeleton(origin, options.pop("dtype", torch.float32))
    return merging.write(origin, Deltas(adapters, weights), plain, output, **options)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def reloaded(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("cell", CELLS)
def test_the_merge_computes_what_was_trained(model_dir: ModelDir, tmp_path: Path, cell: str) -> None:
    arch, options = CELLS[cell]
    model, tokenizer = trained(model_dir(arch), tmp_path / "adapter", options)
    written = write([tmp_path / "adapter"], tmp_path / "merged", tokenizer=tokenizer)
    merged = reloaded(tmp_path / "merged")
    ids = torch.cat([IDS, torch.arange(len(tokenizer) - 4, len(tokenizer))[None]], dim=1)
    wanted = logits(model, ids)
    with model.disable_adapter():
        effect = (wanted - logits(model, ids)).norm()
    assert (logits(merged, ids) - wanted).norm() <= 1e-5 * effect
    assert effect > 0.01 * wanted.norm()
    assert not written.untied
    assert merged.config.tie_word_embeddings == (arch in ("qwen3", "opt"))
    assert 0.01 < written.update < 10
    assert written.rounding == 0.0
    assert len(written.files) > 2, "several files and their index"
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_once(model_dir: ModelDir, tmp_path: Path, dtype: torch.dtype) -> None:
    trained(model_dir("llama"), tmp_path / "adapter", {})
    written = write([tmp_path / "adapter"], tmp_path / "rounded", dtype=dtype)
    write([tmp_path / "adapter"], tmp_path / "exact")
    exact, rounded = reloaded(tmp_path / "exact").state_dict(), reloaded(tmp_path / "rounded").state_dict()
    for name, weight in exact.items():
        assert torch.equal(weight.to(dtype).float(), rounded[name])
    assert 0 < written.rounding < 0.1


def test_the_original_is_another_model(model_dir: ModelDir, tmp_path: Path) -> None:
    trained(model_dir("llama"), tmp_path / "adapter", {})
    write([tmp_path / "adapter"], tmp_path / "original", into_original=True)
    base = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert torch.allclose(logits(reloaded(tmp_path / "original")), wanted, atol=1e-5)


def test_several_adapters_are_added_by_weight(model_dir: ModelDir, tmp_path: Path) -> None:
    ranks, weights = (16, 4), [0.5, -2.0]
    changes = []
    for rank in ranks:
        model, _ = trained(model_dir("llama"), tmp_path / str(rank), {"lora_r": rank})
        layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
        changes.append(layer.get_delta_weight("default"))
    write([tmp_path / str(rank) for rank in ranks], tmp_path / "merged", weights=weights)
    write([tmp_path / "16"], tmp_path / "one")
    name = "model.layers.1.self_attn.q_proj.weight"
    found, one = (reloaded(tmp_path / each).state_dict()[name] for each in ("merged", "one"))
    wanted = one - changes[0] + weights[0] * changes[0] + weights[1] * changes[1]
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_one_adapter_by_a_weight(model_dir: ModelDir, tmp_path: Path) -> None:
    trained(model_dir("llama"), tmp_path / "a", {})
    for name, weights in (("none", [0.0]), ("half", [0.5]), ("whole", None)):
        write([tmp_path / "a"], tmp_path / name, weights=weights)
    none, half, whole = (reloaded(tmp_path / name).state_dict() for name in ("none", "half", "whole"))
    for name, weight in half.items():
        assert torch.allclose(weight, (none[name] + whole[name]) / 2, atol=1e-6)
    assert any(not torch.equal(none[name], whole[name]) for name in whole)


def test_an_adapter_on_a_tied_embedding_unties_the_head(model_dir: ModelDir, tmp_path: Path) -> None:
    """PEFT changes what the embedding gives, and the head stays: merged into both, it would be another model."""
    base = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], r=4, task_type="CAUSAL_LM")
    model = disturb(get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "adapter" / "run.json").write_text(
        json.dumps({"config": {"load_in_4bit": False, "dtype": "float32"}})
    )
    written = write([tmp_path / "adapter"], tmp_path / "merged")
    assert written.untied
    merged = reloaded(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    assert (logits(merged) - logits(model)).norm() <= 1e-5 * logits(model).norm()


def test_layers_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's weights are [in, out] in files, and [out, in] in four bits."""
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model, _ = trained(tmp_path / "base", tmp_path / "adapter", {})
    write([tmp_path / "adapter"], tmp_path / "merged")
    assert (logits(reloaded(tmp_path / "merged")) - logits(model)).norm() <= 1e-5 * logits(model).norm()


def test_a_tensor_without_a_place_is_an_error(model_dir: ModelDir, tmp_path: Path) -> None:
    trained(model_dir("llama"), tmp_path / "adapter", {})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"layers\.7.*nothing in the base"):
        write([tmp_path / "adapter"], tmp_path / "merged")


def test_other_adapters_are_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained(model_dir("llama"), tmp_path / name, {"use_dora": name == "b"})
    with pytest.raises(UserError, match="DoRA adapters change the norm"):
        Deltas([tmp_path / "a", tmp_path / "b"])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="pissa"):
        Deltas([tmp_path / "a"])
