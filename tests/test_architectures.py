"""Architectures beyond the Llama family: each trains what text reaches, or is refused in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from halfbyte import QLoRAPlugin
from halfbyte.errors import UserError
from halfbyte.fast.forest import ROOT
from halfbyte.quantization import load_base, streamed
from halfbyte.quantization.stored import same_bytes
from halfbyte.task import CAUSAL_LM
from tests import architectures, experts, plain_trl


@pytest.fixture
def base(tmp_path: Path):
    def make(name: str, **more: Any) -> str:
        return architectures.save(tmp_path / name, name, **more)

    return make


def adapted(model: torch.nn.Module) -> set[str]:
    """The last names of the layers that have an adapter."""
    names = [name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name]
    return {name.rpartition(".")[2] for name in names}


TRAINS = {
    "bart": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},  # of its decoder's self-attention
    "falcon_h1": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"},
    "mamba2": {"in_proj"},
    "qwen3_5_text": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
}


@pytest.mark.parametrize("name", ["bart", "falcon_h1", "mamba2", "gpt2"])
def test_every_adapter_is_moved_by_text(base, tmp_path: Path, name: str) -> None:
    trainer, still = architectures.step(base(name), tmp_path / "out")
    assert not still
    if name in TRAINS:
        assert adapted(trainer.model) == TRAINS[name]
    paths = [path for path, _ in trainer.model.named_parameters() if ".lora_A" in path]
    assert not any("encoder_attn" in path for path in paths)


def test_rows_that_nothing_bounds_are_counted_as_they_are(base, tmp_path: Path) -> None:
    """Mamba 2 has no longest position, and `max_length: null` cuts no row."""
    trainer, _ = architectures.step(base("mamba2"), tmp_path / "out", max_length=None)
    assert not hasattr(trainer.model.config, "max_position_embeddings")
    lengths = sorted(trainer.report.lengths.sizes(padded=False))
    assert trainer.report.workload.tokens == sum(lengths[-2:])


ROUTER = r"router_aux_loss_coef: \w+ has no load-balancing loss that TRL can compute .*; write `router_aux_loss_coef: 0"
REFUSED = {
    # On CPUs bitsandbytes 0.50 quantizes no inputs of four dimensions, which latents have.
    "minicpm3": ({"load_in_4bit": False, "load_in_8bit": True}, "fails on a text: .*; write `load_in_4bit: true`$"),
    "doge": ({}, ROUTER),
    "jamba": ({}, ROUTER),
    "phimoe": ({"load_in_4bit": False}, ROUTER),
    "granitemoehybrid": ({"load_in_4bit": False}, ROUTER),
    "llama4_text": ({}, r"model_name_or_path: TRL cannot compute the loss of Llama4ForCausalLM .*; use another model$"),
    "modernbert-decoder": ({}, "TRL would compute another loss than ModernBertDecoderForCausalLM does"),
    "openai-gpt": ({}, "OpenAIGPTLMHeadModel does not .* write `gradient_checkpointing: false`"),
    "zamba2": ({}, "transformers leaves out nn.Linear that share their weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_before_the_first_step(base, tmp_path: Path, name: str) -> None:
    plugin, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        architectures.step(base(name), tmp_path / "out", plugin)
    assert len(str(error.value).splitlines()) <= 2
    if message is ROUTER:
        _, still = architectures.step(
            str(tmp_path / name), tmp_path / "out", plugin, router_aux_loss_coef=0.0
        )
        assert not still or name == "doge"  # whose new base has weights of zero behind a layer


def test_a_model_that_reads_a_few_weights_itself_keeps_them(base, tmp_path: Path) -> None:
    """Gemma 3n clamps the weights of its AltUp, and multiplies an output of a fused linear in place."""
    trainer, _ = architectures.step(base("gemma3n_text"), tmp_path / "out")
    assert "not fused" in trainer.report.fusion.line()


@pytest.mark.parametrize("name", ["qwen3_5_text", "diffllama"])
def test_the_seed_decides_the_adapter_whether_the_base_is_stored_or_not(base, name: str) -> None:
    """Loading these draws random numbers, another count from the store than from 16 bits."""
    directory = base(name)

    def start() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = QLoRAPlugin(dtype="float32").load(directory)
        return {key: value for key, value in model.named_parameters() if value.requires_grad}

    first, later = start(), start()
    assert first.keys() == later.keys()
    assert all(torch.equal(first[key], later[key]) for key in first)


def test_an_exclusion_that_excludes_nothing_is_refused(model_dir) -> None:
    llama = str(model_dir("llama"))
    with pytest.raises(
        UserError, match=r"lora_exclude_modules: 'gate_prj' excludes nothing.*did you mean gate_proj"
    ):
        QLoRAPlugin(dtype="float32", lora_exclude_modules=["gate_prj"]).load(llama)
    model = QLoRAPlugin(dtype="float32", lora_exclude_modules=["gate_proj", "self_attn.q_proj"]).load(llama)
    assert adapted(model) == {"k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    with pytest.raises(UserError, match=r"lora_target_modules: `all-linear` stands alone"):
        QLoRAPlugin(dtype="float32", lora_target_modules=["all-linear", "q_proj"]).load(llama)


@pytest.mark.parametrize(
    ("name", "targets", "leaf"),
    [
        ("mamba2", ["in_proj", "out_proj"], "out_proj"),
        ("bamba", ["q_proj", "out_proj"], "out_proj"),  # which PEFT accepts
        ("bamba", [r".*\.(q|out)_proj"], "out_proj"),
        ("jamba", ["q_proj", "dt_proj"], "dt_proj"),
    ],
)
def test_layers_that_are_read_past_an_adapter_are_named(
    base, name: str, targets: list[str], leaf: str
) -> None:
    message = f"lora_target_modules: state layers of {name} read the weight of {leaf} past an adapter"
    with pytest.raises(UserError, match=message):
        QLoRAPlugin(dtype="float32", lora_target_modules=targets).load(base(name))


@pytest.mark.parametrize("name", ["jamba", "falcon_mamba"])
@torch.no_grad()
def test_the_adapter_of_a_state_layer_counts_on_a_base_in_16_bits_too(
    base, tmp_path: Path, name: str
) -> None:
    """There these multiply by the weight of `dt_proj`; on a quantized base they call the layer."""
    directory = base(name)
    model = QLoRAPlugin(dtype="float32", fast="none").load(directory).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(4, 36).view(2, 16)
    expected = model(ids, use_cache=False).logits
    dense = experts.rounded(directory, experts.load(directory))
    assert not hasattr(dense.config, "_is_quantized")
    served = PeftModel.from_pretrained(dense, tmp_path / "adapter").eval()
    assert (served(ids, use_cache=False).logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "ministral",
        "gemma",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo2",
        "olmo3",
        "granite",
        "smollm3",
        "cohere2",
        "glm4",
        "gpt2",
        "gpt_neox",
        "opt",
        "helium",
        "exaone4",
        "starcoder2",
        "nemotron",
        "internlm3",
        "ernie4_5",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "minicpm3",
        "cwm",
        "gpt_oss",
        "granite_swa",
        "mimo_v2_flash",
    ],
)
def test_a_pair_on_a_tree_computes_what_its_sides_do(name: str) -> None:
    """Windows (64 tokens) are shorter than the second pair's sides."""
    model, lengths = architectures.model(name).requires_grad_(False), [9, 4, 6, 70, 8, 5]
    architectures.assert_computes_trees(model, lengths, [ROOT, 0, 0, ROOT, 3, 3])


