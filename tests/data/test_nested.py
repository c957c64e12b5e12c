"""Conversations and tools train the same tokens, whatever the file that holds them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import SFTTrainer
from trl.scripts.utils import DatasetConfig

from halfbyte.data import PreferencePairs, Text, nested
from tests import tiny
from tests.data.conftest import dpo, refusal, run_data, sft, turn
from tests.data.preparation.test_prepared import build

PRINTS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ m.items() | list | length }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    about = {"name": name, "parameters": {"type": "object", "properties": parameters}}
    return {"type": "function", "function": about}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


HI, BYE = turn("user", "hi"), turn("assistant", "bye")
# Rows that differ in the keys of one nested column.
DIFFERING = {
    "tools": [
        {"messages": [HI, BYE], "tools": [tool("f", x={"type": "int"}), tool("g", y={"enum": ["a", None]})]},
        {"messages": [HI, BYE], "tools": [tool("h", z={"type": "string", "default": "no"})]},
        {"messages": [HI, BYE], "tools": None},
    ],
    "arguments": [
        {"messages": [HI, call("f", x=1), BYE]},
        {"messages": [HI, call("g", y={"a": [1, 2]}), BYE]},
        {"messages": [HI, call("g", y={"b": "c"}), BYE]},
    ],
    "keys of messages": [
        {"messages": [HI, {**BYE, "thinking": "so"}]},
        {"messages": [{**HI, "name": "Ann"}, BYE]},
        {"messages": [HI, BYE]},
    ],
    "chat_template_kwargs": [
        {"messages": [HI, BYE], "chat_template_kwargs": {"mood": "good"}},
        {"messages": [HI, BYE], "chat_template_kwargs": {"depth": 2}},
        {"messages": [HI, BYE], "chat_template_kwargs": None},
    ],
    "parts": [
        {"messages": [turn("user", [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])]},
        {"messages": [turn("user", [{"text": "there", "cache": {"on": 1}}])]},
        {"messages": [turn("assistant", [{"type": "text", "text": ""}])]},
    ],
}
SOURCES = ("a.json", "a.jsonl", "a.parquet", "a.arrow", "saved")


def written(place: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """The rows as Arrow itself would write them, which gives each the keys of all."""
    path = place / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = datasets.Dataset(pa.Table.from_pylist(rows))
        table.save_to_disk(str(place / f"{path.stem}-of-{path.name}" if path.suffix else path))
        if path.suffix:
            next((place / f"{path.stem}-of-{path.name}").glob("*.arrow")).rename(path)
    return str(path)


def expected(row: dict[str, Any]) -> str:
    """The row as written, without nulls, its text parts joined."""
    row = {key: value for key, value in row.items() if value is not None}
    for message in row["messages"]:
        if isinstance(message.get("content"), list):
            message["content"] = "".join(part["text"] for part in message["content"])
    return json.dumps(row, sort_keys=True)


def found(rows: Any) -> list[str]:
    """Rows as JSON, and a column that is empty in a row as if it was not there."""
    return [json.dumps({k: v for k, v in row.items() if v}, sort_keys=True) for row in rows]


@pytest.mark.parametrize("differing", DIFFERING)
def test_rows_are_what_was_written_in_every_format(tmp_path: Path, differing: str) -> None:
    rows = DIFFERING[differing]
    tokenizer = tiny.tokenizer(chat_template=PRINTS)
    wanted = [expected(json.loads(json.dumps(row))) for row in rows]
    for name in SOURCES:
        path = written(tmp_path, name, rows)
        for options in (
            {"name": path},
            {"name": path, "dataset_streaming": True},
            {"datasets": [{"path": path}]},
        ):
            assert found(run_data(**options, tokenizer=tokenizer).train) == wanted, (name, options)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_parts_of_a_mixture_may_be_of_any_format(tmp_path: Path, streaming: bool) -> None:
    rows = DIFFERING["tools"] + DIFFERING["arguments"]
    parts = [rows[:1], rows[1:4], rows[4:]]
    paths = [
        written(tmp_path, f"{n}{end}", p)
        for n, (end, p) in enumerate(zip((".jsonl", ".parquet", ".arrow"), parts, strict=True))
    ]
    wanted = [expected(json.loads(json.dumps(row))) for row in rows]
    data = run_data(datasets=[{"path": path} for path in paths], streaming=streaming)
    assert found(data.train) == wanted


_TOOLED = [{"messages": [HI, BYE], "tools": [tool("f", x={"a": 1})]},
           {"messages": [HI, BYE], "tools": [tool("g", y={"b": 1})]}]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        {},
        {"tools": None},
        {"tools": []},
        {"chat_template_kwargs": None},
        {"chat_template_kwargs": {"mood": "good"}},
    ],
)
def test_a_part_of_a_mixture_may_lack_what_another_nests(
    tmp_path: Path, write: Any, other: dict[str, Any], streaming: bool
) -> None:
    rows = [[{"messages": [HI, BYE], **other}] * 2, _TOOLED]
    if streaming:
        rows.reverse()
    parts = [DatasetConfig(path=write(f"{n}.jsonl", part)) for n, part in enumerate(rows)]
    tokenizer = tiny.tokenizer(chat_template=PRINTS)
    training = sft(tmp_path, max_length=None, max_steps=1)
    data = run_data(datasets=parts, streaming=streaming, training=training, tokenizer=tokenizer)
    found = [row["input_ids"] for row in build(SFTTrainer, data, training, tokenizer).train_dataset]
    assert found == [
        tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), **(row.get("chat_template_kwargs") or {})
        )["input_ids"]
        for part in rows
        for row in part
    ]


def test_a_column_that_is_text_in_one_part_and_nested_in_another_is_refused(write: Any) -> None:
    text = [{"messages": [HI, BYE], "tools": "[]"}]
    parts = [DatasetConfig(path=write(f"{n}.jsonl", part)) for n, part in enumerate((_TOOLED, text))]
    with refusal("column 'tools' is text in datasets[1] and nested in another part"):
        run_data(datasets=parts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_trained_tokens_are_those_of_the_rows(tmp_path: Path, name: str) -> None:
    rows = [row for key in ("tools", "arguments", "chat_template_kwargs") for row in DIFFERING[key]]
    columns = ("messages", "tools", "chat_template_kwargs")
    rows = [{column: row.get(column) for column in columns} for row in rows]
    tokenizer, training = tiny.tokenizer(chat_template=PRINTS), sft(tmp_path, max_length=None)
    trainer = build(
        SFTTrainer,
        run_data(written(tmp_path, name, rows), training, tokenizer=tokenizer),
        training,
        tokenizer,
    )
    for row, ids in zip(rows, trainer.train_dataset["input_ids"], strict=True):
        plain = json.loads(expected(json.loads(json.dumps(row))))
        text = tokenizer.apply_chat_template(
            plain["messages"], tools=row["tools"], tokenize=False, **(row["chat_template_kwargs"] or {})
        )
        assert json.loads(expected(json.loads(json.dumps(row)))) == plain
        assert sorted(tokenizer.decode(ids)) == sorted(text)  # Arrow keeps no order of keys
        assert "null" not in text.replace('["a", null]', "")


NAMES = st.sampled_from(["a", "b", "c"])
VALUES = st.recursive(
    st.integers(0, 9),
    lambda inner: st.dictionaries(NAMES, inner, max_size=2).map(
        lambda d: {f"{k}{type(v).__name__}": v for k, v in sorted(d.items())}
    ),
    max_leaves=4,
)
OBJECTS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=3).map(
    lambda d: {f"{k}{type(v).__name__}": v for k, v in sorted(d.items())}
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.fixed_dictionaries({"tools": st.lists(OBJECTS, min_size=1, max_size=3)}), min_size=1, max_size=4
    )
)
def test_any_tools_come_back_as_they_were(rows: list[dict[str, Any]]) -> None:
    structs = nested.settle(datasets.Dataset(pa.Table.from_pylist(rows)))
    mixed = nested.settle(datasets.Dataset.from_list(rows, on_mixed_types="use_json"))
    assert list(structs) == list(mixed) == rows


def test_a_null_that_was_written_is_left_out_and_reported_but_not_of_text(tmp_path: Path) -> None:
    schema = tool("f", x={"type": "int", "default": None})
    rows = [{"messages": [HI, BYE], "tools": [schema, tool("g", y={"type": "int"})]}] * 2
    data = run_data(written(tmp_path, "a.jsonl", rows))
    assert data.train[0]["tools"][0] == tool("f", x={"type": "int"})
    assert any("train: keys that hold null are left out of tools" in note for note in data.report.notes)
    same = run_data(written(tmp_path, "a.parquet", rows))
    assert found(same.train) == found(data.train)
    assert not same.report.notes
    kept = [{"messages": [HI, BYE], "tools": json.dumps([schema])}] * 2
    for name in ("b.jsonl", "b.parquet"):
        assert json.loads(run_data(written(tmp_path, name, kept)).train[0]["tools"]) == [schema]


def test_rows_without_nested_differences_are_left_as_they_are(tmp_path: Path) -> None:
    data = run_data(written(tmp_path, "a.parquet", [{"messages": [HI, BYE]}] * 3))
    assert isinstance(data.train.features["messages"].feature, dict)


JOINS = PRINTS.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part.text }}{% endfor %}")
DROPS = PRINTS.replace("{{ m['content'] }}", "{% if m['content'] is string %}{{ m['content'] }}{% endif %}")
BOTH = PRINTS.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part.text }}{% endfor %}{% endif %}",
)
STRICT = PRINTS.replace("{{ m['content'] }}", "{{ 'said: ' + m['content'] }}")


@pytest.mark.parametrize(
    ("template", "joined"), [(PRINTS, True), (DROPS, True), (STRICT, True), (BOTH, False), (JOINS, False)]
)
def test_text_parts_are_joined_where_the_template_does_not_iterate_them(
    tmp_path: Path, template: str, joined: bool
) -> None:
    tokenizer = tiny.tokenizer(chat_template=template)
    rows = [
        {"messages": [turn("user", [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]), BYE]}
    ]
    if template is JOINS:
        rows[0]["messages"][1] = turn("assistant", [{"type": "text", "text": "bye"}])
    for name in ("a.jsonl", "a.parquet"):
        if name == "a.parquet" and template is not JOINS:
            rows[0]["messages"][1] = turn("assistant", [{"type": "text", "text": "bye"}])
        data = run_data(written(tmp_path, name, rows), tokenizer=tokenizer)
        text = tokenizer.apply_chat_template(data.train[0]["messages"], tokenize=False)
        assert "hi you" in text
        assert "'" not in text
        assert isinstance(data.train[0]["messages"][0]["content"], str) is joined


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "input_audio", "video"])
@pytest.mark.parametrize("streaming", [False, True])
def test_parts_that_are_no_text_are_refused(tmp_path: Path, kind: str, streaming: bool) -> None:
    parts = [{"type": "text", "text": "see"}, {"type": kind, kind: "a.png"}]
    rows = [{"messages": [HI, BYE]}, {"messages": [turn("user", parts), BYE]}]
    path = written(tmp_path, "a.jsonl", rows)
    with refusal("train row 2", "message 1", f"'{kind}'", "training is on text"):
        list(run_data(path, dataset_streaming=streaming).train)


@pytest.mark.parametrize("part", ["hi", {"type": "text"}, {"type": "text", "text": 5}, 7])
def test_parts_of_another_shape_are_refused(tmp_path: Path, part: Any) -> None:
    path = written(tmp_path, "a.jsonl", [{"messages": [turn("user", [part]), BYE]}])
    with refusal("train row 1", "message 1", '{"type": "text", "text": ...}'):
        run_data(path)


def test_pairs_keep_their_keys_through_the_extraction_of_a_prompt(tmp_path: Path) -> None:
    rows = [
        {
            "chosen": [*row["messages"], turn("assistant", "a")],
            "rejected": [*row["messages"], turn("assistant", "b")],
        }
        for row in DIFFERING["arguments"]
    ]
    for name in ("a.jsonl", "a.parquet"):
        data = run_data(written(tmp_path, name, rows), dpo(tmp_path), PreferencePairs)
        assert [row["chosen"][1]["tool_calls"] for row in data.train] == [
            row["chosen"][1]["tool_calls"] for row in rows
        ]


def test_rows_of_a_recipe_without_a_format_have_no_invented_keys(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["messages"], "meta": {"a": 1} if n else {"b": 1}}
        for n, row in enumerate(DIFFERING["arguments"])
    ]
    train = run_data(written(tmp_path, "a.parquet", rows), format=None).train
    assert train[0]["prompt"][1]["tool_calls"] == rows[0]["prompt"][1]["tool_calls"]
    assert train[0]["meta"] == {"b": 1, "a": None}  # not rendered: as it was read
    assert Text.name


AS_JSON = "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
AS_IT_IS = "{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}"
EITHER = (
    "{% for c in m.tool_calls %}{% set a = c.function.arguments %}"
    "{{ a if a is string else a | tojson }}{% endfor %}"
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "stream.jsonl"])
@pytest.mark.parametrize("given", [{"x": "é"}, '{"x": "é"}'], ids=["object", "text"])
@pytest.mark.parametrize("template", [AS_JSON, AS_IT_IS, EITHER], ids=["json", "as it is", "either"])
def test_arguments_of_calls_are_json_once_however_they_are_written(
    tmp_path: Path, template: str, given: Any, name: str
) -> None:
    tokenizer = tiny.tokenizer(
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}"
        + template
        + "<|im_end|>{% endfor %}"
    )
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": given}}],
    }
    path = written(tmp_path, name, [{"messages": [HI, message, BYE]}] * 2)
    data = run_data(path, tokenizer=tokenizer, dataset_streaming="stream" in name)
    text = tokenizer.apply_chat_template(next(iter(data.train))["messages"], tokenize=False)
    assert '{"x": "é"}' in text.replace("\\u00e9", "é")


def test_text_that_is_no_object_stays_and_a_change_of_arguments_is_said(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}"
        + AS_JSON
        + "<|im_end|>{% endfor %}"
    )
    held = ['{"x": 1}', "", "not json", "[1]"]
    rows = [
        {"messages": [HI, {**BYE, "tool_calls": [{"function": {"name": "f", "arguments": text}}]}]}
        for text in held
    ]
    data = run_data(written(tmp_path, "a.jsonl", rows), tokenizer=tokenizer)
    found = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in data.train]
    assert found == [{"x": 1}, {}, "not json", "[1]"]
    assert data.report.notes == ["train: arguments of tool calls are given to the chat template as object"]
