"""Saved adapters: where they are, which base and options they were trained with, and how to continue them."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte import multimodal, names
from halfbyte.adapters import config, fresh, lineage, patterns, tensors
from halfbyte.adapters.targets import layer_of
from halfbyte.errors import UserError, about
from halfbyte.task import TASKS, Task
from halfbyte.terminal.wording import first_line, shorten

_OPTION = "adapter_name_or_path"
_FILES = [
    config.FILE,
    "adapter_model.safetensors",
    "run.json",
    "tokenizer*",
    "special_tokens_map.json",
    "*.jinja",
]
# Options that a saved adapter fixes, and PEFT's names for them.
_FIXED = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_exclude_modules": "exclude_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def resolve(model: str | None, adapter: str | None) -> tuple[str, str | None]:
    """Return the base to load, and the directory of the adapter to start from, if any.

    An adapter directory given as ``model`` stands for its base and itself. ``adapter`` is a directory or a hub id;
    ``~`` is the home directory in both.

    Raises :class:`UserError` if there is no model, if two adapters are given, or if ``adapter`` is not found.
    """
    model, adapter = (None if name is None else os.path.expanduser(name) for name in (model, adapter))
    if model is not None and directory_of(model) is not None:
        if adapter is not None and adapter != model:
            raise UserError(
                f"{model!r} is an adapter directory, and adapter_name_or_path {adapter!r} names another adapter; "
                f"give one of them",
                option="model_name_or_path",
            )
        return base_of(model), model
    if adapter is not None:
        adapter = _located(adapter)
        return model or base_of(adapter), adapter
    if model is None:
        raise UserError("no model: write `model_name_or_path` (a hub id or a directory)")
    return model, None


def directory_of(name_or_path: str) -> Path | None:
    """The path if it is a local adapter directory, else None."""
    path = Path(name_or_path).expanduser()
    return path if (path / config.FILE).is_file() else None


@about(_OPTION)
def base_of(adapter: str) -> str:
    """The base model that the adapter directory ``adapter`` names."""
    base = config.read(adapter).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{Path(adapter) / config.FILE} names no base model; write `model_name_or_path`")
    return os.path.expanduser(str(base))


def revision_of(adapter: str) -> str:
    """The revision of its base that ``adapter`` was trained on."""
    return str(config.read(adapter).get("revision") or _recorded_base(adapter).get("revision") or "main")


@about(_OPTION)
def options_of(adapter: str, requested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that ``adapter`` fixes, as they were when it was made.

    Raises :class:`UserError` if a ``requested`` one differs, which would have no effect, or if the weights of
    ``adapter`` contradict its configuration.
    """
    saved = config.read(adapter)
    if requested.get("init_lora_weights") is not None:
        raise UserError(
            f"the adapter {adapter!r} starts from the weights it was saved with; remove this option",
            option="init_lora_weights",
        )
    found = {option: saved.get(name) for option, name in _FIXED.items()}
    if isinstance(found["lora_target_modules"], list):
        # Saved, `all-linear` is the path of each layer that it matched, or of its weight.
        parameters = found["lora_target_parameters"] or []
        weights = {path for each in parameters if (path := layer_of(each)) is not None}
        names = {path.rpartition(".")[2] for path in (*found["lora_target_modules"], *weights)}
        found["lora_target_modules"] = sorted(names)
        found["lora_target_parameters"] = [each for each in parameters if layer_of(each) is None] or None
    for option, theirs in found.items():
        ours = requested.get(option, theirs)
        if ours != ["all-linear"] and _plain(ours) != _plain(theirs):
            raise UserError(
                f"{ours} is not what the adapter {adapter!r} was made with ({theirs}), and a saved adapter keeps "
                f"its own; remove this option, or start a fresh adapter",
                option=option,
            )
    for option in ("lora_target_modules", "lora_exclude_modules"):
        if isinstance(found[option], str):
            found[option] = [found[option]]
    tensors.check_tensors(adapter, saved)
    return found


def options_in(config: PeftConfig) -> dict[str, Any]:
    """The options, in halfbyte's names, that a PEFT configuration sets to other values than PEFT's own."""
    defaults = LoraConfig()
    found = {
        option: (getattr(config, name, None), getattr(defaults, name)) for option, name in _FIXED.items()
    }
    return {
        option: _listed(value) for option, (value, default) in found.items() if value not in (None, default)
    }


