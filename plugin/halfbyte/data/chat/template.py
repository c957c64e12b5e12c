"""The tokenizer of a run, its chat template, and the tokens that template needs."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AddedToken, AutoTokenizer

from halfbyte import names
from halfbyte.data.chat import limited
from halfbyte.data.chat.rendering import rendered
from halfbyte.errors import UserError
from halfbyte.terminal.wording import first_line, shorten, suggestion

# What a template writes as a special token: <|name|>, <|name> and <name|>, the same with full-width bars, and Gemma's.
_BAR, _NAME = r"[|\uff5c]", r"[^\s|\uff5c<>'\"{}+]+"
SPECIAL = re.compile(rf"<{_BAR}{_NAME}{_BAR}?>|<{_NAME}{_BAR}>|<(?:start|end)_of_turn>")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
CONTENT = "7fae"  # the content of a message in a probe
# What a tokenizer is saved in: by transformers, sentencepiece, tiktoken and Mistral.
_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
_HIGHEST = 1 << 24  # of a token id; each id below one is a slot that `tokenizers` fills when it is copied


def prepare_tokenizer(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    training: Any,
    additional_special_tokens: list[str] | None = None,
) -> tuple[Any, list[int]]:
    """Load the tokenizer at ``path`` and give it the template and tokens that the options name.

    Applies ``chat_template_path``, ``eos_token`` and ``pad_token`` of ``training`` where its class has them.
    A template is taken without its tokens: those that the vocabulary lacks must be named in
    ``additional_special_tokens``, which is an empty list where they are ordinary text. The caller must keep
    ``chat_template_path`` from TRL, which would add the tokens of another model and resize the embeddings by itself.
    ``training.eos_token`` becomes the end token that came with the template, so that TRL sets it on the model's
    configuration. Without a pad token, the
    end token pads. Returns the tokenizer and the ids of the tokens that were added. Raises UserError.
    """
    tokenizer = _read(path, revision, trust_remote_code)
    added = _add(tokenizer, additional_special_tokens or [])
    template_path = getattr(training, "chat_template_path", None)
    source = None
    if template_path is None:
        _require_bounded(tokenizer.chat_template, path)
    else:
        source = _apply_template(tokenizer, template_path, trust_remote_code, additional_special_tokens == [])
    eos = getattr(training, "eos_token", None)
    brought = None if source is None else source.eos_token
    if eos is None and brought and (additional_special_tokens != [] or brought in tokenizer.get_vocab()):
        eos = training.eos_token = brought
    for option, token in (("eos_token", eos), ("pad_token", getattr(training, "pad_token", None))):
        if token is None:
            continue
        vocabulary = tokenizer.get_vocab()
        if token not in vocabulary:
            special = tokenizer.all_special_tokens
            raise UserError(
                f"{token!r} is not in the vocabulary of {path}{suggestion(token, special)}\n"
                f"  its special tokens: {', '.join(special) or 'none'}\n"
                f"  to add it:\n{_to_add([token])}",
                option=option,
            )
        setattr(tokenizer, option, token)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"{path}: the tokenizer has no pad token and no end token; set `pad_token`")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, added


def _require_bounded(template: Any, where: str, option: str | None = None) -> None:
    """Refuse a template that would hang this process or take all memory, before it renders anything here."""
    for text in template.values() if isinstance(template, dict) else [template]:
        if isinstance(text, str) and (excess := limited.excess(text)) is not None:
            raise UserError(
                f"{where}: its chat template {excess} on a few short messages; take another, in a .jinja file that "
                "`chat_template_path` names",
                option=option,
            )


def stop_ids(tokenizer: Any, template: str | None = None) -> set[int]:
    """Return the ids that end a turn: the end of sequence, and the token that the template writes after a turn."""
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    text = _probe(tokenizer, template)
    if CONTENT in text:
        tail = tokenizer(text.rpartition(CONTENT)[2], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.get_added_vocab().values())
        stops |= set([token for token in tail if token in special][:1])
    return stops


def _probe(tokenizer: Any, template: str | None = None) -> str:
    """A short conversation that ends with the assistant, rendered; empty if the template refuses it."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": CONTENT}]
    return rendered(tokenizer, turns, template) or ""


