"""Tiny bases of every architecture that the installed transformers has, and a walk over them.

``python -m tests.architectures [NAME...]`` takes one SFT step on each: it trains, or is refused in one sentence. What
ends otherwise, and adapters that no gradient moved, are printed.
"""

import inspect
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from halfbyte import QLoRAPlugin, multimodal
from halfbyte.errors import UserError
from halfbyte.fast import batches
from halfbyte.fast.forest import Forest
from halfbyte.task import CAUSAL_LM
from tests import tiny

_LARGEST = 20_000_000  # weights; a shape that stays larger is not walked

# Fields of configurations, by the size they are given.
_SIZES: dict[int, str] = {
    tiny.VOCABULARY: "vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions max_seq_len n_ctx",
    128: "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner feed_forward_size "
    "mlp_hidden_size block_ff_dim mamba_d_ssm intermediate_size_mlp shared_intermediate_size",
    64: "hidden_size d_model n_embd dim n_embed embed_dim word_embed_proj_dim embedding_size moe_intermediate_size "
    "shared_expert_intermediate_size lru_width sliding_window block_dim conv_dim out_hidden_size projection_dim",
    32: "q_lora_rank kv_lora_rank qk_head_dim block_multiple_of image_size",
    16: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim kv_channels mamba_d_head "
    "mamba_head_dim mamba_headdim mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim patch_size "
    "hidden_size_per_layer_input",
    8: "mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank mamba_n_heads mamba_num_heads "
    "num_mamba_heads rotary_dim laurel_rank adapter_rank",
    4: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts mamba_d_conv linear_num_value_heads "
    "mm_tokens_per_image",
    3: "pad_token_id conv_L_cache num_channels",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_key_value_heads "
    "num_experts_per_tok moe_topk moe_k mamba_expand n_mamba_heads linear_num_key_heads altup_num_inputs eos_token_id",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_ngroups mamba_n_groups n_groups",
    0: "bos_token_id num_kv_shared_layers",
}  # fmt: skip
_WIDTHS = {
    *_SIZES[128].split(),
    *_SIZES[64].split(),
    *(name for size in (2, 4, 8) for name in _SIZES[size].split() if "heads" in name or name == "n_head"),
} - {"sliding_window"}
_BY_FIELD: dict[str, float] = {name: size for size, names in _SIZES.items() for name in names.split()}
# Rates that would let no two trainers compute the same.
_RATES = "resid_pdrop embd_pdrop attn_pdrop attention_dropout hidden_dropout dropout residual_dropout"
_BY_FIELD |= dict.fromkeys(_RATES.split(), 0.0)
# Arguments of one step in a test.
_STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
# What an architecture requires beside.
_MORE: dict[str, dict[str, Any]] = {
    "falcon_mamba": {"state_size": 2},
    "gemma3n_text": {
        "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 2,
        "altup_coef_clip": 120.0,
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "num_experts": 1, "num_experts_per_tok": 1, "use_mamba_kernels": False},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": [], "num_local_experts": 1},
    "mamba": {"state_size": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "minimax": {"sliding_window": None},
    "reformer": {"is_decoder": True},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
               "num_mem_blocks": 1, "n_mamba_heads": 8, "attention_head_dim": 32},
    # Of several state layers and one of attention, one each.
    **{name: {"layer_types": ["linear_attention", "full_attention"]}
       for name in ("granitemoehybrid", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    "bamba": {"attn_layer_indices": [1]},
    "zaya": {"num_experts_per_tok": 1},
    **{name: {"num_key_value_heads": 4}  # as many as heads, where these are of a latent
       for name in ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_linear",
                    "longcat_flash", "minicpm3", "mistral_large4_text", "youtu")},
    **{name: {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}}
       for name in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text", "glm_ocr_text")},
    **{name: {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section,
                                  "partial_rotary_factor": 0.5}}
       for name, section in (("glm4v_text", [1, 1, 2]), ("glm4v_moe_text", [1, 1, 2]))},
}  # fmt: skip

# The architectures of the table in plugin/README.md: dense, hybrid, mixtures of experts, multimodal. PhiMoE is not: its
# routers draw noise in training, so that no two forwards are alike.
DECODERS = [
    "apertus",
    "arcee",
    "bloom",
    "cohere",
    "cohere2",
    "cwm",
    "diffllama",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "glm",
    "glm4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "internlm3",
    "llama",
    "minicpm3",
    "ministral",
    "ministral3",
    "mistral",
    "modernbert-decoder",
    "mpt",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "openai-gpt",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
    "youtu",
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
    "zamba2",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "llama4_text",
    "minimax",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "aya_vision",
    "cohere2_vision",
    "exaone4_5",
    "gemma3",
    "gemma4",
    "glm4v",
    "glm46v",
    "idefics3",
    "internvl",
    "lfm2_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "mllama",
    "ovis2",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
]


def config(name: str, *, wider: int = 1, **more: Any) -> PretrainedConfig:
    """A tiny configuration of the architecture ``name``; ``wider`` multiplies its widths and heads."""
    return _shrunk(CONFIG_MAPPING[name], wider, **{**_MORE.get(name, {}), **more})


