"""The demo's tokenizer and chat template."""

from typing import Any

import pytest

from halfbyte.demo import corpus
from halfbyte.demo.tokenizer import train_tokenizer

TURNS = [
    {"role": "user", "content": "def add(a, b)"},
    {"role": "assistant", "content": "Return the sum."},
    {"role": "user", "content": "def sub(a, b)"},
    {"role": "assistant", "content": "Return the rest."},
]


@pytest.fixture(scope="module")
def tokenizer(library: corpus.Corpus) -> Any:
    return train_tokenizer((text.text for text in library.texts[:60]), vocabulary=1024)


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x  # ok", "  two  spaces ", "é ü 漢字 🙂 \x00", ""])
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert len(tokenizer(token).input_ids) == 1


def test_masks_mark_the_assistants_words_and_their_end(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "Return the sum.<|im_end|>Return the rest.<|im_end|>"


def test_a_prompt_is_the_beginning_of_the_conversation(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(TURNS[:3], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert whole == prompt + "Return the rest.<|im_end|>"