@about(_OPTION)
def continue_from(model: PreTrainedModel, adapter: str, *, planned: bool = False) -> PeftModel:
    """Put the saved adapter ``adapter``, a run's or a checkpoint's directory, on ``model``: trainable, float32.

    Without weights where ``model`` is ``planned``, on meta. Raises :class:`UserError` if its tensors are not exactly
    those that ``model`` requires.
    """
    saved = config.read(adapter)
    tensors.check_tensors(adapter, saved)
    try:
        patterns.check(model, saved)
    except UserError as error:
        raise UserError(f"{Path(adapter) / config.FILE}: {error}") from error
    tensors.check_parts(adapter, multimodal.left_out(model))
    peft_model = tensors.planned(model, adapter) if planned else tensors.load(model, adapter)
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise UserError(f"the adapter {adapter!r} has no trainable weights")
    return fresh.show_head_bias(fresh.to_float32(peft_model))


def check_checkpoint(model: PeftModel, checkpoint: str) -> None:
    """Raise :class:`UserError` if an adapter in the directory ``checkpoint`` does not match ``model``.

    Reads the header of its file alone: the resume itself loads the weights.
    """
    for name in model.peft_config:
        directory = checkpoint if name == "default" else str(Path(checkpoint) / name)
        if directory_of(directory) is not None:
            tensors.check_tensors(directory, config.read(directory))
            tensors.check_names(model, directory, name)


@about(_OPTION)
def same_base(adapter: str, name_or_path: str, revision: str, sha: str | None) -> None:
    """Raise :class:`UserError` unless ``adapter`` was trained on this base.

    The fingerprint in the adapter's run.json decides where there is one; else the names do.
    """
    trained_on = base_of(adapter)
    recorded, known = _recorded_base(adapter).get("sha"), ["", ""]
    if recorded and sha:
        if recorded == sha:
            return
        known = [f", sha256 {str(each)[:12]}" for each in (recorded, sha)]
    elif trained_on == name_or_path or Path(trained_on).resolve() == Path(name_or_path).resolve():
        return
    raise UserError(
        f"the adapter {adapter!r} was trained on the base {trained_on!r} ({revision_of(adapter)}{known[0]}), not on "
        f"{name_or_path!r} ({revision}{known[1]}); "
        f"remove `model_name_or_path` to use the adapter's own base, or name an adapter of this base"
    )


@about(_OPTION)
def same_task(adapter: str, wanted: Task) -> None:
    """Raise :class:`UserError` if ``adapter`` was made for a model of another task."""
    made_for = config.read(adapter).get("task_type")
    if made_for not in TASKS or made_for == wanted.peft_type:
        return
    raise UserError(
        f"the adapter {adapter!r} was made for {TASKS[made_for].name}, and {wanted.name} has another head; "
        f"start a fresh adapter on its base: `model_name_or_path: {base_of(adapter)}`"
    )


def same_template(adapter: str, tokenizer: PreTrainedTokenizerBase, requested: str | None) -> None:
    """Raise :class:`UserError` if the chat template in use is not the one ``adapter`` was trained with."""
    if requested is None:
        return
    trained_with = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False).chat_template
    if tokenizer.chat_template != trained_with:
        theirs = "none" if trained_with is None else repr(shorten(trained_with, 43))
        raise UserError(
            f"{requested!r} is not the chat template that the adapter {adapter!r} was trained with ({theirs}); "
            f"remove this option to use the adapter's",
            option="chat_template_path",
        )


def _located(adapter: str) -> str:
    """The directory of ``adapter``, from the hub if there is no local path of that name."""
    if directory_of(adapter) is not None:
        return adapter
    if not Path(adapter).exists():
        if names.cannot_be_fetched(adapter) and not _cached(adapter):
            raise UserError(names.missing(adapter), option=_OPTION)
        return _fetched(adapter)
    raise UserError(f"{adapter!r} is not an adapter directory: it has no {config.FILE}", option=_OPTION)


def _cached(adapter: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(adapter, config.FILE), str)
    except HFValidationError:  # not a name that the hub could have
        return False


@functools.cache
def _fetched(adapter: str) -> str:
    try:
        directory = snapshot_download(adapter, allow_patterns=_FILES)
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{names.missing(adapter)}: {first_line(error)}",
            option=_OPTION,
        ) from error
    if directory_of(directory) is None:
        raise UserError(f"{adapter!r} is not an adapter: it has no {config.FILE}", option=_OPTION)
    return str(directory)


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _plain(value: Any) -> Any:
    """``value`` in one form: lists sorted, a string as a list of one, anything empty as None."""
    if isinstance(value, str):
        return [value]
    return sorted(value) if isinstance(value, list) else value or None


def _recorded_base(adapter: str) -> dict[str, Any]:
    found = lineage.recorded(adapter).get("base")
    return found if isinstance(found, dict) else {}