def model(name: str, **more: Any) -> PreTrainedModel:
    """A random model of the architecture ``name`` in float32, the same each time; a multimodal one whole."""
    torch.manual_seed(0)
    found = config(name, **more)
    auto = getattr(transformers, multimodal.auto_class(found, CAUSAL_LM))
    return auto.from_config(found, dtype=torch.float32)


def prepare_pairs(model: PreTrainedModel) -> str | None:
    """Why ``model`` keeps padded pairs under a trainer's defaults, or None."""
    loading = SimpleNamespace(dispatch_batches=None, split_batches=False)
    args: Any = SimpleNamespace(neftune_noise_alpha=None, accelerator_config=loading)
    return batches.prepare_pairs(model, args, DataCollatorForPreference(pad_token_id=3))


@torch.no_grad()
def assert_computes_trees(model: PreTrainedModel, lengths: list[int], parents: list[int]) -> None:
    """Each leaf of the forest has the logits on it that its path has alone."""
    assert batches.use_forests(model, batches.PAIR) is None
    forest = Forest.of_lengths(lengths, parents)
    ids = torch.randint(4, tiny.VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    given: Any = {"position_ids": forest.positions(), "attention_mask": forest.tensor(), "use_cache": False}
    found = model.eval()(input_ids=ids, **given).logits[0]
    for leaf in set(range(len(parents))) - set(parents):
        at = torch.cat([torch.arange(*forest.spans[segment]) for segment in forest.path(leaf)])
        alone = model(input_ids=ids[:, at], use_cache=False).logits[0]
        assert (found[at] - alone).norm() <= 1e-5 * alone.norm()


def save(directory: Path, name: str, **more: Any) -> str:
    """Write a random base of the architecture ``name`` with its tokenizer, and return the directory."""
    with torch.device("meta"):
        empty = model(name, **more)
    if (weights := sum(parameter.numel() for parameter in empty.parameters())) > _LARGEST:
        raise ValueError(f"{weights:,} weights")
    model(name, **more).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return str(directory)


def step(directory: str, output: Path, plugin: dict[str, Any] | None = None, **options: Any) -> Any:
    """Take one SFT step on the base in ``directory``; return the trainer, and the adapters that did not move."""
    args = SFTConfig(output_dir=str(output), **{**_STEP, "max_length": 64, **options})
    trainer = QLoRAPlugin(**{"dtype": "float32", "lora_r": 4, **(plugin or {})}).trainer(
        SFTTrainer, model=directory, args=args, train_dataset=Dataset.from_list(tiny.texts(8))
    )
    trainer.train()
    still = [
        name.partition(".lora_B")[0].removeprefix("base_model.model.")
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and "lora_B" in name and not parameter.any()
    ]
    return trainer, still


def dpo_loss(directory: str, output: Path, plugin: dict[str, Any] | None = None, **options: Any) -> float:
    """The loss of the first DPO step on the base in ``directory``."""
    args = DPOConfig(output_dir=str(output), **{**_STEP, "logging_steps": 1, **options})
    trainer = QLoRAPlugin(dtype="float32", lora_r=4, **(plugin or {})).trainer(
        DPOTrainer, model=directory, args=args, train_dataset=Dataset.from_list(tiny.preferences(4))
    )
    trainer.train()
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def _shrunk(cls: type[PretrainedConfig], wider: int = 1, **more: Any) -> PretrainedConfig:
    fields = {*inspect.signature(cls.__init__).parameters}
    fields |= {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
    aliases = getattr(cls, "attribute_map", {})
    values = {name: size for name, size in _BY_FIELD.items() if name in fields or name in aliases}
    values = {name: size for name, size in values.items() if aliases.get(name) not in values}
    parts = getattr(cls, "sub_configs", {})
    if AutoConfig in parts.values():
        default = cls()
    inner = {}
    for name, part in parts.items():
        if part is AutoConfig:
            if (own := getattr(default, name, None)) is None:
                continue
            part = type(own)
        given = {**_MORE.get(part.model_type, {}), **more.pop(name, {})}
        inner[name] = _shrunk(part, wider, **given).to_dict()
    values = {**values, **more}
    grown = {name: wider * values[name] for name in _WIDTHS & values.keys() if isinstance(values[name], int)}
    return cls(**{**values, **grown, **inner})


def _walk(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    counts: dict[str, int] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            try:
                base = save(Path(directory) / "base", name)
            except Exception as error:  # this walk's shape, not halfbyte
                outcome, line = "no shape", f"{type(error).__name__}: {str(error)[:100]}"
            else:
                try:
                    _, still = step(base, Path(directory) / "out")
                    outcome, line = "trained", f"without a gradient: {', '.join(still)}" if still else ""
                except UserError as error:
                    outcome, line = "refused", str(error)
                except Exception as error:
                    outcome, line = "FAILED", f"{type(error).__name__}: {error}"
        counts[outcome] = counts.get(outcome, 0) + 1
        print(f"{name}: {outcome} {line}", flush=True)
    print(counts)


if __name__ == "__main__":
    _walk(
        sys.argv[1:]
        or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
    )
