"""Secrets out of everything that a run writes or sends."""

import json
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"

_SECRET_NAME = re.compile(r"token|key|secret|password", re.IGNORECASE)

# Fields of TRL, transformers and halfbyte whose names look like secrets and whose string values are none.
_HARMLESS_NAMES = frozenset(
    {
        "added_tokens",
        "additional_special_tokens",
        "audio_token",
        "bos_token",
        "cls_token",
        "eos_token",
        "image_token",
        "include_num_input_tokens_seen",
        "mask_token",
        "pad_token",
        "sep_token",
        "special_tokens",
        "stop_token",
        "unk_token",
        "user_special_tokens",
        "video_token",
    }
)

# A commit or a content hash has the shape of a W&B key; under these names it is what it says.
_HASH_NAME = re.compile(r"revision|sha|commit|hash|fingerprint|version", re.IGNORECASE)
_HEX_KEY = re.compile(r"(?<![0-9a-zA-Z])[0-9a-f]{40}(?![0-9a-zA-Z])")

_SECRET_SHAPES = re.compile(
    r"""(?<![0-9a-zA-Z])(?:
        hf_[0-9a-zA-Z]{16,} | api_org_[0-9a-zA-Z]{16,}      # Hugging Face
      | wandb_v\d_[0-9a-zA-Z_-]{16,} | local-[0-9a-f]{40}   # W&B
      | sk-[0-9a-zA-Z_-]{16,}                               # OpenAI, Anthropic
      | gh[oprsu]_[0-9a-zA-Z]{16,} | github_pat_\w{16,}     # GitHub
      | AKIA[0-9A-Z]{16}                                    # AWS
    )""",
    re.VERBOSE,
)
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")
_URL_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|password)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redact(value: Any, name: str = "") -> Any:
    """Copies `value` with every secret in it replaced by ``***``, at any depth.

    A secret is a string under a name that contains token, key, secret or password, except the special
    tokens of a tokenizer and their like; or a string anywhere in the shape of a known service's key. A JSON
    object or list in a string (``--model_init_kwargs '{...}'``) is searched as well. Numbers, booleans and
    None are kept as they are; an object that JSON does not know becomes its string.

    Args:
        value: a mapping, a sequence, or a scalar.
        name: the key that `value` stands under.
    """
    return _redact(value, name, secret=_is_secret(name))


def _is_secret(name: str) -> bool:
    lowered = name.lower().replace("-", "_")
    if lowered in _HARMLESS_NAMES:
        return False
    return _SECRET_NAME.search(lowered.replace("tokenizer", "")) is not None


def _redact(value: Any, name: str, secret: bool) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            _redact_text(str(key), ""): _redact(item, str(key), secret or _is_secret(str(key)))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact(item, name, secret) for item in value]
    text = str(value)
    if secret and text:
        return REDACTED
    if text.lstrip()[:1] in ("{", "["):
        try:
            inner = json.loads(text)
        except ValueError:
            pass
        else:
            clean = _redact(inner, name, secret)
            return text if clean == inner else json.dumps(clean)
    return _redact_text(text, name)


def _redact_text(text: str, name: str) -> str:
    text = _SECRET_SHAPES.sub(REDACTED, text)
    text = _URL_PASSWORD.sub(REDACTED, text)
    text = _URL_QUERY.sub(rf"\g<1>{REDACTED}", text)
    return text if _HASH_NAME.search(name) else _HEX_KEY.sub(REDACTED, text)
