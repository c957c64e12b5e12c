"""Multimodal checkpoints: text trains their language model alone, and the adapter fits the whole."""

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from halfbyte import QLoRAPlugin, multimodal
from halfbyte.cli import main
from halfbyte.errors import UserError
from tests import architectures, plain_trl, tiny
from tests.checkpoint.runs import options

IDS = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])


def whole(base: str, **more: Any) -> PreTrainedModel:
    """The checkpoint as transformers loads it, in the four bits that halfbyte trains on."""
    model = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, quantization_config=plain_trl.nf4(), **more
    )
    return plain_trl.not_repacked(model).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]


@pytest.mark.parametrize(
    "name", ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.faults) for name in ("gemma3", "smolvlm"))]
)
def test_the_adapter_of_the_language_model_fits_the_whole(tmp_path: Path, name: str) -> None:
    base = architectures.save(tmp_path / "base", name)
    trainer, still = architectures.step(base, tmp_path / "out")
    trainer.save_model()
    assert not still
    parts = multimodal.other_parts(trainer.model.get_base_model())
    assert parts
    assert trainer.report.coverage.not_loaded == tuple(parts)
    assert trainer.model_accepts_loss_kwargs
    assert not any(parameter.is_meta for parameter in trainer.model.parameters())
    served = PeftModel.from_pretrained(whole(base), str(tmp_path / "out"))
    assert logits(trainer.model).allclose(logits(served), atol=1e-5)
    assert not logits(served.get_base_model()).equal(logits(whole(base)))
    again = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(tmp_path / "out")).load(base)
    assert logits(again).equal(logits(trainer.model))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_pair_starts_at_ln_2(tmp_path: Path, name: str) -> None:
    base = architectures.save(tmp_path / "base", name)
    assert architectures.dpo_loss(base, tmp_path / "out") == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("name", ["llava", pytest.param("qwen3_vl_moe", marks=pytest.mark.faults)])
