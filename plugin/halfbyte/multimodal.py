"""Multimodal checkpoints, of which training on text loads the language model alone, under its names in the whole.

Adapters then have the names that the whole model has, position ids are the whole model's, and the adapter also loads on
the model with its towers. transformers' own class is used: what text does not reach is left out of it.
"""

import functools
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from halfbyte.errors import UserError
from halfbyte.task import CAUSAL_LM, SEQUENCE_CLASSIFICATION, Task
from halfbyte.terminal.wording import plural

_CLASSES: dict[str, Any] = {
    CAUSAL_LM.name: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    SEQUENCE_CLASSIFICATION.name: MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
# The auto class of whole multimodal models.
AUTO_CLASS = "AutoModelForImageTextToText"
# What transformers' classes call the language model inside their backbone.
_LANGUAGE_MODELS = ("language_model", "text_model")
# Models that read their other parts for a text as well: they are loaded whole.
_READ_BY_TEXT = {"gemma3n"}
# Tensors of a file that are not the language model's, nor a head's.
_BESIDE = r"^(?!(.*\.)?({}|lm_head|score)\.)"


def model_class(config: PretrainedConfig, task: Task, *, entire: bool = False) -> Any:
    """The class that loads a base for ``task``: its auto class, or of a multimodal checkpoint what :func:`alone` makes.

    It has ``from_pretrained`` and ``from_config``. ``entire`` keeps all parts of a multimodal model.
    """
    auto = getattr(transformers, task.auto_class)
    if not is_multimodal(config):
        return auto
    classes = _CLASSES.get(task.name, {})
    if type(config) not in classes:
        return auto
    found = classes[type(config)]
    return whole(found) if entire or config.model_type in _READ_BY_TEXT else alone(found)


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether ``config`` is that of a language model with towers beside it, in a class of transformers' own."""
    return (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and config.get_text_config() is not config
        and not config.is_encoder_decoder
    )


def auto_class(config: PretrainedConfig, task: Task) -> str:
    """The name of the auto class that loads the whole model, on which an adapter of ``task`` fits."""
    return AUTO_CLASS if task == CAUSAL_LM and is_multimodal(config) else task.auto_class


def language_model(model: PreTrainedModel) -> str | None:
    """The path of the language model in a multimodal ``model``; None in any other."""
    backbone = model.base_model
    if not is_multimodal(model.config):
        return None
    for name in _LANGUAGE_MODELS:
        if isinstance(getattr(backbone, name, None), nn.Module):
            return f"{model.base_model_prefix}.{name}" if backbone is not model else name
    return None


def left_out(model: PreTrainedModel) -> list[str]:
    """The paths of the parts of ``model`` that are not loaded; none where it is loaded whole."""
    return [name for name in other_parts(model) if isinstance(model.get_submodule(name), Absent)]


def other_parts(model: PreTrainedModel) -> list[str]:
    """The paths of the modules beside the language model of a multimodal ``model``: towers and projectors."""
    path = language_model(model)
    if path is None:
        return []
    above, _, name = path.rpartition(".")
    kept = {name}
    start = f"{above}." if above else ""
    head = model.get_output_embeddings()
    return [
        start + each
        for each, module in model.get_submodule(above).named_children()
        if each not in kept and module is not head
    ]


def kept_in_16_bits(config: PretrainedConfig, task: Task) -> list[str]:
    """The modules of a base that are not quantized: the towers of a multimodal one that is loaded whole."""
    if not is_multimodal(config) or config.model_type not in _READ_BY_TEXT:
        return []
    with torch.device("meta"):
        return other_parts(model_class(config, task).from_config(config))


@functools.cache
def alone(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """``cls`` with its language model alone: weights of the other parts are neither made nor read from files."""
    return _derived(_Alone, cls)


@functools.cache
def whole(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """``cls`` as it is, with the ``from_config`` of the auto classes."""
    return _derived(_Checked, cls)


def _derived(mixin: type, cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # transformers reads the name of the class (config.json) and its module (attention implementations).
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


class _Checked:
    """A mixin over a multimodal class of transformers: the auto classes' ``from_config``, and no weight left random."""

    @classmethod
    def from_pretrained(cls, name: Any, **kwargs: Any) -> Any:
        """Load a checkpoint. Raises :class:`UserError` where it lacks a weight of the model."""
        model, info = super().from_pretrained(name, output_loading_info=True, **kwargs)  # type: ignore[misc]
        new = set(SEQUENCE_CLASSIFICATION.unquantized)
        if missing := sorted(key for key in info["missing_keys"] if new.isdisjoint(key.split("."))):
            raise UserError(
                f"{name}: {plural(len(missing), 'weight')} of {cls.__name__} are not in its files, the first "
                f"{missing[0]}; save the model with transformers 5",
                option="model_name_or_path",
            )
        return model

    @classmethod
    def from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Any:
        """Make a model without a checkpoint, as the auto classes do."""
        kwargs.pop("trust_remote_code", None)
        return cls._from_config(config, **kwargs)  # type: ignore[attr-defined]


class _Alone(_Checked):
    """A mixin over a multimodal class of transformers."""

    # Some of these classes say no, and pass it on to their loss all the same: without it the Trainer would weigh
    # micro-batches and ranks alike, however many tokens they have.
    accepts_loss_kwargs = True

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        path = language_model(self)
        if path is None:
            raise UserError(
                f"{type(self).__name__} has no language model that text alone trains; use another model",
                option="model_name_or_path",
            )
        above = self.get_submodule(path.rpartition(".")[0])
        gone = other_parts(self)
        for name in gone:
            setattr(above, name.rpartition(".")[2], _names_of(self.get_submodule(name)))
        # What the whole model has recorded of the parts: tied weights, blocks to shard, names in files.
        prefixes = tuple(f"{name}." for name in gone)
        ties = self.all_tied_weights_keys.items()
        self.all_tied_weights_keys = {one: other for one, other in ties if not one.startswith(prefixes)}
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules or () if name in classes}
        self._keys_to_ignore_on_load_unexpected.add(_BESIDE.format(re.escape(path.rpartition(".")[2])))

    def set_attn_implementation(self: Any, attn_implementation: Any, **kwargs: Any) -> None:
        """Set it for the language model: transformers warns of configurations that no module has."""
        if isinstance(attn_implementation, str):
            text = self.config.get_text_config()
            names = [name for name in self.config.sub_configs if getattr(self.config, name, None) is text]
            attn_implementation = dict.fromkeys(("", *names), attn_implementation)
        super().set_attn_implementation(attn_implementation, **kwargs)  # type: ignore[misc]


class Absent(nn.Module):
    """A part that is not loaded. Its names remain, so that names of adapters match as in the whole model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise :class:`UserError`: something other than text has come."""
        raise UserError(
            "the base is loaded without its vision and audio parts, and a row has images, videos or sounds; "
            "halfbyte trains on text",
            option="dataset_name",
        )


def _names_of(module: nn.Module) -> Absent:
    empty = Absent()
    for name, child in module.named_children():
        empty.add_module(name, _names_of(child))
    return empty
