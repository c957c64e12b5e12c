"""A checkpoint quantized file by file holds the bytes that training loads, and trains in plain TRL."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from halfbyte.quantization import load_base
from halfbyte.quantization.stored import same_bytes
from tests import architectures, tiny
from tests.checkpoint.runs import options, read_rows

ModelDir = Callable[..., Path]


@pytest.fixture(scope="module")
def bases(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny bases; ``gpt2`` has its layers transposed."""

    def get(arch: str) -> Path:
        if arch != "gpt2":
            return model_dir(arch)
        directory = tmp_path_factory.mktemp(arch)
        config = GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        tiny.tokenizer().save_pretrained(directory)
        return directory

    return get


@pytest.mark.parametrize(
    ("arch", "words", "settings", "dtype"),
    [
        *((arch, [], {}, torch.bfloat16) for arch in ("llama", "qwen3", "opt", "gemma", "gpt2")),
        (
            "llama",
            ["--bnb_4bit_quant_type", "fp4", "--dtype", "float32"],
            {"bnb_4bit_quant_type": "fp4"},
            torch.float32,
        ),
        (
            "gpt2",
            ["--no_double_quant", "--dtype", "float16"],
            {"bnb_4bit_use_double_quant": False},
            torch.float16,
        ),
    ],
    ids=["llama", "qwen3", "opt", "gemma", "gpt2", "llama fp4", "gpt2 no double quantization"],
)
def test_the_bytes_are_those_of_training(
    bases: Callable[[str], Path],
    tmp_path: Path,
    arch: str,
    words: list[str],
    settings: dict,
    dtype: torch.dtype,
    capsys,
) -> None:
    base, output = bases(arch), tmp_path / "packed"
    assert main(["quantize", str(base), "--output_dir", str(output), "--max_shard_size", "40KB", *words]) == 0
    wanted = load_base(
        str(base),
        quantization=BitsAndBytesConfig(
            **{
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": dtype,
                **settings,
            }
        ),
        dtype=dtype,
        device=torch.device("cpu"),
    ).state_dict()
    found = AutoModelForCausalLM.from_pretrained(output, dtype=dtype, device_map={"": "cpu"}).state_dict()
    assert found.keys() == wanted.keys()
    assert all(same_bytes(found[name], wanted[name]) for name in wanted)
    weights = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 2
    assert weights < sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert f"quantized: {output}" in capsys.readouterr().out


def test_bits_of_double_quantization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 + 8/64 + 32/(64 * 256) bits, and a few bytes of state a layer (arXiv 2305.14314, section 3)."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    assert main(["quantize", str(tmp_path / "base"), "--output_dir", str(tmp_path / "packed")]) == 0
    told = capsys.readouterr().out
    bits = float(told.partition(" of them in ")[2].partition(" bits")[0])
    assert 4.127 <= bits < 4.16


def packed(base: Path, output: Path) -> None:
    assert main(["quantize", str(base), "--output_dir", str(output), "--dtype", "float32"]) == 0


def test_it_trains_here_as_its_original_does(model_dir: ModelDir, tmp_path: Path) -> None:
    packed(model_dir("llama"), tmp_path / "base")
    data = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    for name, base in (("packed", tmp_path / "base"), ("original", model_dir("llama"))):
        given = {"max_steps": "2", "save_strategy": "no"}
        assert main(["sft", *options(base, data, tmp_path / name, **given)]) == 0
    losses = [
        [row["loss"] for row in read_rows(tmp_path / name) if "loss" in row]
        for name in ("packed", "original")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_it_loads_in_plain_transformers_and_peft(model_dir: ModelDir, tmp_path: Path) -> None:
    packed(model_dir("llama"), tmp_path / "base")
    ids = torch.arange(20)[None]
    ours = QLoRAPlugin(dtype="float32").load(str(tmp_path / "base"))
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, device_map={"": "cpu"}
    )
    # In training mode: in evaluation bitsandbytes repacks the weights for some CPUs, and computes in bfloat16.
    assert torch.allclose(ours(input_ids=ids).logits, plain.train()(ids).logits, atol=1e-5)
    told = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert (told["quant_method"], told["load_in_4bit"]) == ("bitsandbytes", True)


def test_what_plain_transformers_cannot_load_is_named(tmp_path: Path, capsys) -> None:
    """Falcon's own class of linear layers; experts are in test_mxfp4.py."""
    packed(Path(architectures.save(tmp_path / "base", "falcon")), tmp_path / "packed")
    assert "plain transformers does not read FalconLinear in 4 bits" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": "cpu"})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["no/such-model"], "no/such-model"),
        (["PACKED"], "is quantized already"),
        (["BASE", "--max_shard_size", "many"], "--max_shard_size: 'many' is no size"),
        (["BASE", "--output_dir", "FULL"], "exists and is not empty"),
    ],
    ids=["missing", "twice", "no size", "not empty"],
)
def test_what_is_refused(
    model_dir: ModelDir, tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"BASE": model_dir("llama"), "PACKED": tmp_path / "packed", "FULL": tmp_path / "full"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    if "PACKED" in words:
        assert main(["quantize", str(model_dir("llama")), "--output_dir", str(tmp_path / "packed")]) == 0
    given = [str(places.get(word, word)) for word in words]
    more = [] if "--output_dir" in words else ["--output_dir", str(tmp_path / "out")]
    assert main(["quantize", *given, *more]) == 2
    assert reason in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"full", *(["packed"] if "PACKED" in words else [])}
    )
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
