"""Padding-free batches: sequences do not attend to each other, and losses and gradients equal padded batches'."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssForCausalLM,
    LlamaConfig,
    MistralConfig,
)
from transformers.masking_utils import create_chunked_causal_mask
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from halfbyte import QLoRAPlugin
from halfbyte.fast import batches, varlen
from halfbyte.fast.forest import Forest
from tests import tiny

LENGTHS = (13, 5, 21, 1, 8)
ARCHITECTURES = {
    **{name: tiny.CONFIGS[name] for name in ("llama", "opt", "qwen3", "gemma")},
    # A window shorter than the longest sequence: the mask must hold both.
    "mistral": lambda: MistralConfig(**tiny._GATED, sliding_window=6),
    "mistral wide": lambda: MistralConfig(**tiny._GATED, sliding_window=64),
    "gemma3": lambda: Gemma3TextConfig(**tiny._GATED, head_dim=16, sliding_window=6),
    # Sinks, and scores that are bounded, which sdpa does not know.
    "gpt_oss": tiny.CONFIGS["gpt_oss"],
    "gemma2": lambda: Gemma2Config(
        **tiny._GATED, head_dim=16, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=1
    ),
}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = ARCHITECTURES[name]()
    own = {"gemma2": Gemma2ForCausalLM, "gemma3": Gemma3ForCausalLM, "gpt_oss": GptOssForCausalLM}
    cls = AutoModelForCausalLM
    model = own[name](config) if name in own else cls.from_config(config, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):
            parameter.requires_grad_(False).add_(1)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for length in LENGTHS:
        ids = torch.randint(4, tiny.VOCABULARY, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return found


def step(model: torch.nn.Module, *, padding_free: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    batch = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=padding_free)(rows())
    out = model(**batch, fused_lm_head=True)
    loss = -out.log_probs.sum() / out.label_mask.sum()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_equal_padded_batches(name: str, checkpointing: bool) -> None:
    model = make(name).train()
    loss, grads = step(model, padding_free=False)
    assert batches.use_forests(model) is None
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ours, our_grads = step(model, padding_free=True)
    assert abs(ours - loss) <= 1e-6 * loss
    for parameter in grads:
        assert (our_grads[parameter] - grads[parameter]).norm() <= 1e-5 * grads[parameter].norm() + 1e-9
    # The same model on padded batches is what it was.
    assert torch.equal(step(model, padding_free=False)[0], loss)


@pytest.mark.parametrize("name", ["llama", "opt", "mistral"])
def test_no_sequence_attends_to_another(name: str) -> None:
    model = make(name).eval()
    assert batches.use_forests(model) is None
    batch = {**DataCollatorForLanguageModeling(pad_token_id=3, padding_free=True)(rows()), "use_cache": False}
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, : LENGTHS[0]] = 7
    with torch.no_grad():
        first, second = (model(**b).logits[0] for b in (batch, changed))
    assert not torch.allclose(first[: LENGTHS[0]], second[: LENGTHS[0]], atol=1e-3)
    assert torch.equal(first[LENGTHS[0] :], second[LENGTHS[0] :])


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_a_completion_with_a_cache_is_that_of_the_model_itself(name: str) -> None:
    """Left padding, a window that is shorter than the row, and queries one after the other."""
    model = make(name).eval()
    given = {
        "input_ids": torch.arange(4, 28).view(2, 12),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    given["attention_mask"][0, :5] = 0
    expected = model.generate(**given)
    assert batches.use_forests(model) is None
    found = model.generate(**given)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5)


def test_the_mask_is_a_forest_and_not_a_square() -> None:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    model = make("llama")
    assert batches.use_forests(model) is None
    seen = []

    def look(module, args, kwargs) -> None:
        seen.append(kwargs["attention_mask"])

    model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    model(input_ids=torch.full((1, sum(LENGTHS)), 9), position_ids=positions, use_cache=False)
    assert Forest.of_tensor(seen[0]) == Forest.of_lengths(LENGTHS)


def test_chunks_of_attention_begin_again_with_each_sequence() -> None:
    varlen.register()
    config = LlamaConfig(attn_implementation=varlen.IMPLEMENTATION, attention_chunk_size=8)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    mask = create_chunked_causal_mask(config, torch.zeros(1, sum(LENGTHS), 4), None, None, positions)
    assert mask is not None
    assert Forest.of_tensor(mask) == Forest.of_lengths([8, 5, 5, 8, 8, 5, 1, 8])


def test_one_sequence_has_no_mask() -> None:
    assert varlen.mask(1, 5, 5, mask_function=lambda b, h, q, k: k <= q, attention_mask=None) is None


def test_a_model_without_the_interface_keeps_its_attention() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    before = model.config._attn_implementation
    assert batches.use_forests(model) is not None
    assert model.config._attn_implementation == before


def test_a_model_that_hides_boundaries_from_its_attention_is_found_out(monkeypatch) -> None:
    model = make("llama")
    inner = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda position_ids=None, cu_seq_lens_q=None, **kwargs: inner(**kwargs)
    )
    assert "does not pass sequence boundaries" in (batches.use_forests(model) or "")
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_fails_on_such_a_batch_keeps_padded_ones(monkeypatch) -> None:
    model = make("llama")

    def fail(**kwargs) -> None:
        raise RuntimeError("not with these arguments")

    monkeypatch.setattr(model.model, "forward", fail)
    assert "does not pass sequence boundaries" in (batches.use_forests(model) or "")
    assert model.config._attn_implementation == "sdpa"


def test_the_probe_draws_no_random_numbers() -> None:
    model = make("opt").train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert batches.use_forests(model) is None
    assert torch.equal(torch.rand(1), expected)


def test_noise_that_is_scaled_by_the_row_keeps_padded_rows(tmp_path) -> None:
    """NEFTune divides by the length of a row, and a batch without padding is one row."""
    model = tiny.save_model(tmp_path / "model", "llama")
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", neftune_noise_alpha=5.0
    )
    plugin = QLoRAPlugin(dtype="float32")
    rows = Dataset.from_list(tiny.texts(8))
    trainer = plugin.trainer(SFTTrainer, model=str(model), args=args, train_dataset=rows)
    assert "neftune_noise_alpha" in str(trainer.report.fusion.batches)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["input_ids"]) == 8
