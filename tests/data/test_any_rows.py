"""Whatever the rows, they are read or refused with a short message, and the output directory is left alone."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.cli import main
from halfbyte.data import PreferencePairs, Text, UnpairedPreferences
from halfbyte.errors import UserError
from tests.data.conftest import run_data

COLUMNS = [
    *("text", "messages", "prompt", "completion", "chosen", "rejected", "conversations", "input_ids"),
    *(
        "label",
        "labels",
        "seq_lengths",
        "attention_mask",
        "tools",
        "chat_template_kwargs",
        "image",
        "other",
        "",
    ),
]
HUGE = "word " * 20_000
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\0", "\ufeff", "\ud800", "‮", "<|im_end|>", "<|endoftext|>", "{{ 1/0 }}", HUGE]
    ),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    WORDS,
)
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": WORDS}
        ),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), SCALARS, max_size=3),
    ),
    max_size=4,
)
VALUES = st.one_of(
    SCALARS,
    WORDS,
    TURNS,
    st.lists(st.integers(-5, 400), max_size=6),
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=2),
        max_leaves=6,
    ),
)
ROWS = st.one_of(
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=4), max_size=5),
    # Of one shape, so that what lies behind the first look is reached too.
    st.lists(st.fixed_dictionaries({"messages": TURNS}), min_size=1, max_size=5),
    st.lists(st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}), min_size=1, max_size=5),
    st.lists(
        st.fixed_dictionaries({"prompt": WORDS, "chosen": WORDS, "rejected": WORDS}), min_size=1, max_size=5
    ),
    st.lists(
        st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS, "label": st.booleans()}),
        min_size=1,
        max_size=5,
    ),
    st.lists(st.fixed_dictionaries({"text": SCALARS}), min_size=1, max_size=5),
)
RAW = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\n", b"[]", b"{}", b"null", b'{"text": ', b"[" * 5000, b"\xff\xfe", b"a,b\n1"]),
)


def written(directory: Path, content: list[dict[str, Any]] | bytes, ending: str) -> Path:
    """``content`` as a file; parquet only where Arrow takes the rows at all."""
    path = directory / f"rows.{ending}"
    if isinstance(content, bytes):
        path.write_bytes(content)
        return path
    if ending == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist(content), path)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            path.write_bytes(b"PAR1")
        return path
    lines = [json.dumps(row) for row in content]
    path.write_text("\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]")
    return path


NULL_ROWS = {
    "null": 1,
    "\n null \n": 2,
    '{"text": "a"}\nnull': 2,
    '{"text": "a"}\nnull\n{"text": "b"}': 2,
    '[null, {"text": "a"}]': 1,
    "\ufeffnull": 1,
}


@pytest.mark.parametrize("content", NULL_ROWS)
def test_a_row_that_is_null_is_named(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content.encode(), "jsonl")
    told = f"dataset_name: {path}: line {NULL_ROWS[content]} is `null`, which is no row; remove it"
    assert outcome(str(path)) == told
    assert f"line {NULL_ROWS[content]} is `null`" in outcome(str(tmp_path))


def test_null_within_a_row_is_no_row_of_its_own(tmp_path: Path) -> None:
    rows = '{"text": "null\\nnull", "other": null}\n{"text": "[null]", "other": null}'
    assert outcome(str(written(tmp_path, rows.encode(), "jsonl"))) == ""
    indented = json.dumps([{"text": "a", "other": [None, None]}], indent=1)
    assert outcome(str(written(tmp_path, indented.encode(), "json"))) == ""


def test_arrow_still_crashes_on_a_row_that_is_null() -> None:
    """When this fails the refusal of rows that are `null` can go."""
    code = "import io, pyarrow.json; pyarrow.json.read_json(io.BytesIO(b'null'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGSEGV


FORMATS = (Text, PreferencePairs, UnpairedPreferences)
TRIED: Counter[str] = Counter()
FILES = {
    "content": st.one_of(ROWS, RAW),
    "ending": st.sampled_from(["jsonl", "json", "parquet", "csv"]),
}


def quiet(examples: int) -> Any:
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    TRIED.clear()
    return tmp_path


def outcome(name: str, **options: Any) -> str:
    """The words of a refusal, or nothing where every row was read: a stream is checked as it comes."""
    try:
        for row in run_data(name, **options).train:
            assert row is not None
    except UserError as error:
        return str(error)
    return ""


def test_any_rows_are_read_or_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @quiet(60)
    @given(**FILES, streaming=st.booleans(), format=st.sampled_from(FORMATS))
    def tried(content: Any, ending: str, streaming: bool, format: Any) -> None:
        told = outcome(
            str(written(place, content, ending)),
            format=format,
            dataset_streaming=streaming,
        )
        TRIED["refused" if told else "read"] += 1
        assert len(told.splitlines()) <= 10
        assert {name.partition(".")[0] for name in os.listdir()} <= {"cache", "rows"}

    tried()
    with capsys.disabled():
        print(f"\n{sum(TRIED.values())} files of rows tried: {dict(TRIED)}")


@pytest.mark.faults
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_any_rows_train_or_are_refused(
    place: Path, model_dir: Any, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command: 0, or 2 with a short message, no traceback, and nothing in output_dir."""
    model = str(model_dir("llama"))

    @quiet(60)
    @given(**FILES, streaming=st.booleans())
    def tried(content: Any, ending: str, streaming: bool) -> None:
        output = place / f"run-{sum(TRIED.values())}"
        words = ["--model_name_or_path", model, "--dataset_name", str(written(place, content, ending))]
        words += [
            "--output_dir",
            str(output),
            "--max_steps",
            "1",
            "--save_strategy",
            "no",
            "--dtype",
            "float32",
        ]
        words += ["--report_to", "none", "--dataset_streaming", str(streaming).lower(), "--max_length", "64"]
        code = main([recipe, *words, "--per_device_train_batch_size", "1"])
        told = capsys.readouterr().err
        TRIED[str(code)] += 1
        assert code in (0, 2), told
        assert "Traceback" not in told
        if code == 2:
            assert not output.exists()
            assert len(told[told.index("error: ") :].splitlines()) <= 12

    tried()
    with capsys.disabled():
        print(f"\n{recipe}: {sum(TRIED.values())} inputs tried, by exit code: {dict(TRIED)}")
