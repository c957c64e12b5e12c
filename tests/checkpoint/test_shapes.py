"""Files that are not what their name says: each shape in place of each file is refused, never a traceback or a hang."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from halfbyte.checkpoint import history, manifest, usable
from halfbyte.checkpoint.held import held
from halfbyte.checkpoint.resume import find
from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.tracking.record import read_record
from halfbyte.tracking.rows import read_rows
from tests.checkpoint.test_manifest import recorded
from tests.checkpoint.test_resume import STATE, STATES

TEXTS = {
    "empty": b"",
    "object": b"{}",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "text": b'"x"',
    "nan": b"NaN",
    "deep": b"[" * 100_000,
    "deep and closed": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not UTF-8": b"\xff\xfe{}",
    "NULs": b"\0" * 4096,
    "half": b'{"step": 1, "wan',
}


def _text(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: no byte on disk


SHAPES: dict[str, Callable[[Path], None]] = {
    **{name: _text(content) for name, content in TEXTS.items()},
    "directory": Path.mkdir,
    "pipe": lambda path: os.mkfifo(path),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}


@contextmanager
def soon() -> Iterator[None]:
    """Fail what blocks."""

    def late(*_: object) -> None:
        raise AssertionError("blocked")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def put(path: Path, shape: str) -> None:
    path.unlink(missing_ok=True)
    SHAPES[shape](path)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A run with checkpoint-2 and checkpoint-10."""
    output = tmp_path / "run"
    for step in (2, 10):
        make(output / f"checkpoint-{step}", {**STATE, "global_step": step}, recorded(step=step))
    return output


def make(checkpoint: Path, state: object, sealed: manifest.Manifest) -> None:
    checkpoint.mkdir(parents=True)
    for name in STATES:
        (checkpoint / name).touch()
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    manifest.write(checkpoint, sealed)


@pytest.mark.parametrize("shape", [*SHAPES, "huge"])
def test_a_manifest_of_any_shape_is_passed_over(output: Path, shape: str, capsys) -> None:
    path = output / "checkpoint-10" / "manifest.json"
    path.unlink()
    {**SHAPES, "huge": _huge}[shape](path)
    with soon():
        found = find(str(output), "auto")
        assert found.path == str(output / "checkpoint-2")
        assert found.lines[0].startswith("skipped checkpoint-10: ")
        assert main(["verify", str(output)]) == 1
    assert "checkpoint-10: damaged" in capsys.readouterr().out


WRONG = {
    "step": ["10", -1, 1.5, None, True, [10]],
    "world_size": ["1", 10**12, None, -1],
    "run_id": [5, None, {}],
    "config": [[], None, "x"],
    "inputs": [[], 3],
    "data_position": ["x", None],
    "finite": [1, "true", None],
    "resumable": ["no", None],
    "best_step": ["2", {}],
    "versions": [[], None],
    "decided": [7],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_sealed_manifest_with_a_wrong_type_is_passed_over(output: Path, name: str, value: object) -> None:
    newest = output / "checkpoint-10"
    (newest / "manifest.json").unlink()
    manifest.write(newest, recorded(**{"step": 10, name: value}))
    with soon():
        found = find(str(output), "auto")
    assert found.path == str(output / "checkpoint-2")
    assert found.lines[0].startswith("skipped checkpoint-10: ")


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "link" not in shape and shape != "pipe"])
def test_a_state_of_any_shape_is_passed_over_though_it_is_sealed(output: Path, shape: str) -> None:
    newest = output / "checkpoint-10"
    (newest / "manifest.json").unlink()
    put(newest / "trainer_state.json", shape)
    manifest.write(newest, recorded(step=10))
    with soon():
        assert find(str(output), "auto").path == str(output / "checkpoint-2")
        assert usable.check(newest)[1] != []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("global_step", value) for value in (0, 9, "10", None, -10)),
        *(("epoch", value) for value in ("x", None)),
        *(("log_history", value) for value in (None, {}, ["x"], 5)),
        *(("stateful_callbacks", value) for value in ([], None)),
        *(("best_metric", value) for value in ("0.1", [])),
    ],
)
def test_a_state_with_a_wrong_field_is_passed_over(output: Path, name: str, value: object) -> None:
    shutil.rmtree(output / "checkpoint-10")
    make(output / "checkpoint-10", {**STATE, name: value}, recorded(step=10))
    found = find(str(output), "auto")
    assert found.path == str(output / "checkpoint-2")
    assert "trainer_state.json is not that of a run at step 10" in found.lines[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_logs_of_any_shape(output: Path, name: str, shape: str) -> None:
    """Text is read as far as it is sound; what is no file is refused before anything moves."""
    path = output / name
    put(path, shape)
    before = sorted(output.rglob("*"))
    with soon():
        found = find(str(output), "auto")
        assert found.path == str(output / "checkpoint-10")
        if shape in TEXTS:
            found.require_usable(str(output), overwrite=False)
            assert not read_record(output / "run.json")
            assert read_rows(output / "metrics.jsonl") in ([], [{}])
            history.cut(output, 10)
        else:
            with pytest.raises(UserError, match="no regular file"):
                found.require_usable(str(output), overwrite=False)
            assert sorted(output.rglob("*")) == before


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_record_of_any_shape_is_verified(output: Path, shape: str, capsys) -> None:
    put(output / "run.json", shape)
    with soon():
        assert main(["verify", str(output)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lock_of_any_shape_blocks_nobody(tmp_path: Path, shape: str, capsys) -> None:
    output = tmp_path / "run"
    put(tmp_path / ".run.lock", shape)
    with soon():
        with held(str(output)):
            if shape in TEXTS or shape == "pipe":
                with pytest.raises(UserError, match="is in use by another run"), held(str(output)):
                    pass
        printed = capsys.readouterr().err
    assert ("cannot be locked" in printed) == (shape not in TEXTS and shape != "pipe")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("signed", TEXTS)
def test_a_holder_that_signed_in_any_shape_is_refused_all_the_same(tmp_path: Path, signed: str) -> None:
    output = tmp_path / "run"
    with held(str(output)):
        (tmp_path / ".run.lock").write_bytes(TEXTS[signed])
        with pytest.raises(UserError, match="is in use by another run; choose another"), held(str(output)):
            pass
