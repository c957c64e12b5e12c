"""What no file of rows can hold is named by file, line and byte, before or after a parser meets it."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data import contents
from halfbyte.errors import UserError
from tests import tiny
from tests.data.conftest import refusal, run_data

ROWS = "".join(json.dumps({"text": f"h\u00e9 {n}"}, ensure_ascii=False) + "\n" for n in range(3))
CSV = "text\nh\u00e9\n"
UNREADABLE: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "latin-1 jsonl": ("a.jsonl", ROWS.encode("latin1"), ("line 1, byte 12", "not UTF-8", "iconv -f latin1")),
    "latin-1 csv": ("a.csv", CSV.encode("latin1"), ("line 2, byte 7", "not UTF-8", "iconv")),
    "latin-1 json": ("a.json", '[\n{"text": "\u00e9"}]'.encode("latin1"), ("line 2, byte 13", "not UTF-8")),
    "UTF-16 jsonl": ("a.jsonl", ROWS.encode("utf-16"), ("UTF-16", "iconv -f UTF-16")),
    "UTF-16 csv": ("a.csv", CSV.encode("utf-16"), ("UTF-16",)),
    "UTF-16 without a mark": ("a.jsonl", ROWS.encode("utf-16-le"), ("line 1, byte 2", "NUL", "UTF-16")),
    "NUL in a row": ("a.jsonl", b'{"text": "a"}\n{"text": "b\0c"}\n', ("line 2, byte 26", "NUL")),
    "NUL in csv": ("a.csv", b"text\na\nb\0c\n", ("line 3, byte 9", "NUL")),
    "a tail of NULs": ("a.jsonl", ROWS.encode() + b"\0" * 64, ("line 4", "NUL", "full disk")),
    "cut off in a character": (
        "a.jsonl",
        ROWS.encode() + b'{"text": "\xc3',
        ("line 4", "not UTF-8", "cut off"),
    ),
    "a comma in an object": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b",}\n',
        ("line 2, column 14", "a comma too many"),
    ),
    "a comma behind a row": ("a.jsonl", b'{"text": "a"},\n{"text": "b"},\n', ("line 1, column 14", "comma")),
    "a comma in an array": ("a.json", b'[{"text": "a"},\n]', ("line 2, column 1", "a comma too many")),
    "a cut row": ("a.jsonl", b'{"text": "a"}\n{"text": "b', ("line 2, column 10", "Unterminated string")),
    "single quotes": ("a.jsonl", b"{'text': 'a'}\n", ("line 1, column 2", "double quotes")),
    "rows that are lists": ("a.jsonl", b'{"text": "a"}\n["b"]\n', ("line 2", "must be an object")),
    "deep lists": ("a.jsonl", b'{"x": %b}\n' % (b"[" * 10**5 + b"]" * 10**5), ("line 1", "64 levels")),
    "deep objects": (
        "a.jsonl",
        b'{"x": 1}\n{"x": %b1%b}\n' % (b'{"x":' * 10**5, b"}" * 10**5),
        ("line 2", "64 levels"),
    ),
    "no parquet": ("a.parquet", b"PAR1" + bytes(100), ("not a whole parquet file",)),
    "no arrow": ("a.arrow", bytes(100), ("not a whole arrow file",)),
    "empty parquet": ("a.parquet", b"P", ("not a whole parquet file",)),
    "deep in an array": ("a.json", b"[\n{\n" + b'"x": {\n' * 10**5, ("line 65", "64 levels")),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_named_by_file_and_place(tmp_path: Path, case: str) -> None:
    name, content, words = UNREADABLE[case]
    path = tmp_path / "d" / f"train{Path(name).suffix}"
    path.parent.mkdir()
    path.write_bytes(content)
    for options in (
        {"name": str(path)},
        {"name": str(path), "dataset_streaming": True},
        {"name": str(path.parent)},
        {"datasets": [{"path": str(path)}]},
    ):
        with refusal(str(path), *words):
            list(run_data(**options).train)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "[[[[{{{{" * 100},
        {"text": '\\" [ \\\\'},
        {"text": "]}]}", "more": [[[["[" * 500]]]]},
        {"text": "a", "other": [[1] * 50] * 50},
        {"text": "\u0000 escaped, and \u20ac"},
    ],
)
def test_brackets_in_text_and_wide_rows_are_no_depth(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert len(run_data(str(path)).train) == 2


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.recursive(
        st.text(alphabet='[]{}"\\a', max_size=6),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.text(alphabet='{"\\', max_size=3), inner, max_size=2)
        ),
        max_leaves=12,
    ),
    st.integers(0, 90),
)
def test_the_depth_is_that_of_the_value(tmp_path: Path, value: Any, levels: int) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            return 1 + max(map(depth, inner), default=0)
        return 0

    for _ in range(levels):
        value = {"x": value}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(["x"]) + "\n" + json.dumps(value) + "\n")
    if depth(value) <= contents.DEEPEST:
        contents.refuse(path)
    else:
        with pytest.raises(UserError, match="line 2 is nested"):
            contents.refuse(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "rows"])
@pytest.mark.parametrize("make", ["pipe", "dangling link"])
def test_what_is_no_file_is_refused_and_never_opened(tmp_path: Path, name: str, make: str) -> None:
    path = tmp_path / "d" / name
    path.parent.mkdir()
    if make == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    told = (str(path), "is a pipe, a device or a link to nothing", "write the rows to a file")
    for options in (
        {"name": str(path)},
        {"name": str(path), "dataset_streaming": True},
        {"datasets": [{"path": str(path)}]},
    ):
        with refusal(*told):
            run_data(**options)
    if name != "rows":
        (tmp_path / "d" / "train.jsonl").write_text(ROWS)
        with refusal(*told):
            run_data(str(path.parent))


@pytest.mark.parametrize("state", ["", "{}", "[]", "null", '{"_data_files": [{}]}', "[" * 10**5])
def test_a_saved_data_set_with_a_broken_state_is_named(tmp_path: Path, state: str) -> None:
    datasets.Dataset.from_list(tiny.texts(3)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text(state)
    for options in ({"name": str(tmp_path / "saved")}, {"datasets": [{"path": str(tmp_path / "saved")}]}):
        with refusal("saved", "state.json"):
            run_data(**options)


@pytest.mark.parametrize("name", ["data[v2]", "da*ta", "what?", "a[b/c]d"])
@pytest.mark.parametrize("mixture", [False, True])
def test_a_directory_whose_name_looks_like_a_pattern(write, tmp_path: Path, name: str, mixture: bool) -> None:
    write(f"{name}/train.jsonl", tiny.texts(4))
    write(f"{name}/test.jsonl", tiny.texts(2))
    write("daXta/train.jsonl", tiny.texts(1))  # which the pattern would match
    path = str(tmp_path / name)
    data = run_data(datasets=[{"path": path}]) if mixture else run_data(path)
    assert len(data.train) == 4
    saved = tmp_path / "saved" / name
    datasets.Dataset.from_list(tiny.texts(3)).save_to_disk(str(saved))
    data = run_data(datasets=[{"path": str(saved)}]) if mixture else run_data(str(saved))
    assert len(data.train) == 3


def test_the_key_is_named(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none.jsonl"), str(tmp_path), "./nowhere", "no/such/rows"):
        with pytest.raises(UserError) as caught:
            run_data(name)
        assert caught.value.option == "dataset_name"