def test_a_run_is_planned_resumed_and_merged_into_the_whole(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaVA's files have other names than its model, and of Qwen's experts one tensor each."""
    base = Path(architectures.save(tmp_path / "base", name))
    data = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    (base / "preprocessor_config.json").write_text("{}")
    given = {"max_steps": "2", "save_steps": "1", "learning_rate": "2e-2"}
    if name == "qwen3_vl_moe":
        given |= {"load_in_4bit": "false", "lora_target_modules": "q_proj"}
    words = options(base, data, tmp_path / "run", **given)
    assert main(["plan", "sft", *words]) == 0
    assert main(["sft", *words]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert main(["sft", *words, "--resume_from_checkpoint", "true"]) == 0
    printed = capsys.readouterr()
    assert "not loaded, which text does not reach" in printed.err
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    merged = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "run"), "--output_dir", str(merged), "--dtype", "float32"]) == 0
    before, after = (load_file(each / "model.safetensors") for each in (base, merged))
    towers = [key for key in before if "vis" in key or "projector" in key]
    assert towers
    assert all(before[key].equal(after[key]) for key in towers)
    assert before.keys() == after.keys()
    assert (merged / "preprocessor_config.json").is_file()
    found = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
    plugin = QLoRAPlugin(
        dtype="float32",
        adapter_name_or_path=str(tmp_path / "run"),
        fast="none",
        load_in_4bit=name != "qwen3_vl_moe",
    )
    assert logits(found).allclose(logits(plugin.load(str(base))), atol=1e-4)


@pytest.mark.parametrize("name", ["llava"])
def test_a_checkpoint_quantized_ahead_is_whole_and_trains_alone(tmp_path: Path, name: str) -> None:
    base, packed = architectures.save(tmp_path / "base", name), tmp_path / "packed"
    assert main(["quantize", base, "--output_dir", str(packed), "--dtype", "float32"]) == 0
    found = plain_trl.not_repacked(AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.float32))
    ours = QLoRAPlugin(dtype="float32", lora_r=4).load(str(packed))
    assert logits(found).allclose(logits(ours), atol=1e-5)
    again = QLoRAPlugin(dtype="float32", lora_r=4).load(base)
    assert logits(ours).equal(logits(again))
    tower = next(part for part in multimodal.other_parts(found) if "vis" in part)
    assert not any(isinstance(each, bnb.nn.Linear4bit) for each in found.get_submodule(tower).modules())


def test_the_weights_of_the_towers_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, read = architectures.save(tmp_path / "base", "gemma3"), []

    class Slice:
        def __init__(self, name: str, found: Any) -> None:
            self._name, self._found = name, found

        def __getitem__(self, at: Any) -> torch.Tensor:
            read.append(self._name)
            return self._found[at]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._found, name)

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = safe_open(*args, **kwargs)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self._file.get_slice(name))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr("transformers.modeling_utils.safe_open", File)
    QLoRAPlugin(dtype="float32", load_in_4bit=False, lora_r=4).load(base)
    with safe_open(Path(base) / "model.safetensors", framework="pt") as file:
        assert set(read) == {name for name in file.keys() if name.startswith("language_model.")}  # noqa: SIM118


def test_names_of_layers_are_those_of_the_language_model(tmp_path: Path) -> None:
    """PEFT shortens more than twenty paths, here to names that the tower does not have."""
    base = architectures.save(tmp_path / "base", "llava", text_config={"num_hidden_layers": 11})
    for number, targets in enumerate((["q_proj", "v_proj"], [r".*\.[qv]_proj"], ["all-linear"])):
        model = QLoRAPlugin(dtype="float32", lora_r=2, lora_target_modules=targets).load(base)
        model.save_pretrained(tmp_path / str(number))
        served = PeftModel.from_pretrained(whole(base), str(tmp_path / str(number)))
        adapted = {name for name, _ in served.named_parameters() if ".lora_A." in name}
        assert adapted == {name for name, _ in model.named_parameters() if ".lora_A." in name}
        assert len(adapted) == 11 * (7 if number == 2 else 2)


def test_an_adapter_of_a_tower_is_refused(tmp_path: Path) -> None:
    base = architectures.save(tmp_path / "base", "llava")
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(base),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"has weights of model.vision_tower.*start a fresh adapter"):
        QLoRAPlugin(dtype="float32", adapter_name_or_path=str(tmp_path / "adapter")).load(base)


def test_what_reads_its_towers_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multimodal, "_READ_BY_TEXT", {"llava"})
    base = architectures.save(tmp_path / "base", "llava")
    trainer, still = architectures.step(base, tmp_path / "out")
    assert not still
    assert "loaded whole; towers and projectors frozen, without quantization" in capsys.readouterr().err
    towers = trainer.model.get_base_model().model.vision_tower
    assert not any(isinstance(module, bnb.nn.Linear4bit | LoraLayer) for module in towers.modules())
    assert not any(parameter.requires_grad for parameter in towers.parameters())
    assert trainer.report.coverage.four_bit_share == 1.0


def test_full_parameters_are_saved_with_the_towers(tmp_path: Path) -> None:
    base = architectures.save(tmp_path / "base", "llava")
    trainer, _ = architectures.step(base, tmp_path / "out", {"load_in_4bit": False, "use_peft": False})
    trainer.save_model()
    before, after = (load_file(path / "model.safetensors") for path in (Path(base), tmp_path / "out"))
    assert before.keys() == after.keys()
    assert {name.partition(".")[0] for name in before if not before[name].equal(after[name])} == {
        "language_model"
    }


def test_weights_that_the_files_lack_are_not_left_random(tmp_path: Path) -> None:
    base = Path(architectures.save(tmp_path / "base", "llava"))
    weights = load_file(base / "model.safetensors")
    del weights["language_model.model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weight of LlavaFor.* the first model.language_model.norm.weight"):
        QLoRAPlugin(dtype="float32").load(str(base))


@pytest.mark.parametrize(
    "row",
    [
        {"images": ["a.png"], **tiny.conversations(1)[0]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "a fox"}]}]},
    ],
    ids=["a column", "a part"],
)  # fmt: skip
def test_rows_with_images_are_refused(
    tmp_path: Path, row: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = architectures.save(tmp_path / "base", "qwen2_vl")
    rows = tiny.write_rows(tmp_path / "rows", [row] * 8)
    assert main(["sft", *options(Path(base), rows, tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "image" in said
    assert "training is on text" in said
