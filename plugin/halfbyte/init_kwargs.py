"""Arguments of ``from_pretrained`` that halfbyte has options for, as TRL's configs take them: ``model_init_kwargs``."""

from collections.abc import Collection, Mapping
from typing import Any

from halfbyte.errors import UserError
from halfbyte.terminal.wording import suggestion

_OPTIONS = {"dtype": "dtype", "torch_dtype": "dtype", "revision": "model_revision"}
_REFUSED = {
    "quantization_config": "the base is quantized as `load_in_4bit` and `bnb_4bit_quant_type` say",
    "device_map": "each rank loads the base onto its own device",
    "trust_remote_code": "write `trust_remote_code`, an option of its own",
}
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def take_over(options: Any, given: Collection[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the options that ``model_init_kwargs`` sets, by name, and what remains of it; None if it sets none.

    Raises :class:`UserError` where one contradicts an option that was ``given``, or cannot be set.
    """
    arguments: Mapping[str, Any] = {}
    if "model_init_kwargs" in options:
        arguments = options["model_init_kwargs"] or {}
    for name in arguments.keys() & _REFUSED.keys():
        raise _error(f"{name} is decided by halfbyte: {_REFUSED[name]}; remove it here")
    found: dict[str, Any] = {}
    for name in arguments.keys() & _OPTIONS.keys():
        option, value = _OPTIONS[name], arguments[name]
        if option == "dtype":
            value = str(value).removeprefix("torch.") if value is not None else "auto"
            if value not in _DTYPES:
                raise _error(
                    f"{name} {value!r} is not supported; write one of {', '.join(_DTYPES)}{suggestion(value, _DTYPES)}"
                )
        other = found.get(option, options[option] if option in given else None)
        if other not in (None, value):
            raise _error(f"{name} is {value!r} here, and `{option}` is {other!r}; write one of the two")
        found[option] = value
    if not found:
        return {}, None
    return found, {name: value for name, value in arguments.items() if name not in _OPTIONS}


def _error(what: str) -> UserError:
    return UserError(what, option="model_init_kwargs")
