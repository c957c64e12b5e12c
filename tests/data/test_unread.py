"""Columns of context or supervision that are not read: refused, or named where they change nothing."""

from typing import Any

import pytest

from halfbyte.data import PreferencePairs, Text, UnpairedPreferences
from halfbyte.data.formats import OtherRowsError
from halfbyte.errors import UserError
from tests import tiny
from tests.data.conftest import refusal, run_data, sft, turn

U, A, W = turn("user", "hi"), turn("assistant", "hello"), turn("assistant", "no")
TEXTS = {"chosen": "Sure", "rejected": "Sorry"}
BOTH = {"chosen": [U, A], "rejected": [U, W]}


def notes(path: str, format: Any = PreferencePairs, **options: Any) -> list[str]:
    data = run_data(path, format=format, **options)
    assert list(data.train)
    return data.report.notes


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "column",
    ["context", "history", "problem", "post", "passage", "info", "tools", "src", "system"],
)
def test_text_sides_without_a_prompt_refuse_any_column_that_could_hold_it(write, column, streaming):
    values = {"info": {"a": "b"}, "tools": [{"a": 1}], "history": [["a", "b"]]}
    rows = [{**TEXTS, column: values.get(column, "what?")}] * 3
    with refusal("train row 1", f"column {column!r} is not read", "columns: [chosen, rejected]"):
        notes(write("a.jsonl", rows), dataset_streaming=streaming)


def test_json_sides_do_not_lose_their_question(write):
    row = {"system": "s", "question": "q", "chosen": '{"a": 0}', "rejected": '{"b": 0}'}
    data = run_data(write("a.jsonl", [row] * 2), format=PreferencePairs)
    assert data.train[0] == {
        "prompt": [turn("system", "s"), turn("user", "q")],
        "chosen": [turn("assistant", '{"a": 0}')],
        "rejected": [turn("assistant", '{"b": 0}')],
    }


def test_a_found_prompt_is_printed(write):
    rows = [{"id": 7, "source": "x", "score_chosen": 1.0, "chosen": "the red dog", "rejected": "the red sea"}]
    assert notes(write("a.jsonl", rows)) == [
        "train: read as chosen + rejected; columns not used: score_chosen",
        "train: no prompt column; the prompt is what both sides begin with, in row 1 'the red'",
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("format", "row", "column"),
    [
        (Text, {"text": "a fox", "instruction": "what?"}, "instruction"),
        (Text, {"text": "a fox", "tools": [{"name": "f"}]}, "tools"),
        (Text, {"prompt": "a", "completion": "b", "context": "c"}, "context"),
        (Text, {"prompt": "a", "completion": "b", "messages": [U, A]}, "messages"),
        (Text, {"messages": [U, A], "instruction": "what?"}, "instruction"),
        (Text, {"messages": [U, A], "prompt": "what?"}, "prompt"),
        (Text, {"messages": [U, A], "conversations": [U, W]}, "conversations"),
        (Text, {"messages": [U], "output": "what?"}, "output"),
        (Text, {"instruction": "a", "context": "c", "response": "b"}, "context"),
        (Text, {"text": "a fox", "weight": 0.5}, "weight"),
        (Text, {"input_ids": [1, 2], "loss_mask": [0, 1]}, "loss_mask"),
        (PreferencePairs, {**BOTH, "question": "what?"}, "question"),
        (PreferencePairs, {**BOTH, "history": [["a", "b"]]}, "history"),
        (PreferencePairs, {**BOTH, "prompt": "what?"}, "prompt"),
        (PreferencePairs, {"prompt": "a", **TEXTS, "context": "c"}, "context"),
        (PreferencePairs, {"prompt": "a", **TEXTS, "question": "c"}, "question"),
        (UnpairedPreferences, {"prompt": "a", "completion": "b", "label": True, "input": "c"}, "input"),
    ],
)  # fmt: skip
def test_context_and_weights_that_are_not_read_are_refused(write, format, row, column, streaming):
    path = write("a.jsonl", [row] * 2)
    with refusal("train row 1", f"column {column!r} is not read"):
        notes(path, format, dataset_streaming=streaming)


