"""The run that trained a saved adapter, as its run.json tells it, and the chain of runs behind that one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from halfbyte import files
from halfbyte.adapters import config
from halfbyte.errors import UserError

Entry = dict[str, Any]

# What an entry of a chain holds, in this order; None where the adapter's directory does not say it.
_KEYS = ("name", "recipe", "run_id", "adapter_sha256", "base", "steps")
_MOST = 100  # entries of a recorded chain that are read
_QUANTIZATION = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
_PROBES = ("The quick brown fox, 1 2 3.", " a\n\tb  c", "\u00e9\u6f22\U0001f642")


def recorded(adapter: str) -> dict[str, Any]:
    """What run.json says of the run that trained ``adapter``, a run's directory or a checkpoint in it; else nothing.

    ``steps`` are those of the checkpoint. One whose run.json is gone or another run's has what its manifest repeats.
    """
    directory = Path(adapter)
    if (found := _read(directory / "run.json")) or not (manifest := _read(directory / "manifest.json")):
        return found
    of = {"run_id": manifest.get("run_id"), "steps": manifest.get("step")}
    above = _read(directory.resolve().parent / "run.json")
    if above.get("run_id") == of["run_id"]:
        return {**above, **of}
    inputs = _mapping(manifest, "inputs")
    return {
        **of,
        "config": _mapping(manifest, "config"),
        "base": {"sha": inputs.get("base")},
        "tokenizer": {"chat_template": inputs.get("chat_template")},
    }


def chain(adapter: str | None, named: str | None) -> list[Entry]:
    """The runs that led to ``adapter``, oldest first, itself last under the name that the user gave it.

    Copied from the record of its run: the runs before it may be anywhere, or deleted. Empty without an adapter.
    """
    if adapter is None:
        return []
    run = recorded(adapter)
    base = _mapping(run, "base")
    saved = config.read(adapter)
    weights = next(
        (p for n in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (p := Path(adapter) / n).is_file()), None
    )
    own: Entry = {
        "name": named,
        "recipe": run.get("recipe"),
        "run_id": run.get("run_id"),
        "adapter_sha256": None if weights is None else files.digest(weights),
        "base": {
            "name": base.get("name") or saved.get("base_model_name_or_path"),
            "revision": base.get("revision") or saved.get("revision"),
            "sha": base.get("sha"),
        },
        "steps": run.get("steps"),
    }
    before = run.get("lineage")
    earlier = [each for each in before if isinstance(each, dict)] if isinstance(before, list) else []
    return [{key: _plain(each.get(key)) for key in _KEYS} for each in (*earlier[-_MOST:], own)]


def same_quantization(adapter: str, options: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` unless the base is quantized as the one that ``adapter`` was trained on."""
    trained = _mapping(recorded(adapter), "config")
    for option in _QUANTIZATION:
        now = options[option]
        if not trained or (then := trained.get(option, now)) == now:
            continue
        if option not in _QUANTIZATION[:2] and not options["load_in_4bit"]:
            continue
        raise UserError(
            f"the adapter {adapter!r} was trained on a base with `{option}: {_written(then)}`, and this run has "
            f"{_written(now)}; write `{option}: {_written(then)}`",
            option=option,
        )


def describe(tokenizer: Any) -> dict[str, Any]:
    """What run.json keeps of a tokenizer: the size of its vocabulary, and fingerprints of it and its chat template.

    The fingerprint is of all tokens, of the beginning and end tokens, and of how a few texts are tokenized: what
    saving and loading leaves as it is.
    """
    vocabulary = tokenizer.get_vocab()
    ends = [tokenizer.bos_token, tokenizer.eos_token]
    probes = [list(tokenizer(text)["input_ids"]) for text in _PROBES]
    template = tokenizer.chat_template
    return {
        "size": len(vocabulary),
        "sha": files.digest_of([vocabulary, ends, probes]),
        "chat_template": None if template is None else files.sha256(str(template)),
    }


def same_tokenizer(adapter: str, tokenizer: Any) -> None:
    """Raise :class:`UserError` unless ``adapter`` was trained with the tokens and the chat template of ``tokenizer``.

    An adapter whose run did not record them is not checked.
    """
    then = _mapping(recorded(adapter), "tokenizer")
    if not then:
        return
    now = describe(tokenizer)
    if then.get("sha") not in (None, now["sha"]):
        raise UserError(
            f"the adapter {adapter!r} was trained with another tokenizer: {_sized(then)}, and this run has "
            f"{_sized(now)}; restore the tokenizer's files, or start a fresh adapter",
            option="adapter_name_or_path",
        )
    if "chat_template" in then and then["chat_template"] != now["chat_template"]:
        raise UserError(
            f"the adapter {adapter!r} was trained with another chat template: {_short(then['chat_template'])}, and "
            f"this run has {_short(now['chat_template'])}; restore it, or start a fresh adapter",
            option="adapter_name_or_path",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(files.read(path, files.LONGEST_TEXT)) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):  # not a run's
        return {}
    return found if isinstance(found, dict) else {}


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    """A value of a record that anyone may have written: a text, a number, a mapping of texts, or None."""
    if isinstance(value, dict):
        return {str(key): each for key, each in value.items() if isinstance(each, str | None)}
    return value if isinstance(value, str | int) else None


def _written(value: Any) -> str:
    return json.dumps(value).strip('"')


def _sized(found: Mapping[str, Any]) -> str:
    return f"{found.get('size')} tokens ({_short(found.get('sha'))})"


def _short(sha: Any) -> str:
    return "none" if sha is None else f"sha256 {str(sha)[:12]}"


def lines(found: Sequence[Entry]) -> list[str]:
    """One line to print about where a run starts; none for a fresh adapter."""
    runs = [f"{each['recipe'] or 'adapter'} {each['run_id'] or each['name']}" for each in found]
    return [f"lineage: {' -> '.join(runs)} -> this run"] if runs else []
