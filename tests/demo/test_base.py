"""The base's cache: its key, and that only whole entries come out of it."""

import json
from pathlib import Path

import pytest

from halfbyte.demo import base, corpus, stages


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    (directory / "plots").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "plots" / "loss.png").write_bytes(b"plot")
    record = {
        "config": {"output_dir": str(directory)},
        "next": f"halfbyte sft --model_name_or_path {directory}",
    }
    (directory / "run.json").write_text(json.dumps(record))
    return directory


def test_key_changes_with_everything_that_makes_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus.Corpus((corpus.Text("a", "x = 1"),), ())
    training = stages.base_training(stages.Size())
    key = base.cache_key(text, training)
    assert base.cache_key(text, dict(training)) == key
    others = {
        base.cache_key(corpus.Corpus((corpus.Text("a", "x = 2"),), ()), training),
        base.cache_key(text, stages.base_training(stages.Size(base_steps=7))),
    }
    monkeypatch.setattr(base, "version", lambda name: "0")
    others.add(base.cache_key(text, training))
    monkeypatch.setitem(base.ARCHITECTURE, "hidden_size", 64)
    others.add(base.cache_key(text, training))
    assert len(others | {key}) == 5


def test_stored_run_comes_back(run: Path, tmp_path: Path) -> None:
    entry = tmp_path / "cache" / "key"
    assert not base.restore(entry, tmp_path / "new")
    base.store(run, entry)
    assert base.restore(entry, tmp_path / "new")
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "new" / "plots" / "loss.png").read_bytes() == b"plot"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "model.safetensors",
        "plots",
        "run.json",
    ]
    record = json.loads((tmp_path / "new" / "run.json").read_text())
    assert record["config"]["output_dir"] == str(tmp_path / "new")
    assert record["next"] == f"halfbyte sft --model_name_or_path {tmp_path / 'new'}"
    assert [path.name for path in entry.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "no manifest"])
def test_damaged_entry_is_not_used_and_is_replaced(run: Path, tmp_path: Path, damage: str) -> None:
    entry = tmp_path / "cache" / "key"
    base.store(run, entry)
    if damage == "changed":
        (entry / "model.safetensors").write_bytes(b"weightz")
    elif damage == "missing":
        (entry / "plots" / "loss.png").unlink()
    elif damage == "added":
        (entry / "extra").touch()
    else:
        (entry / "manifest.json").unlink()
    assert not base.restore(entry, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    base.store(run, entry)
    assert base.restore(entry, tmp_path / "new")


def test_cache_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert base.cache_directory() == tmp_path / "halfbyte" / "demo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert base.cache_directory() == tmp_path / "home" / ".cache" / "halfbyte" / "demo"
