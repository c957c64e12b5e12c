"""Conversations rendered with the chat template, to find a row that it refuses before training does."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

import jinja2
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from halfbyte.data.formats import Layout
from halfbyte.data.kinds import ROLES
from halfbyte.errors import UserError
from halfbyte.terminal.wording import first_line, shorten

Messages = list[dict[str, Any]]

# What the expressions of a template can raise in jinja's sandbox, and transformers without a template.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def rendered(
    tokenizer: Any, turns: Messages, template: str | None = None, *, add_generation_prompt: bool = False
) -> str | None:
    """What a chat template makes of ``turns``, or None where it refuses them.

    ``template`` takes the place of the tokenizer's own. Raises jinja2.TemplateSyntaxError.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, tokenize=False, chat_template=template, add_generation_prompt=add_generation_prompt
            )
        )
    except jinja2.TemplateSyntaxError:
        raise
    except TEMPLATE_ERRORS:
        return None


def known_roles(tokenizer: Any) -> frozenset[str]:
    """Return the usual roles, and those of the chat template's own.

    They are words that it compares a message's role with, or renders unlike an invented role, if it prints what such
    a message says.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    compared = {word for group in _COMPARED.findall(template) for word in _QUOTED.findall(group)}
    return ROLES | {
        word
        for word in {*_QUOTED.findall(template)} - ROLES
        if _is_role(word, tokenizer, compared=word in compared)
    }


_QUOTED = re.compile(r"""['"](\w+)['"]""")
_COMPARED = re.compile(r"""role['"\])]*\s*(?:==|!=|(?:not\s+)?in)\s*(\[[^\]]*\]|\([^)]*\)|['"]\w+['"])""")
_INVENTED, _SAID = "qzroleqz", "7fae5"
_AROUND = ((("user", "assistant"), ()), ((), ("user", "assistant")), (("user",), ("assistant",)))


def _is_role(word: str, tokenizer: Any, *, compared: bool) -> bool:
    for before, after in _AROUND:
        own, invented = (
            _rendered_role((*before, role, *after), len(before), tokenizer) for role in (word, _INVENTED)
        )
        unlike = invented is None or own != invented.replace(_INVENTED, word)
        if own is not None and _SAID in own and (compared or unlike):
            return True
    return False


def _rendered_role(roles: tuple[str, ...], place: int, tokenizer: Any) -> str | None:
    turns = [{"role": role, "content": _SAID if n == place else "7fae6"} for n, role in enumerate(roles)]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TEMPLATE_ERRORS:
        return None


def template_advice(training: Any) -> str:
    """How to give a tokenizer a chat template, with the options that ``training`` has."""
    if hasattr(training, "chat_template_path"):
        return "set `chat_template_path` to a .jinja file, or to a model whose template to take"
    return "use a model whose tokenizer has one"


def training_template(tokenizer: Any, training: Any) -> str | None:
    """Return the template that TRL renders with: None for the tokenizer's own, another where assistant_only_loss
    requires marks.

    Raises UserError where there is no template, or none with ``{% generation %}`` marks when they are needed.
    """
    if not getattr(tokenizer, "chat_template", None):
        advice = template_advice(training)
        raise UserError(f"the data holds conversations, but the tokenizer has no chat template\n  {advice}")
    if not getattr(training, "assistant_only_loss", False) or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise UserError(
            "the chat template does not mark the assistant's tokens\n"
            "  put them in {% generation %}...{% endgeneration %}, in a file that `chat_template_path` names",
            option="assistant_only_loss",
        ) from error


def refusal(row: Mapping[str, Any], layout: Layout, tokenizer: Any, template: str | None) -> str | None:
    """Return why the chat template cannot render a row, or None."""
    try:
        for _ in texts(row, layout, tokenizer, template):
            pass
    except TEMPLATE_ERRORS as error:
        return shorten(first_line(error), 300)
    return None


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row passes to its chat template, as TRL reads it."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def texts(
    row: Mapping[str, Any], layout: Layout, tokenizer: Any, template: str | None, *, prompts: bool = True
) -> Iterator[str]:
    """What TRL renders of a row: its conversations, and with ``prompts`` what comes before the answers."""
    options = template_options(row)
    for messages, prompt_only in _renderings(row, layout):
        if prompts or not prompt_only:
            yield str(
                tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    chat_template=template,
                    add_generation_prompt=prompt_only,
                    **options,
                )
            )


def _renderings(row: Mapping[str, Any], layout: Layout) -> Iterator[tuple[Messages, bool]]:
    """What TRL renders of a row: conversations, each with whether the generation prompt follows."""
    if layout.begin_alike:
        sides = [row[column] for column in layout.spoken]
        alike = takewhile(lambda turns: all(turn == turns[0] for turn in turns), zip(*sides, strict=False))
        # As in TRL's `extract_prompt`, each side keeps a message of its own.
        yield [turns[0] for turns in alike][: min(map(len, sides)) - 1], True
        for side in sides:
            yield side, False
        return
    prompt: Messages = row["prompt"] if "prompt" in layout.spoken else []
    if prompt:
        yield prompt, True
    for column in layout.spoken:
        if column != "prompt":
            yield prompt + row[column], False
