"""Tiny random models and a tokenizer with a chat template, small enough to train in every test."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    *("the", "a", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "one", "two", "three"),
    *("four", "red", "blue", "green", "sky", "sea", "is", "was"),
)
VOCABULARY = 320


def text(n: int) -> str:
    """A short deterministic sentence, different for each ``n``."""
    return " ".join(WORDS[(n * 7 + i * (n % 5 + 1)) % len(WORDS)] for i in range(6 + n % 5))


def texts(rows: int) -> list[dict[str, str]]:
    return [{"text": text(n)} for n in range(rows)]


def conversations(rows: int) -> list[dict[str, list[dict[str, str]]]]:
    return [
        {
            "messages": [
                {"role": "user", "content": text(n)},
                {"role": "assistant", "content": text(n + 1)},
            ]
        }
        for n in range(rows)
    ]


def preferences(rows: int) -> list[dict[str, str]]:
    return [
        {"prompt": text(n), "chosen": " " + text(n + 1), "rejected": " " + text(n + 3)} for n in range(rows)
    ]


def labelled(rows: int) -> list[dict[str, str | bool]]:
    """Answers of which two in five are wanted."""
    return [
        {"prompt": text(n), "completion": " " + text(n + 1), "label": n % 5 in (0, 3)} for n in range(rows)
    ]


def tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens in ChatML dress; pad and end of sequence differ."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text(n) for n in range(200)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<pad>", bos_token="<|endoftext|>"
    )
    if chat_template:
        fast.chat_template = chat_template
    return fast


_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_GATED = {**_SHAPE, "intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_GATED, tie_word_embeddings=False),
    "opt": lambda: OPTConfig(**_SHAPE, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0),
    "qwen3": lambda: Qwen3Config(**_GATED, head_dim=16, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**_GATED, head_dim=16),
    "granite": lambda: GraniteConfig(**_GATED, logits_scaling=3.0, residual_multiplier=0.5),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_GATED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    # Attention sinks, and a window that is shorter than most rows.
    "gpt_oss": lambda: GptOssConfig(**_GATED, head_dim=16, sliding_window=6, num_local_experts=4),
    "granite_swa": lambda: CONFIG_MAPPING["granite_swa"](**_GATED, sliding_window=6),
}


def save_model(
    directory: Path, arch: str = "llama", *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE
):
    """Write a random model of ``arch`` with its tokenizer to ``directory`` and return the directory."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[arch](), dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer(chat_template=chat_template).save_pretrained(directory)
    return directory


def write_rows(directory: Path, rows: list[dict], held_out: int = 4) -> str:
    """Write ``rows`` as train.jsonl and the last ``held_out`` of them as test.jsonl; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:-held_out]), ("test", rows[-held_out:])):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return str(directory)
