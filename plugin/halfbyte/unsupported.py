"""Training arguments that no run here can have, each refused in one sentence with the reason."""

from typing import Any

from transformers.utils import is_liger_kernel_available

from halfbyte.errors import UserError

# Options that decide the rows of a micro-batch in another way than `max_tokens_per_batch`.
_OTHER_BATCHES = {
    "packing": "it fills every row to max_length, which is a token budget by itself",
    "dataset_streaming": "a stream does not say how long its rows are",
    "streaming": "a stream does not say how long its rows are",
    "dataloader_drop_last": "it drops batches of fewer rows, and all of these have different numbers",
    "auto_find_batch_size": "it looks for a number of rows",
}


def check(options: Any, device_type: str, processes: int) -> None:
    """Raise :class:`UserError` for what ``options``, a mapping, ask of ``processes`` ranks on such a device."""
    checkpointing = options["gradient_checkpointing_kwargs"] or {}
    if options["gradient_checkpointing"] and checkpointing.get("use_reentrant") and processes > 1:
        raise UserError(
            "use_reentrant: true fails under DDP with adapters (a parameter is marked ready twice); take it out",
            option="gradient_checkpointing_kwargs",
        )
    if options["use_liger_kernel"] and not is_liger_kernel_available():
        raise UserError(
            "liger-kernel is not installed; `pip install liger-kernel`, or take it out",
            option="use_liger_kernel",
        )
    if _is_on(options, "activation_offloading") and device_type == "cpu":
        raise UserError(
            "it moves activations from a GPU to the CPU, and this run is on the CPU; take it out",
            option="activation_offloading",
        )
    if _is_on(options, "use_vllm") and options["load_in_4bit"]:
        raise UserError(
            "TRL merges the adapter into the base and out again for every sync, which quantizes a 4-bit base anew "
            "(1.3% off after one sync, 121% after a hundred); take it out, or write `load_in_4bit: false`",
            option="use_vllm",
        )
    if _is_on(options, "generate_during_eval"):
        raise UserError(
            "TRL hands its samples to W&B or Comet only, and draws them on every rank; take it out",
            option="generate_during_eval",
        )
    if (
        _is_on(options, "eval_packing")
        and not options["packing"]
        and options["packing_strategy"] != "wrapped"
    ):
        raise UserError(
            "without `packing: true` TRL evaluates each packed row as one sequence, whose parts attend to those before "
            "them; write `packing: true` as well, or take it out",
            option="eval_packing",
        )
    if options["max_tokens_per_batch"] is not None:
        _check_token_budget(options)
    if "is_encoder_decoder" in options:  # of trainers over TRL's older preparation of pairs
        for key in ("is_encoder_decoder", "max_completion_length"):
            if options[key]:
                raise UserError("only encoder-decoder models read it; take it out", option=key)


def check_samples(options: Any) -> None:
    """Raise :class:`UserError` for ``sample_prompts`` where no completion can be made, or that nothing reads."""
    if options["sample_prompts"] is None:
        for key, unset in (("sample_steps", None), ("sample_max_new_tokens", 64)):
            if options[key] != unset:
                raise UserError("has no effect without `sample_prompts`; take it out", option=key)
        return
    if options["lora_task_type"] != "CAUSAL_LM":
        raise UserError(
            "this recipe's model scores texts and completes none; take it out", option="sample_prompts"
        )


def _check_token_budget(options: Any) -> None:
    """Refuse what makes batches in another way than ``max_tokens_per_batch``."""
    for key, reason in _OTHER_BATCHES.items():
        if _is_on(options, key):
            raise UserError(f"{reason}; take it or max_tokens_per_batch out", option=key)
    if (order := _name(options["train_sampling_strategy"])) not in ("random", "sequential"):
        raise UserError(
            f"{order} makes batches of a number of rows; write random or sequential, or take max_tokens_per_batch out",
            option="train_sampling_strategy",
        )
    if "on_oom" in options and options["on_oom"] == "accumulate":
        raise UserError(
            "accumulate divides the rows of a micro-batch, which max_tokens_per_batch does not fix; write `stop`, and "
            "a smaller max_tokens_per_batch with more gradient_accumulation_steps",
            option="on_oom",
        )


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))


def _is_on(options: Any, key: str) -> bool:
    """Whether an option that only some trainers have is set."""
    return key in options and bool(options[key])
