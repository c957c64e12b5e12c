"""`halfbyte quantize`, `merge` and `report` on a base in MXFP4, in which gpt-oss is published."""

import csv
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.cli import main
from halfbyte.fast import experts as fused
from halfbyte.quantization import compute_in_float32, streamed
from halfbyte.quantization.stored import same_bytes
from halfbyte.task import CAUSAL_LM
from tests import experts, plain_trl

IDS = torch.arange(4, 36).view(2, 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("mxfp4") / "base"
    return directory, experts.save_mxfp4(directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_bytes_are_those_that_training_packs_anew(
    base: tuple[Path, dict[str, Tensor]], tmp_path: Path, dtype: torch.dtype, capsys
) -> None:
    output, named = tmp_path / "packed", str(dtype).removeprefix("torch.")
    words = ["quantize", str(base[0]), "--output_dir", str(output), "--max_shard_size", "40KB"]
    assert main([*words, "--dtype", named]) == 0
    printed = capsys.readouterr().out
    assert "MXFP4 was dequantized" in printed
    assert "it loads with halfbyte only: plain transformers does not read experts in 4 bits" in printed
    found, wanted = (experts.load(path, dtype).state_dict() for path in (output, base[0]))
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[name], wanted[name]) for name in wanted)
    written = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 2
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(output, device_map={"": "cpu"})
    streams = streamed.stream(base[0], quantization=plain_trl.nf4(dtype), dtype=dtype, task=CAUSAL_LM)
    assert (streams is not None) == (dtype == torch.bfloat16), "norms stay in float32 beside float16"


@torch.no_grad()
def test_a_merge_computes_what_was_trained(base: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    model = experts.load(base[0], torch.bfloat16)
    compute_in_float32(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    trained = get_peft_model(model, config).eval()
    fused.require(trained)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(tmp_path / "adapter")
    words = ["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    words += ["--model_name_or_path", str(base[0]), "--measure", "none", "--dtype", "float32"]
    assert main(words) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not hasattr(merged.config, "quantization_config")
    expected = trained(IDS).logits
    assert (merged(IDS).logits - expected).norm() <= 1e-5 * expected.norm()
    with trained.disable_adapter():
        assert (trained(IDS).logits - expected).norm() > 1e-2 * expected.norm()


def test_a_report_compares_the_weights_that_it_stands_for(
    base: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys
) -> None:
    words = ["report", str(base[0]), "--output_dir", str(tmp_path / "report")]
    assert main(words) == 0
    with (tmp_path / "report" / "layers.csv").open() as file:
        sizes = {row["weight"]: int(row["parameters"]) for row in csv.DictReader(file)}
    assert all(sizes[name] == stack.numel() for name, stack in base[1].items())
    assert main([*words, "--data", str(tmp_path), "--recipe", "sft"]) == 2
    assert "--data: " in capsys.readouterr().err