@pytest.mark.parametrize(
    ("format", "row", "named"),
    [
        (Text, {"text": "a fox", "label": 1, "id": "x", "title": "t"}, "label, title"),
        (Text, {"text": "a fox", "label": True}, "label"),
        (Text, {"text": "what? a fox", "question": "what?"}, "question"),
        (Text, {"text": "a fox", "weight": 1.0}, "weight"),
        (Text, {"messages": [U, A], "prompt": "hi", "score": 1}, "prompt, score"),
        (Text, {"messages": [U, A], "text": "<user>hi</user><bot>hello</bot>"}, "text"),
        (Text, {"messages": [U, A], "images": []}, "images"),
        (Text, {"messages": [U, A], "problem": "hi", "solution": "other"}, "problem, solution"),
        (Text, {"question": "a", "answer": "b", "response": "b"}, "answer"),
        (Text, {"messages": [U, A], "chosen": [U, A], "rejected": [U, W]}, "chosen, rejected"),
        (Text, {"input_ids": [1, 2], "text": "a fox", "messages": [U, A]}, "text, messages"),
        (Text, {"input_ids": [1, 2], "labels": [1, 2], "loss_mask": [0, 1]}, None),
        (PreferencePairs, {**BOTH, "prompt": "hi", "messages": [U, A]}, "prompt, messages"),
        (PreferencePairs, {"prompt": "a b", **TEXTS, "question": "b"}, "question"),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_named_in_one_line(write, format, row, named):
    for options in ({}, {"dataset_streaming": True}):
        found = [note for note in notes(write("a.jsonl", [row] * 2), format, **options) if "not used" in note]
        assert [note.partition("not used: ")[2] for note in found] == ([named] if named else [])


@pytest.mark.parametrize(
    "column",
    [
        "System",
        "systemPrompt",
        "Tools",
        "tool_definitions",
        "choices",
        "hint",
        "system_instruction",
        "Context",
    ],
)
def test_context_under_other_spellings_is_refused(write, column):
    with refusal("train row 1", f"column {column!r} is not read"):
        notes(write("a.jsonl", [{"question": "a", "answer": "b", column: "c"}] * 2), Text)


def test_the_columns_to_keep_are_those_of_the_data(write):
    row = {"instruction": "a", "output": "b", "tools": [{"name": "f"}], "context": "c"}
    with refusal("columns: [instruction, output, tools]"):
        notes(write("a.jsonl", [row]), Text)
    with refusal("columns: [prompt, completion, label]"):
        notes(
            write("b.jsonl", [{"prompt": "a", "completion": "b", "label": True, "input": "c"}]),
            UnpairedPreferences,
        )


def test_what_is_repeated_is_words_and_not_letters(write):
    with refusal("train row 1", "column 'context' is not read"):
        notes(write("a.jsonl", [{"text": "a fox", "context": "ox"}]), Text)


def test_any_text_that_is_not_read_is_named(write):
    row = {"messages": [U, A], "thinking": "hm", "topic": "t", "notes": ["n"], "source": "s", "n": 1}
    (line,) = notes(write("a.jsonl", [row]), Text)
    assert line == "train: read as messages; columns not used: thinking, topic, notes"


def test_empty_columns_are_no_context(write):
    rows = [{"text": "a fox", "system": "", "history": [], "input": None, "context": " "}] * 2
    assert notes(write("a.jsonl", rows), Text) == []
    rows = [{"system": "", "prompt": "a", "completion": "b"}] * 2
    assert str(run_data(write("b.jsonl", rows)).report.train.check.layout) == "prompt + completion"
    assert run_data(write("b.jsonl", rows)).train[0]["prompt"] == "a"


def test_a_named_text_column_is_what_was_asked_for(write, tmp_path):
    path = write("a.jsonl", [{"body": "a", "question": "b"}] * 2)
    data = run_data(path, sft(tmp_path, dataset_text_field="body"))
    assert data.report.notes == ["train: read as body; columns not used: question"]


def test_a_row_far_down_that_says_more(write):
    rows = [{"messages": [U, A], "prompt": "hi"}] * 5 + [{"messages": [U, A], "prompt": "what?"}]
    with refusal("train row 6: column 'prompt' is not read"):
        notes(write("a.jsonl", rows), Text)


@pytest.mark.parametrize("column", ["image", "images", "video", "audio"])
def test_media_are_refused(write, column):
    with refusal("training is on text", column):
        notes(write("a.jsonl", [{"messages": [U, A], column: ["a.png"]}]), Text)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "label": True},
        {"messages": [U, A], "label": False},
        {"instruction": "a", "output": "b", "kto_tag": True},
    ],
)
def test_unwanted_answers_are_not_trained_by_sft(write, row):
    with pytest.raises(OtherRowsError, match="unwanted ones would be trained too") as caught:
        notes(write("a.jsonl", [row] * 2), Text)
    assert UnpairedPreferences.reads(caught.value.columns, caught.value.first)


