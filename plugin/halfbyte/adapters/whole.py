"""Modules that are trained in full beside an adapter, and saved with it: `lora_modules_to_save`."""

import bitsandbytes as bnb
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from halfbyte import multimodal
from halfbyte.errors import UserError
from halfbyte.terminal.wording import suggestion


def check(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise :class:`UserError` for ``modules_to_save`` that match nothing, a tower, or what is quantized.

    No weight is read.
    """
    if not config.modules_to_save:
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    beside = tuple(multimodal.other_parts(model))
    for name in sorted(config.modules_to_save):
        found = [path for path in modules if path.endswith(name)]  # as PEFT matches these, from no dot on
        if not found:
            parts = {part for path in modules for part in path.split(".") if not part.isdigit()}
            raise UserError(
                f"{name!r} matches no module{suggestion(name, parts) or '; take it out'}",
                option="lora_modules_to_save",
            )
        towers = [path for path in found if path.startswith(beside)]
        if towers:
            raise UserError(
                f"{name!r} is {towers[0]}, which text does not reach, and no gradient; take it out",
                option="lora_modules_to_save",
            )
        quantized = [path for path in found if any(_is_quantized(each) for each in modules[path].modules())]
        if quantized:
            raise UserError(
                f"{name!r} is or holds {quantized[0]}, whose weights are quantized and cannot be trained in full; take "
                f"it out and give it an adapter, or write `load_in_4bit: false`",
                option="lora_modules_to_save",
            )


def _is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` itself holds packed weights: a linear layer, or stacks of experts, loaded or on meta."""
    if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) or hasattr(module, "parametrizations"):
        return True
    return any(isinstance(each, bnb.nn.Params4bit) for each in module.parameters(recurse=False))
