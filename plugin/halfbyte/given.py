"""What is given to ``QLoRAPlugin.trainer`` beside a name: a model that ``load`` made, and arguments of the trainer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from halfbyte import adapters, fast
from halfbyte.errors import UserError
from halfbyte.model_options import ModelOptions
from halfbyte.quantization import Coverage


@dataclass(frozen=True)
class Made:
    """How a model was loaded: by which plugin, under which name, in which dtype, with which new tokens."""

    plugin: ModelOptions
    name: str | None
    dtype: str
    coverage: Coverage
    added_token_ids: tuple[int, ...]


_made: WeakKeyDictionary[nn.Module, Made] = WeakKeyDictionary()

# Arguments of trainers that would undo what the plugin does, and what to write.
_REFUSED = {
    "quantization_config": "the plugin quantizes the base; write `load_in_4bit` or `bnb_4bit_quant_type` in it",
    "ref_model": "the reference is the base without its adapter, or the adapter that `adapter_name_or_path` names; "
    "remove it",
    "model_init": "the plugin loads the model; write `model`, a name or a directory",
    "tokenizer": "trainers call it `processing_class`; rename it",
}


def remember(model: PreTrainedModel | PeftModel, made: Made) -> None:
    """Keep how ``model`` was made for as long as it lives."""
    _made[model] = made


def take(model: Any, plugin: ModelOptions) -> Made:
    """Return how ``model`` was made, and make it plain PEFT again: a trainer fuses and checkpoints as its args say.

    Raises :class:`UserError` for a model that ``plugin`` did not load, or that a trainer has already.
    """
    made = _made.get(model) if isinstance(model, nn.Module) else None
    if made is None or made.plugin != plugin:
        raise UserError(
            f"{type(model).__name__} is not a model that this plugin loaded; give a name or a directory, or what "
            f"`plugin.load(...)` returned, once",
            option="model",
        )
    del _made[model]
    fast.unfuse(model)
    if model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    return made


def check_tokens(
    model: PreTrainedModel | PeftModel,
    made: Made,
    tokenizer: PreTrainedTokenizerBase,
    added_token_ids: Iterable[int],
) -> None:
    """Raise :class:`UserError` if a loaded ``model`` has no row for a token, or does not train one that is new."""
    missing = set(added_token_ids) - set(made.added_token_ids)
    if missing or len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(
            "it was loaded without rows for all tokens of the tokenizer; write "
            "`plugin.load(..., tokenizer=tokenizer, added_token_ids=...)`, or give the trainer a name",
            option="model",
        )


def check(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for ``args`` of another kind, and for ``kwargs`` that the plugin decides."""
    if not isinstance(args, TrainingArguments):
        raise UserError(
            f"{type(args).__name__} are no training arguments; write the config of the trainer, such as `SFTConfig`",
            option="args",
        )
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise UserError(reason, option=name)
    if (config := kwargs.get("peft_config")) is not None:
        fields = ", ".join(f"{name}={value!r}" for name, value in adapters.options_in(config).items())
        raise UserError(
            f"the plugin makes the adapter from its own fields; write `QLoRAPlugin({fields})`",
            option="peft_config",
        )
