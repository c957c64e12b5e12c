"""What values are allowed beyond their types: ranges and names."""

import sys
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

Check = Callable[[float], bool]

# The first rule that the class's own default satisfies applies: `beta` is 0 by default in GRPO and not in DPO.
RANGES: tuple[tuple[str, Check, str], ...] = (
    (
        "greater than 0",
        lambda v: v > 0,
        "learning_rate num_train_epochs adam_epsilon beta "
        "loraplus_lr_ratio temperature repetition_penalty desirable_weight undesirable_weight "
        "neftune_noise_alpha discopop_tau peak_flops",
    ),
    (
        "at least 0",
        lambda v: v >= 0,
        "beta weight_decay max_grad_norm eval_delay data_seed dataloader_num_workers top_k "
        "router_aux_loss_coef center_rewards_coefficient",
    ),
    (
        "at least 1",
        lambda v: v >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r "
        "lora_alpha max_length max_tokens_per_batch save_total_limit eval_accumulation_steps torch_empty_cache_steps "
        "dataset_num_proc ddp_timeout dataloader_prefetch_factor pad_to_multiple_of "
        "precompute_ref_batch_size ref_model_sync_steps "
        "ddp_bucket_cap_mb num_generations num_iterations max_completion_length generation_batch_size "
        "steps_per_generation sample_steps sample_max_new_tokens",
    ),
    (
        "a whole number of steps, or a share of all steps below 1, greater than 0",
        lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
        "logging_steps save_steps eval_steps",
    ),
    (
        "a whole number of steps, or a share of all steps below 1",
        lambda v: 0 <= v < 1 or (v >= 1 and v == int(v)),
        "warmup_steps",
    ),
    ("-1 (not set) or at least 1", lambda v: v == -1 or v >= 1, "max_steps"),
    (
        "at least 0 and below 1",
        lambda v: 0 <= v < 1,
        "lora_dropout adam_beta1 adam_beta2 label_smoothing_factor",
    ),
    ("at least 0 and below 0.5", lambda v: 0 <= v < 0.5, "label_smoothing"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "ref_model_mixup_alpha ld_alpha"),
    ("above 0, at most 1", lambda v: 0 < v <= 1, "top_p"),
    (
        "a share between 0 and 1, or a whole number of rows",
        lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
        "test_split_size",
    ),
    ("from 0 to 4294967295", lambda v: 0 <= v < 2**32, "seed"),
)

# What no run can mean: numbers that overflow float32, leave nothing of the weights after one step, start so many
# processes that the machine stops, or have upstream set aside an element for each.
_LARGEST = {
    "adam_epsilon": 1.0,
    "beta": 1e6,
    "dataloader_num_workers": 1024,
    "dataloader_prefetch_factor": 1024,
    "dataset_num_proc": 1024,
    "learning_rate": 1e6,
    "lora_alpha": 1e6,
    "lora_r": 65536,
    "loraplus_lr_ratio": 1e6,
    "max_completion_length": 1e8,
    "max_length": 1e8,
    "max_tokens_per_batch": 1e8,
    "num_train_epochs": 1e6,
    "pad_to_multiple_of": 65536,
    "peak_flops": 1e18,
    "per_device_eval_batch_size": 1e6,
    "per_device_train_batch_size": 1e6,
    "sample_max_new_tokens": 4096,
    "weight_decay": 1e3,
}
_LARGEST_OF_ALL = 1e12  # of what is not named above

# Declared float upstream, but a whole number counts steps or rows and a fraction is a share.
COUNTS = ("eval_steps", "logging_steps", "save_steps", "test_split_size", "warmup_steps")

# Names that upstream checks only where it uses them; tests compare each with upstream's code.
CHOICES: dict[str, Sequence[str]] = {
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    "pad_to_multiple_of": ("auto",),
}
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


def range_for(name: str, default: Any) -> tuple[str, Check] | None:
    """Return the range of field `name` in words and as a test, or None."""
    for words, check, names in RANGES:
        if name in names.split():
            number = isinstance(default, int | float) and not isinstance(default, bool)
            if not number or check(default):
                return words, check
    return None


def largest_for(name: str) -> float:
    """Return the largest number that field `name` may have."""
    return _LARGEST.get(name, _LARGEST_OF_ALL)


def choices_for(owner: type, name: str, metadata: dict[str, Any], members: Sequence[Any]) -> tuple[Any, ...]:
    """Return the values that field `name` of `owner` may take, upstream's where it lists them; () for any.

    `members` are the classes its annotation names, of which an Enum is a list of choices. Those of `report_to` are
    known once transformers is imported.
    """
    if metadata.get("choices"):
        return tuple(metadata["choices"])
    for member in members:
        if isinstance(member, type) and issubclass(member, Enum):
            return tuple(item.value for item in member)
    if name == "report_to" and "transformers" in sys.modules:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        return ("none", "all", *sorted(INTEGRATION_TO_CALLBACK))
    if name == "loss_type":
        return DPO_LOSSES if any(base.__name__ == "DPOConfig" for base in owner.__mro__) else ()
    return tuple(CHOICES.get(name, ()))