def _read(path: str, revision: str | None, trust_remote_code: bool, option: str | None = None) -> Any:
    directory = Path(path)
    if directory.is_dir():
        if (problem := names.unreadable(directory)) is not None:
            raise UserError(problem, option=option)
        for template in sorted(directory.glob("*.jinja")):
            _template_text(template, option)
    elif option is not None and names.cannot_be_fetched(path) and not _cached(path):
        raise UserError(names.missing(path), option=option)
    try:
        found = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    # From here come OSError, ValueError, KeyError and the json and tokenizers libraries' own.
    except Exception as error:
        if directory.is_dir() and not any(any(directory.glob(each)) for each in _FILES):
            raise UserError(
                f"{path}: no tokenizer files in this folder; copy tokenizer.json and tokenizer_config.json from the "
                "model that it was made from",
                option=option,
            ) from error
        reason = shorten(first_line(error), 300)
        raise UserError(f"{path}: no tokenizer could be loaded: {reason}", option=option) from error
    if (highest := max(found.get_vocab().values(), default=0)) > _HIGHEST:
        raise UserError(
            f"{path}: its tokenizer has a token of id {highest:,}; no vocabulary is so large", option=option
        )
    return found


def _cached(name: str) -> bool:
    """Whether the hub's local cache has a tokenizer of ``name``."""
    try:
        return isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str)
    except HFValidationError:  # not a name that the hub could have
        return False


def _template_text(file: Path, option: str | None) -> str:
    """The template in ``file``. Raises UserError where it is not UTF-8."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}:{line}: the template is not UTF-8 at byte {error.start}; save it as UTF-8", option=option
        ) from error


def _add(tokenizer: Any, names: list[str]) -> list[int]:
    """Add the tokens that the vocabulary lacks and return their ids."""
    if wrong := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise UserError(f"{wrong[0]!r} is not a token", option="additional_special_tokens")
    vocabulary = tokenizer.get_vocab()
    new = [name for name in dict.fromkeys(names) if name not in vocabulary]
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True
    )
    return [int(index) for index in tokenizer.convert_tokens_to_ids(new)]


def _to_add(tokens: list[str]) -> str:
    """Lines to paste: one for the YAML file, one for a shell."""
    listed = json.dumps(tokens, ensure_ascii=False)
    return (
        f"  additional_special_tokens: {listed}\n"
        f"  on the command line: --additional_special_tokens {shlex.quote(listed)}"
    )


def text_markers(tokenizer: Any) -> list[str]:
    """Return the markers of turns that the chat template writes and the vocabulary lacks: ordinary text."""
    template = tokenizer.chat_template
    written = (
        SPECIAL.finditer(COMMENT.sub("", template) + _probe(tokenizer)) if isinstance(template, str) else ()
    )
    vocabulary = tokenizer.get_vocab()
    return [name for name in dict.fromkeys(found.group() for found in written) if name not in vocabulary]


def _apply_template(tokenizer: Any, template_path: str, trust_remote_code: bool, as_text: bool) -> Any | None:
    """Set a named template on the tokenizer; return the tokenizer it came from, or None for a file.

    Raises UserError for tokens of the template that the vocabulary lacks, unless they are taken ``as_text``.
    """
    file = Path(template_path).expanduser()
    source = None
    if file.suffix in (".jinja", ".j2"):
        if file.exists() and not file.is_file():
            raise UserError(f"{template_path} is not a file", option="chat_template_path")
        if not file.is_file():
            near = suggestion(
                file.name, [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            )
            raise UserError(f"no file {template_path}{near}", option="chat_template_path")
        template = _template_text(file, "chat_template_path")
    elif file.exists() and not file.is_dir():
        raise UserError(
            f"{template_path}: a template file must end in .jinja or .j2", option="chat_template_path"
        )
    else:
        source = _read(str(file), None, trust_remote_code, "chat_template_path")
        if not source.chat_template:
            raise UserError(
                f"the tokenizer of {template_path} has no chat template", option="chat_template_path"
            )
        template = source.get_chat_template()
    _require_bounded(template, template_path, "chat_template_path")
    tokenizer.chat_template = template
    try:
        written = COMMENT.sub("", template) + _probe(tokenizer)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"{template_path}:{error.lineno}: {error.message}", option="chat_template_path"
        ) from error
    if source is None:
        needed = [found.group() for found in SPECIAL.finditer(written)]
    else:
        needed = [t.content for t in source.added_tokens_decoder.values() if t.content in written]
        needed += [source.eos_token] if source.eos_token else []
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in dict.fromkeys(needed) if token not in vocabulary]
    if missing and not as_text:
        raise UserError(
            f"{template_path} writes {len(missing)} tokens that the vocabulary lacks:\n"
            f"  {', '.join(missing)}\n"
            "  to add them and train their rows:\n"
            f"{_to_add(missing)}\n"
            "  to take them as ordinary text, which adds and resizes nothing:\n"
            "  additional_special_tokens: []",
            option="chat_template_path",
        )
    return source
