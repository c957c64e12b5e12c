import json
import math
from pathlib import Path

import pytest
import torch

from halfbyte.tracking import RunRecord, peak_memory_bytes
from halfbyte.tracking.card import model_card
from halfbyte.tracking.record import plain


def test_nothing_is_written_before_write(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "out", "sft")
    record.update(config={"a": 1})
    assert not (tmp_path / "out").exists()
    record.write()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


def test_update_merges_one_level(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "sft")
    record.update(base={"name": "x"}, config={"nested": {"a": 1}})
    record.update(base={"sha": "y"}, config={"nested": {"b": 2}}, steps=3)
    assert record["base"] == {"name": "x", "sha": "y"}
    assert record["config"] == {"nested": {"b": 2}}
    assert record["steps"] == 3


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, "sft")
    record.update(
        metrics={"eval": {"eval_loss": math.nan, "n": torch.tensor(2.0)}}, tokens_per_second=math.inf
    )
    record.write()
    values = json.loads(record.path.read_text(), parse_constant=pytest.fail)
    assert values["metrics"]["eval"] == {"eval_loss": None, "n": 2.0}
    assert values["tokens_per_second"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord(tmp_path, "sft")
    record.write()
    before = record.path.read_text()
    record.update(recipe="dpo")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        record.write()
    assert record.path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_what_would_steer_a_terminal_is_escaped(tmp_path: Path) -> None:
    name = "o\x9b31m\u202ex\x7f\udcff"
    record = RunRecord(tmp_path, "sft")
    record.update(config={"output_dir": name, "run_name": "caf\u00e9"})
    record.write()
    text = record.path.read_text()
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "caf\u00e9" in text
    assert json.loads(text)["config"]["output_dir"] == name
    assert "\x1b" not in model_card(record, "a\x1b[31mb")


def test_peak_memory_is_in_bytes() -> None:
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() > 200_000_000


def test_plain_types() -> None:
    value = {"a": torch.tensor([1, 2]), "p": Path("x"), 3: {1}, "t": (1.5, -math.inf), "b": True}
    assert plain(value) == {"a": [1, 2], "p": "x", "3": [1], "t": [1.5, None], "b": True}
