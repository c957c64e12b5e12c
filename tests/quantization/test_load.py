"""A base in four bits: what is quantized, what is refused, and that evaluation does not corrupt it."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.quantization import fingerprint, load_base, measure_coverage
from halfbyte.task import SEQUENCE_CLASSIFICATION
from tests import architectures, tiny
from tests.plain_trl import nf4

CPU = torch.device("cpu")


def load(path: Path, quantization: BitsAndBytesConfig | None = None, **options) -> PreTrainedModel:
    settings = {"quantization": quantization or nf4(), "dtype": torch.float32, "device": CPU, **options}
    return load_base(str(path), **settings)


@pytest.mark.parametrize("arch", ["llama", "opt", "qwen3", "gemma"])
def test_every_decoder_linear_is_nf4_double_quantized(model_dir: Callable[..., Path], arch: str) -> None:
    model = load(model_dir(arch))
    coverage = measure_coverage(model)
    assert coverage.four_bit_share == 1.0
    assert set(coverage.left_out) == {"embeddings", "norms and biases"} | (
        {"head"} if not model.config.tie_word_embeddings else set()
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert module.weight.quant_state.quant_type == "nf4"
            assert module.weight.quant_state.nested
            assert module.compute_dtype == torch.float32
    assert model.config.use_cache is False


def test_bytes_count_what_is_held(model_dir: Callable[..., Path]) -> None:
    model = load(model_dir("llama"))
    coverage = measure_coverage(model)
    dense = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    assert coverage.bytes_16bit == 2 * sum(p.numel() for p in dense.parameters())
    packed = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    assert coverage.four_bit_weights == 2 * packed
    plain = sum(p.nbytes for p in model.parameters())
    assert plain < coverage.bytes_4bit < plain * 1.2


def test_a_classification_head_of_several_linears_is_left_out_by_design(tmp_path: Path) -> None:
    from transformers import BartConfig, BartForSequenceClassification

    config = BartConfig(
        vocab_size=tiny.VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, num_labels=1,
    )  # fmt: skip
    BartForSequenceClassification(config).save_pretrained(tmp_path / "base")
    coverage = measure_coverage(load(tmp_path / "base", task=SEQUENCE_CLASSIFICATION))
    assert coverage.four_bit_share == 1.0
    assert coverage.left_out["head"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "gpt_oss", "granitemoehybrid"])
def test_a_prequantized_checkpoint_is_in_the_dtype_that_is_requested(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    """Embeddings, norms and routers are `weight`s that are not packed; transformers leaves them as they are stored."""
    base, packed = Path(architectures.save(tmp_path / "base", name)), tmp_path / "packed"
    assert main(["quantize", str(base), "--output_dir", str(packed), "--dtype", "bfloat16"]) == 0
    stored = dict(load(packed, dtype=torch.bfloat16).named_parameters())
    expected = dict(
        load(base, dtype=dtype).named_parameters()
    )  # gpt-oss keeps some in float32 beside float16
    for path, found in load(packed, dtype=dtype).named_parameters():
        if found.is_floating_point():
            assert found.dtype == expected[path].dtype, path
            assert torch.equal(found, stored[path].to(found.dtype)), path


def test_a_prequantized_checkpoint_reloads_to_the_same_bytes(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        model_dir("llama"), quantization_config=nf4(), dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "nf4")
    again = load(tmp_path / "nf4")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert measure_coverage(again).as_dict() == measure_coverage(model).as_dict()
    with pytest.raises(
        UserError, match=r"quantized with bnb_4bit_quant_type=nf4.*write `bnb_4bit_quant_type: nf4`"
    ):
        load(tmp_path / "nf4", nf4(bnb_4bit_quant_type="fp4"))


def test_a_missing_checkpoint_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the model 'no/such-model'"):
        load(Path("no/such-model"))
    with pytest.raises(UserError, match="cannot load the model"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_an_architecture_without_a_causal_lm_is_a_users_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{name}"}}')
    with pytest.raises(
        UserError, match="has no class for causal language modeling with it; use another model"
    ):
        load(tmp_path)


LLAMA = '{"model_type": "llama", '
CONTENTS = ("[]", "null", "{}", "3", "[" * 100_000, "{", '{"model_type": 3}', '{"model_type": "nope"}')
VALUES = (
    '"hidden_size": "x"}',
    '"num_attention_heads": 0}',
    '"quantization_config": 3}',
    '"quantization_config": {}}',
)


@pytest.mark.parametrize("content", [*CONTENTS, *(LLAMA + value for value in VALUES)])
def test_a_configuration_of_any_content_is_a_users_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load(tmp_path)
    assert len(str(error.value).splitlines()) <= 2


def test_code_in_a_checkpoint_is_not_run_without_consent(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    import json
    import shutil

    hostile = tmp_path / "hostile"
    shutil.copytree(model_dir("llama"), hostile)
    config = json.loads((hostile / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (hostile / "config.json").write_text(json.dumps(config))
    (hostile / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="trust_remote_code"):
        load(hostile)
    assert not (tmp_path / "ran").exists()


def reference(model: nn.Module) -> nn.Module:
    """The same adapters on the same weights, dequantized to plain linears."""
    import copy

    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            if module.bias is not None:
                linear.bias.data = module.bias.data
            parent, _, leaf = name.rpartition(".")
            setattr(dense.get_submodule(parent), leaf, linear)
    return nn.Module.float(dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_between_steps_leaves_gradients_right(
    model_dir: Callable[..., Path], dtype: torch.dtype
) -> None:
    """bitsandbytes repacks weights in place at an evaluation on AVX512-BF16 CPUs; ours must not let it."""
    base = load_base(str(model_dir("llama")), quantization=nf4(dtype), dtype=dtype, device=CPU)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    dense = get_peft_model(reference(base), config)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = dense.get_parameter(name).data.clone()
    ids = torch.randint(0, tiny.VOCABULARY, (2, 24))

    def gradients(of: nn.Module) -> dict[str, torch.Tensor]:
        of.train()
        of.zero_grad()
        of(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}

    before = gradients(model)
    model.eval()
    with torch.no_grad():
        evaluated = model(input_ids=ids, labels=ids).loss
    after, expected = gradients(model), gradients(dense)
    assert torch.isfinite(evaluated)
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    assert after.keys() == expected.keys()
    assert any("lora_A" in name for name in after)
    for name, gradient in after.items():
        assert torch.equal(gradient, before[name]), name
        error = (gradient.float() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name}: {error}"


def test_the_fingerprint_is_of_the_bytes_not_the_name(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model_dir("llama"), tmp_path / "copy")
    same = fingerprint(str(tmp_path / "copy"))
    assert same == fingerprint(str(model_dir("llama")))
    assert same != fingerprint(str(model_dir("llama", seed=1)))
    assert fingerprint("no/such-model") is None
