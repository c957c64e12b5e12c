"""Adapters that were saved before: where they are, what they were trained on and how, and going on from them."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.adapters import fresh
from halfbyte.errors import UserError

_CONFIG = "adapter_config.json"
_FILES = [
    _CONFIG,
    "adapter_model.safetensors",
    "run.json",
    "tokenizer*",
    "special_tokens_map.json",
    "*.jinja",
]
# Options that a saved adapter has decided, by PEFT's names for them.
_DECIDED = {
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
    """The base to load, and the directory of the adapter to start from, if any.

    An adapter directory given as ``model`` stands for its base and itself. ``adapter`` is a directory or a hub id.
    """
    if model is not None and directory_of(model) is not None:
        if adapter is not None and adapter != model:
            raise UserError(
                f"model_name_or_path: {model!r} is an adapter directory, and adapter_name_or_path {adapter!r} "
                f"names another: give one of them"
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
    path = Path(name_or_path)
    return path if (path / _CONFIG).is_file() else None


def base_of(adapter: str) -> str:
    """The base model that the adapter directory ``adapter`` names."""
    base = _config(adapter).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{Path(adapter) / _CONFIG} names no base model; write `model_name_or_path`")
    return str(base)


def revision_of(adapter: str) -> str:
    """The revision of its base that ``adapter`` was trained on."""
    return str(_config(adapter).get("revision") or _recorded_base(adapter).get("revision") or "main")


def options_of(adapter: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options that ``adapter`` has decided, as they were when it was made.

    Raises :class:`UserError` if one that is ``asked`` for differs: it would have no effect.
    """
    config = _config(adapter)
    if asked.get("init_lora_weights") is not None:
        raise UserError(
            f"init_lora_weights: the adapter {adapter!r} begins with the weights it was saved with; take it out"
        )
    found = {option: config.get(name) for option, name in _DECIDED.items()}
    if isinstance(found["lora_target_modules"], list):
        # Saved, `all-linear` is the path of each layer that it matched.
        names = {path.rpartition(".")[2] for path in found["lora_target_modules"]}
        found["lora_target_modules"] = sorted(names)
    for option, theirs in found.items():
        wanted = asked.get(option, theirs)
        if wanted != ["all-linear"] and _plain(wanted) != _plain(theirs):
            raise UserError(
                f"{option}: {wanted} is not what the adapter {adapter!r} was made with ({theirs}), and a saved "
                f"adapter keeps its own; take it out, or start a fresh adapter"
            )
    for option in ("lora_target_modules", "lora_exclude_modules"):
        if isinstance(found[option], str):
            found[option] = [found[option]]
    return found


def continue_from(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Put the saved adapter ``adapter`` on ``model``, trainable, in float32."""
    try:
        peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the adapter {adapter!r}: {str(error).splitlines()[0]}") from error
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise UserError(f"the adapter {adapter!r} has no trainable weights")
    return fresh.show_head_bias(fresh.to_float32(peft_model))


def same_base(adapter: str, name_or_path: str, revision: str, sha: str | None) -> None:
    """Raise :class:`UserError` unless ``adapter`` was trained on this base.

    The fingerprint in the adapter's run.json decides where there is one; else the names do.
    """
    trained_on = base_of(adapter)
    recorded = _recorded_base(adapter).get("sha")
    if recorded and sha:
        if recorded == sha:
            return
    elif trained_on == name_or_path or Path(trained_on).resolve() == Path(name_or_path).resolve():
        return
    raise UserError(
        f"the adapter {adapter!r} was trained on the base {trained_on!r} ({revision_of(adapter)}), not on "
        f"{name_or_path!r} ({revision}); "
        f"leave `model_name_or_path` out to take the adapter's own base, or name an adapter of this one"
    )


def same_template(adapter: str, tokenizer: PreTrainedTokenizerBase, asked: str | None) -> None:
    """Raise :class:`UserError` if the template in use is not the one ``adapter`` was trained with."""
    if asked is None:
        return
    trained_with = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False).chat_template
    if tokenizer.chat_template != trained_with:
        raise UserError(
            f"chat_template_path: {asked!r} is not the chat template that the adapter {adapter!r} was trained with "
            f"({_beginning(trained_with)!r}); leave it out to use the adapter's"
        )


def _located(adapter: str) -> str:
    """The directory of ``adapter``, from the hub if there is none of that name."""
    if directory_of(adapter) is not None:
        return adapter
    if not Path(adapter).exists():
        return _fetched(adapter)
    raise UserError(f"adapter_name_or_path: {adapter!r} is not an adapter directory: it has no {_CONFIG}")


@functools.cache
def _fetched(adapter: str) -> str:
    try:
        directory = snapshot_download(adapter, allow_patterns=_FILES)
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"adapter_name_or_path: {adapter!r} is neither a directory nor an adapter on the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if directory_of(directory) is None:
        raise UserError(f"adapter_name_or_path: {adapter!r} is not an adapter: it has no {_CONFIG}")
    return str(directory)


def _config(adapter: str) -> dict[str, Any]:
    path = Path(adapter) / _CONFIG
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a PEFT adapter configuration: {error}") from error


def _plain(value: Any) -> Any:
    """Lists in any order, nothing, and a list of one are the same, however they are written."""
    if isinstance(value, str):
        return [value]
    return sorted(value) if isinstance(value, list) else value or None


def _recorded_base(adapter: str) -> dict[str, Any]:
    run = Path(adapter) / "run.json"
    if not run.is_file():
        return {}
    try:
        return dict(json.loads(run.read_text(encoding="utf-8")).get("base") or {})
    except ValueError:
        return {}


def _beginning(template: str | None) -> str:
    return "none" if template is None else template[:40] + ("..." if len(template) > 40 else "")