@pytest.mark.parametrize(
    ("format", "row", "other"),
    [
        (Text, {"prompt": "a", **TEXTS}, PreferencePairs),
        (Text, BOTH, PreferencePairs),
        (Text, {"question": "a", **TEXTS}, PreferencePairs),
        (PreferencePairs, {"messages": [U, A]}, Text),
        (PreferencePairs, {"conversations": [{"from": "human", "value": "a"}]}, Text),
        (PreferencePairs, {"instruction": "a", "input": "", "output": "b"}, Text),
        (PreferencePairs, {"prompt": "a", "completion": "b", "label": True}, UnpairedPreferences),
        (UnpairedPreferences, {"messages": [U, A]}, Text),
    ],
)
def test_rows_of_another_format_carry_what_they_are(write, format, row, other):
    with pytest.raises(OtherRowsError) as caught:
        notes(write("a.jsonl", [row] * 2), format)
    columns, first = caught.value.columns, caught.value.first
    assert other.reads(columns, first)
    assert not format.reads(columns, first)


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_turns_that_must_not_be_trained(write, key):
    rows = [{"messages": [U, {**A, key: 1}]}, {"messages": [U, {**A, key: 0}]}]
    with refusal("train row 2", f"message 2: {key!r} is 0", "completion"):
        notes(write("a.jsonl", rows), Text)
    rows = [rows[0], {"messages": [{**U, key: 0}, {**A, key: 1}]}]
    assert notes(write("b.jsonl", rows), Text) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_context_that_only_later_rows_have(write, streaming):
    rows = [{"question": "a", "answer": "b", "system": ""}, {"question": "a", "answer": "b", "system": "s"}]
    train = list(run_data(write("a.jsonl", rows), dataset_streaming=streaming).train)
    assert [len(row["prompt"]) for row in train] == [1, 2]
    rows = [{"instruction": "a", "input": "", "output": "b", "history": []},
            {"instruction": "a", "input": "x", "output": "b", "history": [["c", "d"]]}]  # fmt: skip
    train = list(run_data(write("b.jsonl", rows), dataset_streaming=streaming).train)
    assert [len(row["prompt"]) for row in train] == [1, 3]
    rows = [{"messages": [U, A], "system": None}, {"messages": [U, A], "system": "s"}]
    train = list(run_data(write("c.jsonl", rows), dataset_streaming=streaming).train)
    assert [len(row["messages"]) for row in train] == [2, 3]
    rows = [{"text": "a fox", "context": ""}, {"text": "a fox", "context": "what?"}]
    with refusal("train row 2: column 'context' is not read"):
        notes(write("d.jsonl", rows), Text, dataset_streaming=streaming)


def test_a_prompt_that_the_sides_repeat_is_not_trained_twice(write):
    found = notes(write("a.jsonl", [{"prompt": [U], **BOTH}] * 2))
    assert found == ["train: read as chosen + rejected; columns not used: prompt"]
    with refusal("the completion begins with the prompt"):
        notes(write("b.jsonl", [{"prompt": [U], "completion": [U, A]}]), Text)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prompt", [[turn("system", "s"), U], [turn("system", "s"), U, A], [W, U]])
def test_a_side_that_repeats_the_end_of_its_prompt_is_refused(write, prompt, streaming):
    said = [turn("assistant", "yes"), turn("assistant", "no")]
    chosen, rejected = ([*prompt[1:], answer] for answer in said)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    with refusal("train row 1", "column 'chosen' begins with what `prompt` ends with"):
        notes(write("a.jsonl", [row] * 2), dataset_streaming=streaming)
    row = {"prompt": prompt, "completion": chosen}
    with refusal("train row 1", "column 'completion' begins with what `prompt` ends with"):
        notes(write("b.jsonl", [row] * 2), Text, dataset_streaming=streaming)


def test_sides_of_one_message_without_a_prompt(write):
    with refusal("train row 1", "'chosen'", "found a mapping"):
        notes(write("a.jsonl", [{"chosen": A, "rejected": W}]))


