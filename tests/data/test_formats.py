"""Which layouts are recognised, and what is said about rows that are not what they should be."""

import datasets
import pytest

from halfbyte.data import DataFormat, Layout, PreferencePairs, ScoredPairs, Text, UnpairedPreferences
from halfbyte.data.kinds import boolean, messages
from halfbyte.errors import UserError
from tests import tiny
from tests.data.conftest import dpo, kto, plain, refusal, run_data, sft, turn

TALK = [turn("user", "hi"), turn("assistant", "hello")]
OTHER = [turn("user", "hi"), turn("assistant", "no")]


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"text": "a"}, "text"),
        ({"messages": TALK}, "messages"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt + completion"),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, "prompt + completion"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "input_ids"),
        ({"prompt": "hi", "prompt_id": "x", "messages": TALK}, "messages"),
    ],
)
def test_text_layouts(write, row, layout):
    data = run_data(write("a.jsonl", [row] * 3))
    assert str(data.report.train.check.layout) == layout
    assert len(data.train) == 3


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt + chosen + rejected"),
        ({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER[1:]}, "prompt + chosen + rejected"),
        ({"chosen": "a b", "rejected": "a c"}, "chosen + rejected"),
        ({"chosen": TALK, "rejected": OTHER}, "chosen + rejected"),
        ({"prompt": "hi", "chosen": TALK, "rejected": OTHER, "messages": TALK}, "chosen + rejected"),
    ],
)
def test_preference_layouts(write, row, layout):
    data = run_data(write("a.jsonl", [row] * 3), format=PreferencePairs)
    assert str(data.report.train.check.layout) == layout


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": TALK[:1], "completion": TALK[1:], "label": True},
    ],
)
def test_unpaired_layouts(write, row):
    rows = [row, {**row, "label": False, "chosen": 1}]
    data = run_data(write("a.jsonl", rows), format=UnpairedPreferences)
    assert str(data.report.train.check.layout) == "prompt + completion + label"
    assert data.train["label"][:] == [True, False]
    assert data.report.notes == [
        "train: read as prompt + completion + label; columns not used: chosen",
        "train: 1 desirable, 1 undesirable",
    ]


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt + chosen + rejected"),
        ({"chosen": TALK, "rejected": OTHER}, "chosen + rejected"),
    ],
)
def test_pairs_are_rows_of_both_labels(write, row, layout):
    data = run_data(write("a.jsonl", [row] * 3), format=UnpairedPreferences)
    assert str(data.report.train.check.layout) == layout
    assert data.report.notes == []
    refused(
        write("a.jsonl", [row] * 3), "a thousand streamed pairs", format=UnpairedPreferences,
        dataset_streaming=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt + chosen + rejected"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5},
            "prompt + chosen + rejected + margin",
        ),
        ({"chosen": "a", "rejected": "b"}, "chosen + rejected"),
        (
            {"chosen": TALK, "rejected": [turn("user", "who"), OTHER[1]], "margin": 2},
            "chosen + rejected + margin",
        ),
    ],
)
def test_scored_layouts(write, row, layout):
    data = run_data(write("a.jsonl", [row] * 3), format=ScoredPairs)
    assert str(data.report.train.check.layout) == layout
    assert data.report.notes == []
    assert data.train.column_names == list(row)


@pytest.mark.parametrize(
    ("wanted", "weights", "line"),
    [
        (5, {}, "5 desirable, 4 undesirable"),
        (3, {}, "3 desirable, 6 undesirable, weighted 1 and 1; balanced with `desirable_weight` from 2 to 2.66, or "
                "`undesirable_weight` from 0.38 to 0.5"),
        (3, {"desirable_weight": 2.0}, "3 desirable, 6 undesirable"),
        (6, {"undesirable_weight": 0.5}, "6 desirable, 3 undesirable, weighted 1 and 0.5; balanced with "
                "`desirable_weight` from 0.25 to 0.33, or `undesirable_weight` from 1.5 to 2"),
    ],
)  # fmt: skip
def test_the_balance_of_labels_is_reported(write, tmp_path, wanted, weights, line):
    rows = [{"prompt": "a", "completion": "b", "label": n < wanted} for n in range(9)]
    data = run_data(write("a.jsonl", rows), kto(tmp_path, **weights), UnpairedPreferences)
    assert data.report.notes == [f"train: {line}"]


def test_unpaired_rows_of_one_label_are_reported(write):
    rows = [{"prompt": "a", "completion": "b", "label": False}] * 3
    data = run_data(write("a.jsonl", rows), format=UnpairedPreferences)
    assert data.report.notes == [
        "train: every label is false; without rows whose label is true, the loss has nothing to compare with"
    ]