@pytest.mark.parametrize("name", ["bert", "zaya", "bloom"])
def test_what_cannot_hold_a_tree_keeps_padded_pairs(name: str) -> None:
    model = architectures.model(name)
    before = model.config._attn_implementation
    assert architectures.prepare_pairs(model) is not None
    assert model.config._attn_implementation == before


def test_a_model_that_numbers_tokens_itself_keeps_padded_pairs(monkeypatch) -> None:
    """Positions of its own would put a branch behind its sibling, and nothing would fail."""
    model = architectures.model("llama")
    inner = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda position_ids=None, **kwargs: inner(**kwargs))
    assert "computes other values" in (architectures.prepare_pairs(model) or "")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ("gemma3n_text", "granitemoe", "falcon", "llava")),
        ("qwen2", torch.bfloat16),  # biases
        ("gpt_oss", torch.bfloat16),
        ("falcon_mamba", torch.float16),
    ],
)
def test_what_is_read_tensor_by_tensor_is_what_trains(base, name: str, dtype: torch.dtype) -> None:
    """Merges and `halfbyte quantize` read so: weights left out, stacks of experts, other names in the files."""
    directory = Path(base(name))
    settings: Any = {"quantization": plain_trl.nf4(dtype), "dtype": dtype, "task": CAUSAL_LM}
    found = streamed.stream(directory, **settings)
    assert found is not None
    whole = streamed.Whole(directory, load_base(str(directory), device=torch.device("cpu"), **settings))
    wanted = dict(whole.parameters())
    for parameter, parts in found.parameters():
        assert parts.keys() == wanted[parameter].keys()
        assert all(same_bytes(parts[part], wanted[parameter][part]) for part in parts), parameter
