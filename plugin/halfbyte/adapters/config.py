"""The configuration file of a saved adapter, read and checked for the types that PEFT relies on without checking."""

import json
import math
from pathlib import Path
from typing import Any

from halfbyte import files
from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten

FILE = "adapter_config.json"
_NAMES = "a text or a list of texts"
_TYPES: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "base_model_name_or_path": ("a text", str),
    "revision": ("a text", str),
    "r": ("a whole number", int),
    "lora_alpha": ("a finite number", (int, float)),
    "lora_dropout": ("a finite number", (int, float)),
    "target_modules": (_NAMES, (str, list)),
    "exclude_modules": (_NAMES, (str, list)),
    "layers_pattern": (_NAMES, (str, list)),
    "modules_to_save": ("a list of texts", list),
    "target_parameters": ("a list of texts", list),
    "rank_pattern": ("a mapping of names to whole numbers", dict),
    "alpha_pattern": ("a mapping of names to numbers", dict),
    "use_rslora": ("true or false", bool),
    "use_dora": ("true or false", bool),
}


def read(adapter: str) -> dict[str, Any]:
    """Return the configuration of the adapter in the directory ``adapter``.

    Raises :class:`UserError` for a file that is no JSON mapping, and for a value of another type than PEFT's.
    """
    path = Path(adapter) / FILE
    try:
        if not path.is_file():
            raise OSError("it is not a file")
        found = json.loads(files.read(path, files.LONGEST_TEXT))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a PEFT adapter configuration: {error}") from error
    for name, (words, types) in _TYPES.items():
        value = found.get(name)
        if value is not None and not _is(value, types):
            raise UserError(
                f"{path}: {name} must be {words}, is {shorten(repr(value))}; save the adapter again"
            )
    return found


def _is(value: Any, types: type | tuple[type, ...]) -> bool:
    if isinstance(value, list):
        return isinstance([], types) and all(isinstance(item, str) for item in value)
    if isinstance(value, dict):
        numbers = all(isinstance(item, int | float) and not isinstance(item, bool) for item in value.values())
        return isinstance({}, types) and numbers
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, types) and (types is bool or not isinstance(value, bool))