def test_a_format_says_when_sides_are_equal():
    assert PreferencePairs.equal({"chosen": TALK, "rejected": [dict(turn) for turn in TALK]}) is True
    assert PreferencePairs.equal({"chosen": "a", "rejected": "b"}) is False
    assert Text.equal({"text": "a"}) is None
    assert (Text.sides, UnpairedPreferences.sides, PreferencePairs.sides) == (1, 1, 2)


def test_columns_that_would_change_what_trl_reads_are_left_out_and_named(write):
    path = write("a.jsonl", [{"prompt": "hi", "messages": TALK, "labels": 1, "score": 2}] * 3)
    data = run_data(path)
    assert sorted(data.train.column_names) == ["messages", "score"]
    assert "train: read as messages; columns not used: prompt, labels, score" in data.report.lines()


def test_another_text_field(write, tmp_path):
    path = write("a.jsonl", [{"body": "a", "text": 3}] * 3)
    data = run_data(path, sft(tmp_path, dataset_text_field="body"))
    assert str(data.report.train.check.layout) == "body"


def refused(path: str, *words: str, training=None, format=Text, **options) -> None:
    with refusal(*words):
        list(run_data(path, training, format, **options).train)  # a stream is checked as its rows arrive


def test_missing_columns(write):
    path = write("a.jsonl", [{"massages": TALK}])
    refused(path, "found: massages", "did you mean messages?", "prompt + completion", "text")
    refused(path, "chosen + rejected", "prompt + chosen + rejected", format=PreferencePairs)


GOOD = {
    "text": [{"text": "a"}] * 4,
    "messages": [{"messages": TALK}] * 4,
    "pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4,
    "unpaired": [{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(4)],
    "tokens": [{"input_ids": [1, 2], "labels": [1, 2]}] * 4,
    "implicit": [{"chosen": TALK, "rejected": OTHER}] * 4,
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ("text", {"text": None}, ["column 'text'", "expected a string, found None"]),
        ("text", {"text": 5}, ["expected a string, found 5"]),
        ("text", {"text": ["x", "y"]}, ["found a list of 2"]),
        ("messages", {"messages": None}, ["list of messages, found None"]),
        ("messages", {"messages": []}, ["the conversation is empty"]),
        ("messages", {"messages": "hi"}, ["found a string of 2 characters"]),
        ("messages", {"messages": ["hi"]}, ["message 1", "expected a mapping"]),
        ("messages", {"messages": [turn("user", "a"), {"role": "assistant", "contents": "b"}]},
         ["message 2", "'content' is None", "its keys: contents, role"]),
        ("messages", {"messages": [{"speaker": "user", "content": "a"}]}, ["'role' is None", "speaker"]),
        ("messages", {"messages": [turn("user", 5)]}, ["'content' is 5"]),
        ("messages", {"messages": [turn("alien", "a")]}, ["no role 'alien'", "assistant, developer"]),
        ("pairs", {"prompt": "a", "chosen": None, "rejected": "c"}, ["column 'chosen'", "found None"]),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": TALK}, ["'rejected' is messages"]),
        ("pairs", {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER[1:]},
         ["a conversation, but row 1 is a string"]),
        ("unpaired", {"prompt": "a", "completion": "b", "label": None}, ["'label'", "true or false, found None"]),
        ("unpaired", {"prompt": "a", "completion": None, "label": True}, ["'completion'", "found None"]),
        ("unpaired", {"prompt": "a", "completion": TALK, "label": True}, ["'completion' is messages"]),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, ["'labels'", "list of 2, found a list of 1"]),
        ("tokens", {"input_ids": [], "labels": []}, ["'input_ids'", "found an empty list"]),
        ("tokens", {"input_ids": [1, None], "labels": [1, 2]}, ["token ids, found None"]),
        ("tokens", {"input_ids": [1, 999], "labels": [1, 2]}, ["ids from 1 to 999, vocabulary of 320"]),
        ("implicit", {"chosen": TALK, "rejected": [turn("user", "other"), TALK[1]]},
         ["no `prompt` column", "do not begin alike"]),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(write, streaming, good, bad, words):
    path = write("a.jsonl", [*GOOD[good], bad, *GOOD[good]])
    formats = {"pairs": PreferencePairs, "implicit": PreferencePairs, "unpaired": UnpairedPreferences}
    format = formats.get(good, Text)
    refused(path, "train row 5:", *words, format=format, dataset_streaming=streaming)


def test_a_label_of_ones_and_zeros_is_refused(write):
    rows = [{"prompt": "a", "completion": "b", "label": n % 2} for n in range(4)]
    refused(
        write("a.jsonl", rows), "train row 1", "'label'", "true or false, found 0", format=UnpairedPreferences
    )


def test_a_refused_row_carries_its_place(write, tmp_path):
    path = write("a.jsonl", [*GOOD["messages"], {"messages": [turn("user", "a")]}])
    with pytest.raises(UserError) as caught:
        run_data(path, sft(tmp_path, assistant_only_loss=True))
    error = caught.value
    assert (error.option, error.split, error.row) == ("assistant_only_loss", "train", 5)
    assert str(error).startswith("assistant_only_loss: train row 5: no message of the assistant's")


def test_a_number_column_in_csv(write):
    refused(write("a.csv", [{"text": 1}, {"text": 2}]), "train row 1", "expected a string, found 1")


def test_an_empty_split(write, tmp_path):
    empty = datasets.Dataset.from_dict(
        {"text": []}, features=datasets.Features(text=datasets.Value("string"))
    )
    empty.save_to_disk(str(tmp_path / "saved"))
    empty.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text("text\n")
    for name in ("saved", "a.parquet", "a.csv"):
        for options in ({}, {"format": None}, {"dataset_streaming": True}):
            refused(str(tmp_path / name), "the split has no rows", **options)


REFUSES = tiny.CHAT_TEMPLATE.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}",
)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_that_the_template_refuses(write, streaming):
    rows = [*GOOD["messages"], {"messages": [turn("user", "bad")]}]
    tokenizer = tiny.tokenizer(chat_template=REFUSES)
    refused(
        write("a.jsonl", rows), "train row 5", "no bad words",
        tokenizer=tokenizer, dataset_streaming=streaming,
    )  # fmt: skip
    pair = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [turn("assistant", "bad")]}
    path = write("b.jsonl", [{**pair, "rejected": OTHER[1:]}] * 2 + [pair])
    refused(path, "train row 3", "no bad words", tokenizer=tokenizer, format=PreferencePairs)


