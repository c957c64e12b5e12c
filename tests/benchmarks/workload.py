"""What the benchmarks train on: random checkpoints of stated shape, and token rows of stated lengths."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD = 2


@dataclass(frozen=True)
class Case:
    """One workload. The targets are stated for ``threshold`` cases; ``large`` ones get fewer of TRL's columns.

    The ``length`` of a pair is that of its prompt and of each answer; of a ``multi-turn`` one the prompt is longer.
    ``experts`` are those of a layer, of which a token gets two; 0 is a dense model of ``architecture``.
    """

    name: str
    hidden: int = 512
    layers: int = 8
    vocabulary: int = 8192
    lengths: str = "fixed"
    length: int = 512
    batch: int = 4
    completion_only: bool = False
    dropout: float = 0.0
    threshold: bool = False
    large: bool = False
    method: str = "sft"
    experts: int = 0
    architecture: str = "llama"


CASES = [
    Case("lognormal", lengths="lognormal", threshold=True),
    Case("fixed 512", threshold=True),
    Case("lognormal, dropout 0.05", lengths="lognormal", dropout=0.05),
    Case("lognormal, completion only", lengths="lognormal", completion_only=True),
    Case("lognormal, V 32k", vocabulary=32_768, lengths="lognormal"),
    Case(
        "lognormal, V 128k, completion only",
        vocabulary=131_072,
        lengths="lognormal",
        completion_only=True,
        large=True,
    ),
    Case("lognormal, H 1024", hidden=1024, lengths="lognormal", large=True),
    Case("pairs, lognormal", lengths="lognormal", length=128, threshold=True, method="dpo"),
    Case("pairs, fixed 128", length=128, threshold=True, method="dpo"),
    Case("pairs, long shared prefix", lengths="multi-turn", length=64, threshold=True, method="dpo"),
    Case("experts, lognormal", layers=4, lengths="lognormal", experts=16),
    Case("experts, pairs, lognormal", layers=4, lengths="lognormal", length=128, method="dpo", experts=16),
]


def checkpoint(case: Case, directory: Path) -> Path:
    """A random model of the case's shape with a word-level tokenizer, saved once."""
    architecture = "qwen3_moe" if case.experts else case.architecture
    path = directory / f"{architecture}-{case.hidden}-{case.layers}-{case.vocabulary}-{case.experts}"
    if path.exists():
        return path
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": case.vocabulary,
            "hidden_size": case.hidden,
            "intermediate_size": case.hidden * 11 // 4,
            "num_hidden_layers": case.layers,
            "num_attention_heads": case.hidden // 64,
            "num_key_value_heads": case.hidden // 128,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": PAD,
            **_of_architecture(architecture, case),
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer(case.vocabulary).save_pretrained(path)
    return path


def _of_architecture(name: str, case: Case) -> dict[str, Any]:
    """What a configuration has that Llama's has not, in the proportions of published checkpoints."""
    heads = case.hidden // 64
    if name == "qwen3_moe":
        return {
            "num_experts": case.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": case.hidden * 11 // 16,
            "head_dim": 64,
        }
    if name == "minicpm3":
        return {
            "num_key_value_heads": heads,
            "q_lora_rank": case.hidden * 3 // 8,
            "kv_lora_rank": case.hidden // 8,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        }
    if name == "lfm2":
        return {"layer_types": ["conv", "conv", "full_attention", "conv"] * (case.layers // 4)}
    if name == "qwen3_5_text":
        return {
            "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
            * (case.layers // 4),
            "head_dim": 64,
            "linear_num_key_heads": heads // 2,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        }
    return {}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words ``w4``, ``w5``, ... to as many tokens."""
    words = {f"w{i}": i for i in range(4, vocabulary)} | {"<s>": 0, "</s>": 1, "<pad>": PAD, "<unk>": 3}
    level = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=level, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def rows(case: Case, steps: int) -> Dataset:
    """Tokenized rows for ``steps`` batches: ids, and labels that are -100 on prompts if completion only; or pairs."""
    draw = random.Random(7)
    if case.method == "dpo":
        return Dataset.from_list([_pair(case, draw) for _ in range(steps * case.batch)])
    found = []
    for _ in range(steps * case.batch):
        length = case.length
        if case.lengths == "lognormal":  # median 150 tokens, a long tail cut at the longest
            length = min(max(int(draw.lognormvariate(5.0, 0.8)), 16), case.length)
        ids = [draw.randrange(4, case.vocabulary) for _ in range(length)]
        prompt = int(length * draw.uniform(0.3, 0.8)) if case.completion_only else 0
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(found)


def size(row: dict[str, Any]) -> int:
    """The tokens of a row; the words of both sides of a pair, with their prompts."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return sum(len(row[name].split()) for name in ("prompt", "prompt", "chosen", "rejected"))


def _pair(case: Case, draw: random.Random) -> dict[str, str]:
    """A pair in text, a token a word: fixed lengths, lognormal ones, or a long history before short answers.

    TRL takes no tokenized pairs.
    """

    def words(center: int, most: int) -> str:
        length = center
        if case.lengths != "fixed":
            length = min(max(int(draw.lognormvariate(math.log(center), 0.6)), 8), most)
        return "".join(f" w{draw.randrange(4, case.vocabulary)}" for _ in range(length))

    history = 16 * case.length if case.lengths == "multi-turn" else case.length
    most = 4 * case.length
    return {
        "prompt": words(history, min(4 * history, 1536)),
        "chosen": words(case.length, most),
        "rejected": words(case.length, most),
    }
