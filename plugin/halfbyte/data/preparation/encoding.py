"""Rows rendered one by one and tokenized many at a time: the token ids that TRL's own call gives for each.

Source: ``_tokenize`` of ``trl/data_utils.py`` (1.16), which renders and tokenizes one conversation or text a call.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TokenizersBackend

from halfbyte.data.chat.rendering import TEMPLATE_ERRORS, Messages

Ids = list[int]

# Arguments of `apply_chat_template` that change how its text is tokenized: rows that give one are tokenized by it.
_OF_TOKENIZING = frozenset(
    {
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenize"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs"),
    }
)

# Characters, the same in two conversations of a batch, behind which more of them is likely to be the same.
BEGINNING = 200


class UnrenderedRow(Exception):  # noqa: N818 - it is caught where the row's number is known
    """The chat template cannot render the row at ``index``, counted from 0."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason


def batches_alike(tokenizer: Any) -> bool:
    """Whether a tokenizer gives the same ids for many texts at once as TRL's call does for each."""
    kind = type(tokenizer)
    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(kind, name) is getattr(base, name)
        for base, names in (
            (PreTrainedTokenizerBase, ("__call__", "apply_chat_template")),
            (TokenizersBackend, ("_encode_plus",)),
        )
        for name in names
    )


class Encoder:
    """The token ids of conversations under one chat template, and of texts; ``template`` None is the tokenizer's.

    Of one row's sides only what follows the last special token that they share with their prompt is tokenized, and of
    conversations only what follows the last one that they share with an earlier one of the batch: the tokenizers
    library splits a text at such tokens before it does anything else.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._added = tokenizer.added_tokens_decoder
        self._contents = "\n".join(token.content for token in self._added.values())
        self._hard: dict[int, str | None] = {}

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of texts, with the special tokens that the tokenizer adds."""
        return self._ids(texts, add_special_tokens=True)

    def conversations(
        self,
        first: int,
        options: Sequence[Mapping[str, Any]],
        sides: Sequence[Sequence[Messages]],
        prompted: bool = False,
    ) -> list[list[Ids]]:
        """The ids of each side of each row; with ``prompted`` the first side is the prompt of the others.

        A prompt is rendered with the generation prompt. ``first`` is the number of the first row, for the
        :class:`UnrenderedRow` that is raised where the template refuses one.
        """
        rendered: list[list[str | Ids]] = []
        for index, (given, row) in enumerate(zip(options, sides, strict=True), first):
            try:
                rendered.append(
                    [self._render(side, given, prompted and not at) for at, side in enumerate(row)]
                )
            except TEMPLATE_ERRORS as error:
                raise UnrenderedRow(index, str(error)) from error
        whole = iter(self._beginning_alike([row[0] for row in rendered if isinstance(row[0], str)]))
        firsts = [next(whole) if isinstance(row[0], str) else row[0] for row in rendered]
        shared = [
            [self._shared(row[0], ids, side) for side in row[1:]]
            for row, ids in zip(rendered, firsts, strict=True)
        ]
        rests = iter(
            self._ids(
                [
                    side[at:]
                    for row, cuts in zip(rendered, shared, strict=True)
                    for side, (at, _) in zip(row[1:], cuts, strict=True)
                    if isinstance(side, str)
                ]
            )
        )
        return [
            [ids]
            + [
                ids[:kept] + next(rests) if isinstance(side, str) else side
                for side, (_, kept) in zip(row[1:], cuts, strict=True)
            ]
            for row, ids, cuts in zip(rendered, firsts, shared, strict=True)
        ]

    def masked(
        self, first: int, options: Sequence[Mapping[str, Any]], sides: Sequence[Messages]
    ) -> tuple[list[Ids], list[list[int]]]:
        """The ids of conversations, and for each whether the assistant wrote it."""
        ids, masks = [], []
        for index, (given, messages) in enumerate(zip(options, sides, strict=True), first):
            try:
                found = self._one(messages, {"return_assistant_tokens_mask": True, **given})
            except TEMPLATE_ERRORS as error:
                raise UnrenderedRow(index, str(error)) from error
            ids.append(found["input_ids"])
            masks.append(found["assistant_masks"])
        return ids, masks

    def _render(self, messages: Messages, options: Mapping[str, Any], prompt: bool) -> str | Ids:
        given = {"add_generation_prompt": True, **options} if prompt else options
        if not _OF_TOKENIZING.isdisjoint(options):
            ids: Ids = self._one(messages, given)["input_ids"]
            return ids
        text: str = self._tokenizer.apply_chat_template(
            messages, **{"chat_template": self._template, **given, "tokenize": False}
        )
        return text

    def _one(self, messages: Messages, options: Mapping[str, Any]) -> Any:
        """TRL's own call."""
        return self._tokenizer.apply_chat_template(
            messages, **{"chat_template": self._template, "tokenize": True, "return_dict": True, **options}
        )

    def _ids(self, texts: Sequence[Any], add_special_tokens: bool = False) -> list[Ids]:
        if not texts:
            return []
        self._tokenizer("")  # sets truncation, padding and the handling of special tokens as each call does
        # As that call, but without the offsets, which cost a fifth of the time.
        found = self._tokenizer.backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in found]

    def _beginning_alike(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of conversations, of which many may begin with the same system message or tools."""
        begun: dict[str, int] = {}
        heads = [begun.setdefault(text[:BEGINNING], place) for place, text in enumerate(texts)]
        firsts = list(begun.values())
        ids = dict(zip(firsts, self._ids([texts[place] for place in firsts]), strict=True))
        cuts = [
            (place, head, *self._shared(texts[head], ids[head], texts[place]))
            for place, head in enumerate(heads)
            if place != head
        ]
        rests = self._ids([texts[place][at:] for place, _, at, _ in cuts])
        for (place, head, _, kept), rest in zip(cuts, rests, strict=True):
            ids[place] = ids[head][:kept] + rest
        return [ids[place] for place in range(len(texts))]

    def _shared(self, prompt: str | Ids, ids: Ids, side: str | Ids) -> tuple[int, int]:
        """Where ``side`` must be tokenized from, and how many of the prompt's ``ids`` come before that."""
        if not isinstance(prompt, str) or not isinstance(side, str):
            return 0, 0
        at = len(prompt)
        for kept in range(len(ids) - 1, -1, -1):
            if ids[kept] not in self._added or (token := self._hard_token(ids[kept])) is None:
                continue
            if prompt.count(token) != ids.count(ids[kept]):
                return 0, 0
            at = prompt.rfind(token, 0, at)
            if side.startswith(prompt[: at + len(token)]):
                return at, kept
        return 0, 0

    def _hard_token(self, index: int) -> str | None:
        """The text of an added token that is found before any text is normalized, whatever stands beside it."""
        if index not in self._hard:
            token = self._added[index]
            alone = self._contents.count(token.content) == 1  # and no part of another
            found = alone and not (token.normalized or token.lstrip or token.single_word)
            self._hard[index] = token.content if found else None
        return self._hard[index]
