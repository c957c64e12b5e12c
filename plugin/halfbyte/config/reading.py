"""Read what the user wrote into settings: each key looked up, converted to its field's type and checked."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from halfbyte.config.declared import option_classes
from halfbyte.config.fields import Field, fields_of
from halfbyte.config.foreign import reason
from halfbyte.config.settings import ALIASES, Settings
from halfbyte.config.sources import Entries, Node, OptionError, Source, parse_flow
from halfbyte.config.written import Mistake, Option, Written, collect, limited, listed
from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten, suggestion


def read(argv: Sequence[str] | Written, classes: Sequence[type], *, prog: str, summary: str = "",
         defaults: Mapping[str, Any] = {}) -> Settings:  # fmt: skip
    """Resolve ``argv`` (options and ``--config FILE``, collected or not) into values for the fields of ``classes``.

    ``defaults`` replaces the classes' defaults. Raises UserError, which names each mistake with its
    line or option (at most ten), and SystemExit(0) after printing the help.
    """
    written = argv if isinstance(argv, Written) else collect(argv)
    fields = fields_of(classes)
    values = {name: copy.deepcopy(defaults.get(name, field.default)) for name, field in fields.items()}
    assert set(defaults) <= set(fields), f"defaults for unknown fields: {set(defaults) - set(fields)}"
    if written.help:
        from halfbyte.config import help

        page = help.print_all if written.help == "all" else help.print_short
        page(prog, summary, classes, fields, values)
        raise SystemExit(0)
    return _settings(written, classes, fields, values, prog)


def refuse_early(written: Written, prog: str, *, keys: bool, recipe: str | None = None) -> None:
    """Refuse what the file and the command line show by themselves, before anything heavy is imported.

    Where the source of ``recipe`` (``module:attribute``) shows its options, that is every mistake in keys, values and
    between them, and a model or data that is not named. Else it is keys given twice and, with ``keys``, foreign ones:
    ``keys`` is for halfbyte's own recipes, since a third party's may have an option of any name.
    Raises UserError with a line for each (at most ten).
    """
    if written.help:
        return
    if recipe is not None and (classes := option_classes(recipe)) is not None:
        fields = fields_of(classes)
        values = {name: field.default for name, field in fields.items()}
        _require_inputs(_settings(written, classes, fields, values, prog))
        return
    options = Entries()
    for name, words, source in written.options:
        options.add(name, Node(words[0] if len(words) == 1 else None, source))
    mistakes: list[Mistake] = [*written.file.mistakes, *options.mistakes]
    for entries in (written.file, options) if keys else ():
        for key, node in entries.nodes.items():
            if (why := reason(key, prog, node.value)) is not None:
                mistakes.append((node.source, f"{node.source.at(shorten(key))}: {why}"))
    if mistakes:
        raise UserError(listed(mistakes))


def _require_inputs(settings: Settings) -> None:
    missing = []
    if not settings["model_name_or_path"] and not settings["adapter_name_or_path"]:
        missing.append("no model: write `model_name_or_path` (a hub id or a directory)")
    if not settings["dataset_name"] and not settings["datasets"]:
        missing.append("no data: write `dataset_name` (a hub id or a local path) or `datasets:`")
    if missing:
        raise UserError("\n".join(missing))


def _settings(
    written: Written,
    classes: Sequence[type],
    fields: Mapping[str, Field],
    values: dict[str, Any],
    prog: str,
) -> Settings:
    options = _options(written.options, fields)
    mistakes: list[Mistake] = [*written.file.mistakes, *options.mistakes]
    given: dict[str, Source] = {}
    for entries in (written.file, options):
        for key, node in entries.nodes.items():
            if key not in fields:
                mistakes.append((node.source, partial(_unknown, key, node, fields, prog)))
                continue
            try:
                values[key] = fields[key].convert(node)
                given[key] = node.detailed
            except OptionError as error:
                source = error.source or node.source
                mistakes.append((source, f"{source.at(key, error.path)}: {error}"))
    if mistakes:
        raise UserError(listed(mistakes))
    settings, contradictions = _consistent(Settings(classes, fields, values, given, prog))
    if contradictions:
        raise UserError(limited(contradictions))
    return settings


def _options(written: Sequence[Option], fields: Mapping[str, Field]) -> Entries:
    entries = Entries()
    for name, words, source in written:
        negated = fields.get(name.removeprefix("no_")) if name not in fields else None
        if negated is not None and negated.flag and not words:
            name, words = negated.name, ["false"]  # HfArgumentParser's --no_FLAG
        field = fields.get(name)
        if not words and field is not None and field.flag:
            words = ["true"]
        if len(words) == 1:
            entries.add(name, Node(words[0], source))
        elif (whole := _whole(words, source)) is not None:
            entries.add(name, whole)
        elif words or field is None:
            entries.add(name, Node([Node(word, source) for word in words], source))
        else:
            entries.mistakes.append((source, f"{source}: needs a value; write {source} VALUE"))
    return entries


def _whole(words: Sequence[str], source: Source) -> Node | None:
    """The list or mapping that a shell has split at its blanks, such as ``[wandb, tensorboard]`` without quotes."""
    if len(words) < 2 or (words[0][:1], words[-1][-1:]) not in (("[", "]"), ("{", "}")):
        return None
    try:
        return parse_flow(" ".join(words), source)
    except OptionError:
        return None


def _unknown(key: str, node: Node, fields: Mapping[str, Field], prog: str) -> str:
    name = key.replace("-", "_")
    if name in fields:
        why: str | None = f"unknown option; write {name}"
    elif (why := reason(key, prog, node.value)) is None:
        why = f"unknown option{suggestion(name.lower(), fields)} ({prog} --help all lists all)"
    return f"{node.source.at(shorten(key))}: {why}"


def _consistent(settings: Settings) -> tuple[Settings, list[str]]:
    """Apply the rules between fields; return the settings and a line for each contradiction."""
    settings, mistakes = _one_spelling(settings)
    if "load_in_4bit" in settings and "load_in_8bit" in settings and settings["load_in_8bit"]:
        settings = settings.with_defaults(load_in_4bit=False)
        if settings["load_in_4bit"]:
            mistakes.append(
                f"{settings.at('load_in_8bit')}: load_in_4bit is true as well; keep one of the two"
            )
    if all(key in settings for key in ("load_in_4bit", "use_peft")):
        key = "use_peft" if "use_peft" in settings.given else "load_in_4bit"
        if settings["load_in_4bit"] and not settings["use_peft"]:
            text = "a 4-bit base trains only through adapters; write use_peft: true or load_in_4bit: false"
            mistakes.append(f"{settings.at(key)}: {text}")
    if "report_to" in settings.given and settings["report_to"] is None:
        mistakes.append(f"{settings.at('report_to')}: must not be null; write none or wandb")
    return settings, mistakes


def _one_spelling(settings: Settings) -> tuple[Settings, list[str]]:
    """Move a value from upstream's newer spelling to the older one, which has TRL's defaults."""
    mistakes = []
    for old, new in ALIASES:
        if new not in settings.given or settings[new] is None:
            continue
        if old in settings.given and settings[old] != settings[new]:
            mistakes.append(
                f"{settings.at(new)}: differs from {old} ({settings.given[old]}); keep one of the two"
            )
        settings = settings.also_given(old, new)
    return settings, mistakes
