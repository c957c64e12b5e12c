"""Training arguments that no run here can have, each refused in one sentence with the reason."""

from typing import Any

from transformers.utils import is_liger_kernel_available

from halfbyte.errors import UserError


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
    if "is_encoder_decoder" in options:  # of trainers over TRL's older preparation of pairs
        for key in ("is_encoder_decoder", "max_completion_length"):
            if options[key]:
                raise UserError("only encoder-decoder models read it; take it out", option=key)


def _is_on(options: Any, key: str) -> bool:
    """Whether an option that only some trainers have is set."""
    return key in options and bool(options[key])