def test_a_third_party_format_is_rendered_by_its_own_columns(write):
    format = DataFormat("questions", (Layout({"question": messages, "score": boolean}),))
    rows = [{"question": TALK, "score": True}] * 3
    data = run_data(write("a.jsonl", rows), format=format)
    assert data.report.train.check.conversational
    path = write("b.jsonl", [*rows, {"question": [turn("user", "bad")], "score": True}])
    refused(
        path, "train row 4", "no bad words", format=format, tokenizer=tiny.tokenizer(chat_template=REFUSES)
    )


def test_conversations_without_a_template(write, tmp_path):
    path = write("a.jsonl", GOOD["messages"])
    bare = tiny.tokenizer(chat_template=None)
    refused(path, "no chat template", "chat_template_path", training=sft(tmp_path), tokenizer=bare)
    path = write("b.jsonl", GOOD["implicit"])
    refused(path, "no chat template", training=dpo(tmp_path), format=PreferencePairs, tokenizer=bare)


def test_loss_options_that_this_data_cannot_have(write, tmp_path):
    text, talk = write("a.jsonl", GOOD["text"]), write("b.jsonl", GOOD["messages"])
    only = {"training": sft(tmp_path, assistant_only_loss=True)}
    refused(text, "assistant_only_loss", "needs conversations", **only)
    unmarked = tiny.CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    refused(talk, "{% generation %}", tokenizer=tiny.tokenizer(chat_template=unmarked), **only)
    mute = write("c.jsonl", [*GOOD["messages"], {"messages": [turn("user", "a")]}])
    refused(mute, "train row 5", "no message of the assistant's", **only)
    refused(talk, "completion_only_loss", training=sft(tmp_path, completion_only_loss=True))
    refused(text, "packing", "max_length", training=sft(tmp_path, packing=True, max_length=None))
    endless = tiny.tokenizer()
    endless.eos_token = None
    refused(text, "no end-of-sequence token", "eos_token", training=sft(tmp_path), tokenizer=endless)


def pairs(rows: int, equal: list[int]) -> list[dict]:
    return [
        {"prompt": "a", "chosen": f"b{n}", "rejected": f"b{n}" if n in equal else f"c{n}"}
        for n in range(1, rows + 1)
    ]


def test_more_than_one_percent_of_equal_pairs_is_an_error(write):
    path = write("a.jsonl", pairs(400, [1, 2, 3, 4, 5]))
    refused(path, "equal in 5 of 400 rows", "row 1, 2, 3, 4, 5", format=PreferencePairs)


def test_without_a_format_rows_are_left_alone(write):
    data = run_data(write("a.jsonl", [{"question": 1, "labels": 2}]), plain(), format=None)
    assert data.train.column_names == ["question", "labels"]
