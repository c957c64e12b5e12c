"""Rows as people bring them train the tokens of the same rows written by hand in TRL's columns, and a line says so."""

from typing import Any

import pytest
from trl import DPOTrainer, KTOTrainer, SFTTrainer

from halfbyte.data import DataReport, PreferencePairs, RunData, Text, UnpairedPreferences
from tests import tiny
from tests.data.conftest import dpo, kto, run_data, sft, turn
from tests.data.preparation.test_prepared import build

SYSTEM, ASKED, BELOW, SAID, WORSE = "be the fox", "the red dog", "over the sea", "jumps", "two is blue"
S, U, A, W = turn("system", SYSTEM), turn("user", ASKED), turn("assistant", SAID), turn("assistant", WORSE)
LONG = turn("user", f"{ASKED}\n\n{BELOW}")
BEFORE = [turn("user", "one"), turn("assistant", "two")]


def said(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SHARE = [said("human", ASKED), said("gpt", SAID)]

# What people bring, and the same by hand.
TEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sharegpt": ({"conversations": SHARE}, {"messages": [U, A]}),
    "sharegpt with a system turn and ids": (
        {"id": "x", "conversations": [said("system", SYSTEM), *SHARE]},
        {"messages": [S, U, A]},
    ),
    "user and assistant under from": (
        {"conversations": [said("user", ASKED), said("assistant", SAID)]},
        {"messages": [U, A]},
    ),
    "conversation": ({"conversation": SHARE}, {"messages": [U, A]}),
    "messages as ShareGPT": ({"messages": SHARE}, {"messages": [U, A]}),
    "conversations as messages": ({"conversations": [U, A]}, {"messages": [U, A]}),
    "keys of both": ({"conversations": [{"from": "human", "content": ASKED}, A]}, {"messages": [U, A]}),
    "messages of human and gpt": (
        {"messages": [turn("human", ASKED), turn("gpt", SAID)]},
        {"messages": [U, A]},
    ),
    "a system column": ({"system": SYSTEM, "conversations": SHARE}, {"messages": [S, U, A]}),
    "a system column beside messages": ({"system": SYSTEM, "messages": [U, A]}, {"messages": [S, U, A]}),
    "the same system twice": ({"system": SYSTEM, "messages": [S, U, A]}, {"messages": [S, U, A]}),
    "an instruction that stands in the input": (
        {"instruction": "", "input": ASKED, "output": SAID},
        {"prompt": [U], "completion": [A]},
    ),
    "tools": (
        {"conversations": [*SHARE, said("tool", "sky"), said("gpt", SAID)], "tools": '[{"name": "f"}]'},
        {"messages": [U, A, turn("tool", "sky"), A], "tools": '[{"name": "f"}]'},
    ),
    "calls of tools": (
        {
            "conversations": [
                SHARE[0],
                said("function_call", '{"name": "f", "arguments": {"a": 1}}'),
                said("function_call", '[{"name": "g", "arguments": "{}"}]'),
                said("observation", "sky"),
                SHARE[1],
            ]
        },
        {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": 1}), call("g", {})]},
                      turn("tool", "sky"), A]},
    ),
    "input and output": ({"input": ASKED, "output": SAID}, {"prompt": [U], "completion": [A]}),
    "alpaca": (
        {"instruction": ASKED, "input": BELOW, "output": SAID},
        {"prompt": [LONG], "completion": [A]},
    ),
    "alpaca without input": (
        {"instruction": ASKED, "input": "", "output": SAID},
        {"prompt": [U], "completion": [A]},
    ),
    "alpaca with all": (
        {"instruction": ASKED, "input": BELOW, "output": SAID, "system": SYSTEM, "history": [["one", "two"]]},
        {"prompt": [S, *BEFORE, LONG], "completion": [A]},
    ),
    "instruction and response": (
        {"instruction": ASKED, "response": SAID},
        {"prompt": [U], "completion": [A]},
    ),
    "question and answer": ({"question": ASKED, "answer": SAID}, {"prompt": [U], "completion": [A]}),
    "orca": (
        {"system_prompt": SYSTEM, "question": ASKED, "response": SAID},
        {"prompt": [S, U], "completion": [A]},
    ),
    "query and response": ({"query": ASKED, "response": SAID}, {"prompt": [U], "completion": [A]}),
    "a completion that is one message": ({"prompt": [U], "completion": A}, {"prompt": [U], "completion": [A]}),
    "a completion that is text": ({"prompt": [U], "completion": SAID}, {"prompt": [U], "completion": [A]}),
    "prompt and completion as ShareGPT": (
        {"prompt": SHARE[:1], "completion": SHARE[1:]},
        {"prompt": [U], "completion": [A]},
    ),
    "a system column beside text": (
        {"system": SYSTEM, "prompt": ASKED, "completion": SAID},
        {"prompt": [S, U], "completion": [A]},
    ),
}  # fmt: skip
BY_HAND = {"prompt": [U], "chosen": [A], "rejected": [W]}
SIDES = {"chosen": SAID, "rejected": WORSE}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one message a side": ({"prompt": [U], "chosen": A, "rejected": W}, BY_HAND),
    "one message a side under a question": ({"question": ASKED, "chosen": A, "rejected": W}, BY_HAND),
    "one turn of ShareGPT a side": (
        {"conversations": SHARE[:1], "chosen": said("gpt", SAID), "rejected": said("gpt", WORSE)},
        BY_HAND,
    ),
    "messages as the prompt": ({"messages": [U], **SIDES}, BY_HAND),
    "messages as the prompt, lists": ({"messages": [U], "chosen": [A], "rejected": [W]}, BY_HAND),
    "conversation as the prompt": ({"conversation": SHARE[:1], **SIDES}, BY_HAND),
    "question and text": ({"question": ASKED, **SIDES}, BY_HAND),
    "input and text": ({"system": SYSTEM, "input": ASKED, **SIDES}, {**BY_HAND, "prompt": [S, U]}),
    "query and text": ({"query": ASKED, **SIDES}, BY_HAND),
    "alpaca": (
        {"instruction": ASKED, "input": BELOW, **SIDES},
        {**BY_HAND, "prompt": [LONG]},
    ),
    "orca": ({"system": SYSTEM, "question": ASKED, **SIDES}, {**BY_HAND, "prompt": [S, U]}),
    "system and prompt": ({"system": SYSTEM, "prompt": ASKED, **SIDES}, {**BY_HAND, "prompt": [S, U]}),
    "history": (
        {"history": [["one", "two"]], "question": ASKED, **SIDES},
        {**BY_HAND, "prompt": [*BEFORE, U]},
    ),
    "a text prompt beside answers": ({"prompt": ASKED, "chosen": [A], "rejected": [W]}, BY_HAND),
    "a text prompt beside messages": ({"prompt": ASKED, "chosen": A, "rejected": W}, BY_HAND),
    "whole conversations as ShareGPT": (
        {"chosen": SHARE, "rejected": [SHARE[0], said("gpt", WORSE)]},
        {"chosen": [U, A], "rejected": [U, W]},
    ),
    "whole conversations with a system column": (
        {"system": SYSTEM, "chosen": [U, A], "rejected": [U, W]},
        {"chosen": [S, U, A], "rejected": [S, U, W]},
    ),
    "ms-swift": ({"messages": [U, A], "rejected_response": WORSE}, BY_HAND),
    "openai": (
        {"input": {"messages": [U]}, "preferred_output": [A], "non_preferred_output": [W]},
        BY_HAND,
    ),
}  # fmt: skip
WANTED = {"prompt": [U], "completion": [A], "label": True}
UNPAIRED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one message": ({"prompt": [U], "completion": A, "label": True}, WANTED),
    "a text prompt": ({"prompt": ASKED, "completion": A, "label": True}, WANTED),
    "messages": ({"messages": [U, A], "label": True}, WANTED),
    "sharegpt": ({"conversations": SHARE, "kto_tag": True}, WANTED),
    "alpaca": (
        {"instruction": ASKED, "input": BELOW, "output": SAID, "kto_tag": True},
        {**WANTED, "prompt": [LONG]},
    ),
    "question and answer": ({"question": ASKED, "answer": SAID, "label": True}, WANTED),
    "a system column": (
        {"system": SYSTEM, "prompt": [U], "completion": [A], "label": True},
        {**WANTED, "prompt": [S, U]},
    ),
}
KINDS = {
    "text": (TEXT, Text, sft, SFTTrainer, ("input_ids", "labels")),
    "pairs": (PAIRS, PreferencePairs, dpo, DPOTrainer, ("prompt_ids", "chosen_ids", "rejected_ids")),
    "unpaired": (UNPAIRED, UnpairedPreferences, kto, KTOTrainer, ("prompt_ids", "completion_ids", "label")),
}
CASES = [(kind, name) for kind, (table, *_) in KINDS.items() for name in table]


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """``prepare("text", rows)``: what TRL's trainer makes of rows that are loaded, by column."""
    place = tmp_path_factory.mktemp("trainers")
    trainers: dict[str, Any] = {}

    def prepare(kind: str, rows: Any) -> dict[str, Any]:
        _, _, training, trainer_cls, columns = KINDS[kind]
        if kind not in trainers:
            args = training(place)
            trainers[kind] = build(trainer_cls, RunData(rows, None, DataReport()), args), args
        trainer, args = trainers[kind]
        rest = (False, None) if trainer_cls is SFTTrainer else ()
        ready = trainer._prepare_dataset(rows, tiny.tokenizer(), args, *rest, "train")
        return {column: list(ready[column]) for column in columns}

    return prepare


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {name}" for kind, name in CASES])
def test_converted_rows_train_the_same_tokens(write, prepare, kind, name):
    brought, by_hand = KINDS[kind][0][name]
    rows, hand = [brought, brought], [by_hand, by_hand]
    if kind == "unpaired":
        label = "label" if "label" in brought else "kto_tag"
        rows[1], hand[1] = {**brought, label: False}, {**by_hand, "label": False}
    ours = run_data(write("brought.jsonl", rows), format=KINDS[kind][1])
    theirs = run_data(write("hand.jsonl", hand), format=KINDS[kind][1])
    assert prepare(kind, ours.train) == prepare(kind, theirs.train)
    assert ours.train.cache_files  # on disk, whatever their number
    (line,) = [note for note in ours.report.notes if "converted to" in note]
    assert line.startswith("train: ")
    assert theirs.report.notes == [note for note in ours.report.notes if note != line]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {name}" for kind, name in CASES])
def test_converted_rows_are_the_same_in_a_stream_and_from_parquet(write, kind, name):
    brought, by_hand = KINDS[kind][0][name]
    format = KINDS[kind][1]

    def rows(path: str, **options: Any) -> list[dict[str, Any]]:
        wanted = by_hand.keys()
        return [{key: row[key] for key in wanted} for row in run_data(path, format=format, **options).train]

    expected = [by_hand] * 3
    assert rows(write("a.jsonl", [brought] * 3), dataset_streaming=True) == expected
    assert rows(write("a.parquet", [brought] * 3)) == expected
