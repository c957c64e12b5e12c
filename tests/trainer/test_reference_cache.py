"""What a fault costs a pass of the reference: a flipped byte, a kill, a full disk; and what `halfbyte cache` says."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from halfbyte import locks, parts, store
from halfbyte.cli import main
from halfbyte.trainer import reference_pass, reference_shard
from tests import tiny
from tests.checkpoint.runs import options, run
from tests.trainer.preferences import (
    LN2,
    PAIRS,
    ModelDir,
    Passes,
    assert_live,
    cache,
    columns,
    dpo,
    first_loss,
    passes,
    small,
)

__all__ = ["cache", "dpo", "passes", "small"]


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize("where", ["at the start", "in the middle", "at the end"])
def test_a_flipped_byte_is_found_and_its_shard_computed_again(
    dpo: Callable[..., Trainer], cache: Path, passes: Passes, small: None, where: str, capsys
) -> None:
    expected = columns(dpo().train_dataset)
    assert passes.taken() == len(PAIRS)
    path = shards(cache)[1]
    content = bytearray(path.read_bytes())
    content[{"at the start": 3, "in the middle": len(content) // 2, "at the end": -1}[where]] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    found = columns(dpo(seed=3).train_dataset)
    assert passes.taken() == 4
    told = [line for line in capsys.readouterr().err.splitlines() if "computed again" in line]
    assert told == [f"the reference cache {path} has changed content (sha256); it is computed again"]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    dpo()
    assert passes.taken() == 0


def test_a_pass_that_is_killed_continues_at_its_shard(
    dpo: Callable[..., Trainer],
    cache: Path,
    passes: Passes,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    if (child := os.fork()) == 0:
        stock = parts.Parts.add

        def killed(self: parts.Parts, name: str, *rest: Any, **given: Any) -> None:
            if name == reference_shard.name(2):
                os.kill(os.getpid(), signal.SIGKILL)
            stock(self, name, *rest, **given)

        monkeypatch.setattr(parts.Parts, "add", killed)
        dpo()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(shards(cache)) == 2
    (entry,) = (each for each in store.entries() if each.kind == "references")
    assert (entry.damaged, entry.in_use) == (False, False)
    assert entry.base.endswith("12 pairs (train), 2 of 3 parts")
    trainer = dpo()
    assert passes.taken() == 4
    assert "4 pairs computed in " in (told := capsys.readouterr().err)
    assert "cached, 8 read from the cache" in told
    assert_live(trainer, trainer.train_dataset)


def test_a_run_that_is_stopped_in_a_pass_leaves_its_shards_and_no_more(
    model_dir: ModelDir,
    tmp_path: Path,
    cache: Path,
    passes: Passes,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.preferences(16))
    arguments = options(model_dir("llama"), rows, tmp_path / "run", precompute_ref_log_probs="true")
    stock = parts.Parts.add

    def stopped(self: parts.Parts, name: str, *rest: Any, **given: Any) -> None:
        if name == reference_shard.name(1):
            os.kill(os.getpid(), signal.SIGTERM)
        stock(self, name, *rest, **given)

    with monkeypatch.context() as patched:
        patched.setattr(parts.Parts, "add", stopped)
        assert run("dpo", arguments) == 128 + signal.SIGTERM
    assert not (tmp_path / "run").exists()
    assert [path.name for path in shards(cache)] == [reference_shard.name(0)]
    passes.taken()
    assert run("dpo", arguments) == 0
    assert passes.taken() == 12 - 4


@pytest.mark.parametrize("left", ["a shard that no manifest lists", "half a shard", "no manifest", "a file"])
def test_what_an_interruption_leaves_is_not_taken_for_a_shard(
    dpo: Callable[..., Trainer], cache: Path, passes: Passes, small: None, left: str
) -> None:
    expected = columns(dpo().train_dataset)
    passes.taken()
    entry = shards(cache)[0].parent
    content = json.loads((entry / "manifest.json").read_text())
    del content["files"][reference_shard.name(2)]
    (entry / "manifest.json").write_text(json.dumps(content))
    if left == "half a shard":
        shards(cache)[2].rename(entry / f".{reference_shard.name(2)}.77.tmp")
    elif left == "no manifest":
        (entry / "manifest.json").unlink()
    elif left == "a file":
        for path in entry.iterdir():
            path.unlink()
        entry.rmdir()
        entry.write_text("")
    found = columns(dpo().train_dataset)
    assert passes.taken() == (4 if "shard" in left else len(PAIRS))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert sorted(path.name for path in entry.iterdir()) == [
        *map(reference_shard.name, range(3)),
        "manifest.json",
    ]


def test_a_full_disk_is_said_and_the_run_goes_on(
    dpo: Callable[..., Trainer], cache: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    stock = parts.replace_file

    def full(path: Path, content: bytes) -> None:
        if path.name == reference_shard.name(1):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        stock(path, content)

    monkeypatch.setattr(parts, "replace_file", full)
    trainer = dpo()
    told = capsys.readouterr().err
    place = shards(cache)[0].with_name(reference_shard.name(1))
    assert f"the reference cache is not kept for later runs: No space left on device ({place})" in told
    assert "12 pairs computed in " in told
    assert "cached" not in told.partition("12 pairs computed in ")[2].splitlines()[0]
    assert_live(trainer, trainer.train_dataset)
    assert first_loss(trainer) == pytest.approx(LN2, abs=1e-6)


def test_a_store_that_cannot_be_written_is_read_as_it_is(
    dpo: Callable[..., Trainer], cache: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    dpo()
    passes.taken()
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **given: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(cache.parent)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *rest, **given)

    monkeypatch.setattr(os, "open", read_only)
    capsys.readouterr()
    dpo(seed=3)
    assert passes.taken() == 0
    assert "is not kept" not in capsys.readouterr().err
    dpo(rows=PAIRS[:-2])
    assert passes.taken() == len(PAIRS) - 2
    assert "the reference cache is not kept for later runs: Read-only file system" in capsys.readouterr().err


def test_a_second_process_waits_for_what_the_first_computes(
    dpo: Callable[..., Trainer],
    cache: Path,
    passes: Passes,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    dpo()
    passes.taken()
    entry = shards(cache)[0].parent
    whole = (entry / "manifest.json").read_text()
    content = json.loads(whole)
    del content["files"][reference_shard.name(2)]
    (entry / "manifest.json").write_text(json.dumps(content))
    lock = locks.hold(store.beside(entry, store.BUILD_LOCK))

    def finished(seconds: float) -> None:  # by the process that holds the lock
        (entry / "manifest.json").write_text(whole)

    monkeypatch.setattr(reference_pass.time, "sleep", finished)
    try:
        dpo()
    finally:
        os.close(lock)
    assert passes.taken() == 0
    assert "another process is computing the same; waiting for it" in capsys.readouterr().err


def test_the_cache_command_lists_and_removes_them(
    dpo: Callable[..., Trainer], model_dir: ModelDir, capsys
) -> None:
    dpo()
    capsys.readouterr()
    assert main(["cache", "ls", "--json"]) == 0
    (entry,) = (each for each in json.loads(capsys.readouterr().out) if each["kind"] == "references")
    assert entry["base"] == f"{model_dir('llama')}: 12 pairs (train)"
    assert 0 < entry["size"] < 100_000
    assert not entry["in_use"]
    assert not entry["damaged"]
    assert main(["cache", "ls"]) == 0
    assert "1 quantized base and 1 reference cache, " in capsys.readouterr().out
    assert main(["cache", "rm", entry["key"]]) == 0
    assert [each.kind for each in store.entries()] == ["bases"]
