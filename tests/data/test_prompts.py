"""Prompts to complete while training, from a file or a split: their tokens, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from halfbyte.data import prompts
from halfbyte.errors import UserError
from tests import tiny

CHAT, TEXT = tiny.conversations(2), tiny.preferences(3)
TURNS = [{"role": "user", "content": "the fox"}]
SPLITS = {"train": CHAT, "test": TEXT}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def load(wanted: str | Path, tokenizer: Any, train: Any = CHAT) -> prompts.Prompts:
    return prompts.load(str(wanted), SPLITS, SPLITS.__getitem__, train, tokenizer, SFTConfig(use_cpu=True))


def file(directory: Path, name: str, *lines: Any) -> Path:
    path = directory / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_a_text_is_a_message_where_the_rows_are_conversations(tokenizer: Any, tmp_path: Path) -> None:
    path = file(tmp_path, "p.txt", "the fox", "", " a dog ")
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    found = load(path, tokenizer)
    assert [prompt.given for prompt in found.prompts] == ["the fox", "a dog"]
    assert tokenizer.decode(found.prompts[0].ids) == expected
    assert found.stops == {2}  # <|im_end|>
    plain = load(path, tokenizer, TEXT)
    assert tokenizer.decode(plain.prompts[0].ids) == "the fox"
    assert plain.stops == frozenset()


def test_rows_of_a_file_hold_a_prompt_or_messages(tokenizer: Any, tmp_path: Path) -> None:
    answered = [*TURNS, {"role": "assistant", "content": "is red"}]
    path = file(tmp_path, "p.jsonl", {"prompt": TURNS}, {"messages": answered}, {"messages": TURNS})
    found = load(path, tokenizer, TEXT)
    assert [prompt.given for prompt in found.prompts] == [TURNS] * 3
    assert len({prompt.ids for prompt in found.prompts}) == 1


def test_rows_of_a_split(tokenizer: Any) -> None:
    assert [prompt.given for prompt in load("test:2", tokenizer, TEXT).prompts] == [
        row["prompt"] for row in TEXT[:2]
    ]
    assert load("train:1", tokenizer).prompts[0].given == CHAT[0]["messages"][:1]


def test_pairs_without_a_prompt_column_have_one(tokenizer: Any, tmp_path: Path) -> None:
    sides = {name: [*TURNS, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    assert load(file(tmp_path, "p.jsonl", sides), tokenizer).prompts[0].given == TURNS


REFUSED = {
    "empty": ("p.txt", [" ", ""], "the file is empty"),
    "too many": ("p.txt", ["a"] * 33, "has 33 prompts"),
    "kind": ("p.csv", ["a"], "is not read; expected a .txt file"),
    "no object": ("p.jsonl", ["[1]"], "p.jsonl row 1: expected an object"),
    "no prompt": (
        "p.jsonl",
        [{"prompt": "a"}, {"text": "a"}],
        "p.jsonl row 2: no prompt: its columns are text",
    ),
    "no text": ("p.jsonl", [{"prompt": ""}], "p.jsonl row 1: the prompt is empty"),
    "number": ("p.jsonl", [{"prompt": 3}], "expected a string or a list of messages, found"),
    "only an answer": (
        "p.jsonl",
        [{"messages": [{"role": "assistant", "content": "a"}]}],
        "no message comes before",
    ),
    "role": ("p.jsonl", [{"prompt": [{"role": "usr", "content": "a"}]}], "knows no role 'usr'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_are_refused_with_the_row(tokenizer: Any, tmp_path: Path, case: str) -> None:
    name, lines, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        load(file(tmp_path, name, *lines), tokenizer, TEXT)
    assert caught.value.option == "sample_prompts"
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("test:4", "split 'test' has 3 rows"),
        ("test:0", "0 rows; from 1 to 32"),
        ("tets:1", "did you mean test"),
        ("test", "no such file"),
    ],
)
def test_splits_are_refused(
    tokenizer: Any, wanted: str, expected: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        load(wanted, tokenizer, TEXT)


def test_a_file_may_have_the_name_of_a_split(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    file(tmp_path, "test:1", "a")
    with pytest.raises(UserError, match="is not read"):
        load("test:1", tokenizer, TEXT)