def test_two_readings_are_both_shown(write):
    row = {"instruction": "a", "input": "b", "output": "c", "text": "Below is a"}
    with refusal("two readings", "columns: [instruction, input, output]", "columns: [text]"):
        notes(write("a.jsonl", [row]), Text)
    with refusal(
        "train: two readings: the answer is in response or in answer", "columns: [question, response]"
    ):
        notes(write("c.jsonl", [{"question": "a", "answer": "b", "response": "c"}]), Text)
    with refusal("train: two readings: prompt + response as text", "`completion`", "`question`"):
        notes(write("d.jsonl", [{"prompt": "a", "response": "b"}]), Text)
    row = {"messages": [U, A], "chosen": "hello", "rejected": "no"}
    with refusal("two readings", "'messages' ends with the assistant's turn"):
        notes(write("b.jsonl", [row]))


def test_all_unknown_roles_are_told_at_once(write):
    rows = [
        {"messages": [U, A]},
        {"messages": [U, turn("critic", "a")]},
        {"messages": [turn("narrator", "b")]},
    ]
    with refusal("train row 2", "no role 'critic', 'narrator'", "assistant, developer"):
        notes(write("a.jsonl", rows), Text)
    one = [{"messages": [turn("critic", "a"), turn("narrator", "b")]}]
    with refusal("train row 1", "no role 'critic', 'narrator'"):
        notes(write("b.jsonl", one), Text, dataset_streaming=True)


def test_a_role_that_the_template_knows_is_not_renamed(write):
    template = tiny.CHAT_TEMPLATE.replace("== 'assistant'", "in ('assistant', 'gpt')")
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 2
    data = run_data(write("a.jsonl", rows), tokenizer=tiny.tokenizer(chat_template=template))
    assert data.train[0]["messages"] == [turn("user", "a"), turn("gpt", "b")]


def test_without_a_template_there_is_no_conversation(write, tmp_path):
    bare = tiny.tokenizer(chat_template=None)
    with refusal("instruction + output would become a conversation", "chat_template_path"):
        run_data(write("a.jsonl", [{"instruction": "a", "output": "b"}]), sft(tmp_path), tokenizer=bare)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("format", "good", "bad", "words"),
    [
        (Text, {"instruction": "a", "output": "b"}, {"instruction": None, "output": "b"}, ["'instruction'", "None"]),
        (Text, {"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}, ["'output'", "None"]),
        (Text, {"conversations": [{"from": "human", "value": "a"}]}, {"conversations": []}, ["no conversation"]),
        (Text, {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
         {"conversations": [{"from": "function_call", "value": "f()"}]}, ["a call of a tool must be JSON"]),
        (Text, {"system": "s", "messages": [U]}, {"system": "s", "messages": [turn("system", "t"), U]}, ["differ"]),
        (Text, {"instruction": "a", "output": "b", "history": [["c", "d"]]},
         {"instruction": "a", "output": "b", "history": [["c"]]}, ["'history'", "pairs"]),
        (PreferencePairs, {"question": "a", "chosen": [A], "rejected": [W]},
         {"question": "a", "chosen": [U, A], "rejected": [W]}, ["'chosen' begins with", "question"]),
        (UnpairedPreferences, {"messages": [U, A], "label": True}, {"messages": [U], "label": True}, ["last turn"]),
    ],
)  # fmt: skip
def test_a_row_of_another_shape_is_named(write, format, good, bad, words, streaming):
    path = write("a.jsonl", [good, good, bad])
    with refusal("train row 3", *words):
        notes(path, format, dataset_streaming=streaming)


def test_a_mixture_of_two_forms_and_its_test_split(write, tmp_path):
    from trl.scripts.utils import DatasetConfig

    a = write(
        "a.jsonl", [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 20
    )
    b = write("b.jsonl", [{"messages": [U, A]}] * 20)
    training = sft(tmp_path, eval_strategy="epoch")
    data = run_data(
        datasets=[DatasetConfig(path=a), DatasetConfig(path=b)], test_split_size=0.25,
        training=training, dataset_test_split="test",
    )  # fmt: skip
    assert (len(data.train), len(data.eval)) == (30, 10)
    assert data.train.column_names == data.eval.column_names == ["messages"]
    assert {row["messages"][-1]["content"] for row in data.train} == {"b", "hello"}
    with pytest.raises(UserError, match="train row"):
        run_data(datasets=[DatasetConfig(path=a), DatasetConfig(path=write("c.jsonl", [{"text": "a"}] * 3))])
