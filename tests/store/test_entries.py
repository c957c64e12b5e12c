"""One odd entry, a read-only cache or two kinds in one store: nothing breaks, and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte import store
from tests import launch, tiny
from tests.store.bases import assert_equal, keys, load, release

ODD = {
    "an object": "{}",
    "a list": "[]",
    "null": "null",
    "deep": "[" * 100_000,
    "not JSON": "x",
    "files are a list": '{"label": "x", "files": []}',
    "a size that is text": '{"label": "x", "files": {"config.json": {"size": "1"}}}',
    "a size that is no number": '{"description": {}, "files": {"a": {"size": NaN, "sha256": "0", "mtime_ns": 1}}}',
    "a file that is missing": '{"description": {}, "files": {"a": {"size": 1, "sha256": "0", "mtime_ns": 1}}}',
}


OTHERS = ("unreadable", "a file", "a link", "a pipe", "a gigabyte", "a build's leftovers")


@pytest.mark.parametrize("case", [*ODD, *OTHERS])
def test_an_odd_entry_breaks_nothing_and_can_be_removed(
    tmp_path: Path, cache: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.cli import main

    base = tiny.save_model(tmp_path / "base")
    first = load(base)
    (sound,) = keys()
    odd = cache / "0123"
    if case == "a file":
        odd.write_text("")
    elif case == "a link":
        odd.symlink_to(tmp_path / "nowhere")
    elif case == "a build's leftovers":
        (cache / "0123.tmp-77").mkdir()
        (cache / "0123.tmp-77" / "model.safetensors").write_text("half")
        (cache / "0123.tmp-78").write_text("")
    elif case == "a pipe":
        odd.mkdir()
        os.mkfifo(odd / "manifest.json")
    else:
        odd.mkdir()
        (odd / "manifest.json").write_text(ODD.get(case, ""))
        if case == "unreadable":
            (odd / "manifest.json").unlink()
            (odd / "manifest.json").mkdir()
        if case == "a gigabyte":
            os.truncate(odd / "manifest.json", 1 << 30)
    assert_equal(load(base), first)
    capsys.readouterr()  # DeepSpeed, where it is installed, prints lines of its own
    assert main(["cache", "ls", "--json"]) == 0
    listed = {each["key"]: each["damaged"] for each in json.loads(capsys.readouterr().out)}
    assert listed == {sound: False, "0123": True}
    assert main(["cache", "ls"]) == 0
    assert "damaged" in capsys.readouterr().out
    assert main(["cache", "rm", "0123"]) == 0
    assert keys() == [sound]
    assert {path.name.partition(".")[0] for path in cache.iterdir() if path.suffix != ".lock"} == {sound}


@pytest.mark.parametrize("case", ODD)
def test_an_entry_with_an_odd_manifest_is_made_again(tmp_path: Path, cache: Path, case: str) -> None:
    base = tiny.save_model(tmp_path / "base")
    first = load(base)
    release()
    (cache / keys()[0] / "manifest.json").write_text(ODD[case])
    assert_equal(load(base), first)
    assert store._is_sound(cache / keys()[0])


def test_a_read_only_store_is_used_as_it_is(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_model(tmp_path / "base")
    first = load(base)
    release()
    opened = os.open

    def read_only(path, flags, *rest, **kwargs):
        if flags & os.O_CREAT and str(path).startswith(str(cache)):
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, flags, *rest, **kwargs)

    monkeypatch.setattr(store.os, "open", read_only)
    monkeypatch.setattr(store, "_publish", lambda *_: pytest.fail("an entry is written"))
    assert_equal(load(base), first)
    assert "is not kept" not in capsys.readouterr().err
    load(base, dtype=torch.float32)  # which the store has not
    assert "is not kept for later runs" in capsys.readouterr().err


def test_without_a_home_a_base_is_loaded_without_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_model(tmp_path / "base")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a uid that has no password entry
    monkeypatch.chdir(tmp_path)
    load(base)
    assert "there is no home directory; set XDG_CACHE_HOME" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_two_kinds_share_one_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.cli import main

    scores = store.Kind("scores", "score")
    monkeypatch.setattr(store, "KINDS", (store.BASES, scores))

    assert [number(store.BASES, 1), number(scores, 1), number(scores, 2), number(scores, 1)] == [1, 1, 2, 1]
    assert {(each.kind, each.base) for each in store.entries()} == {
        ("bases", "number 1"),
        ("scores", "number 1"),
        ("scores", "number 2"),
    }
    assert main(["cache", "ls"]) == 0
    assert "1 quantized base and 2 scores, " in capsys.readouterr().out
    release()
    (oldest,) = (each for each in store.entries() if each.kind == "bases")
    os.utime(store.root(store.BASES) / f"{oldest.key}.lock", (1, 1))
    monkeypatch.setattr(store, "BOUND", 3100)
    number(scores, 3)
    assert {(each.kind, each.base) for each in store.entries()} == {
        ("scores", "number 1"),
        ("scores", "number 2"),
        ("scores", "number 3"),
    }


def number(kind: store.Kind, value: int) -> int:
    """An entry that costs nothing to make: 1000 bytes that hold ``value``."""
    return store.obtain(
        kind,
        {"number": value},
        f"number {value}",
        make=lambda: value,
        load=lambda entry: int((entry / "number").read_text()),
        save=lambda made, entry: (entry / "number").write_text(f"{made:1000d}") and None,
    )


def test_one_key_in_two_kinds_is_two_entries(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.cli import main

    scores = store.Kind("scores", "score")
    monkeypatch.setattr(store, "KINDS", (store.BASES, scores))
    for kind in store.KINDS:
        number(kind, 1)
    release()
    capsys.readouterr()  # DeepSpeed, where it is installed, prints lines of its own
    assert main(["cache", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {each["kind"] for each in listed} == {"bases", "scores"}
    assert listed[0]["key"] == listed[1]["key"]
    assert main(["cache", "rm", listed[0]["key"]]) == 0
    assert keys() == []
    for kind in store.KINDS:
        number(kind, 1)
    release()
    assert main(["cache", "rm", "--all"]) == 0
    assert keys() == []


def test_a_manifest_without_a_true_size_evicts_nothing(cache: Path) -> None:
    number(store.BASES, 1)
    release()
    (sound,) = keys()
    (cache / "0123").mkdir()
    for size in ("NaN", "1e999", str(10**30)):
        (cache / "0123" / "manifest.json").write_text(
            '{"label": "x", "description": {}, "files": {"a": {"size": SIZE, "sha256": "0", "mtime_ns": 1}}}'.replace(
                "SIZE", size
            )
        )
        number(store.BASES, 2)
        release()
        assert sound in keys()


def test_what_lies_beside_an_entry_does_not_keep_it_from_being_built(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number(store.BASES, 1)
    release()
    (key,) = keys()
    assert store.remove("bases", key)
    (cache / key).symlink_to(tmp_path / "nowhere")
    (cache / f"{key}.tmp-1").write_text("")
    assert number(store.BASES, 1) == 1
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in cache.iterdir()) == [key, f"{key}.build.lock", f"{key}.lock"]


@pytest.mark.parametrize("denied", ["the build lock", "removing what is damaged"])
def test_an_entry_that_cannot_be_built_is_said_in_a_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], denied: str
) -> None:
    number(store.BASES, 1)
    release()
    (key,) = keys()
    (cache / key / "number").write_text("2")
    if denied == "the build lock":
        (cache / f"{key}.build.lock").unlink()
        (cache / f"{key}.build.lock").mkdir()
    else:

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied", "entry")

        monkeypatch.setattr(Path, "rename", refuse)
    assert number(store.BASES, 1) == 1
    assert store._in_use == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the quantized base is not kept for later runs: ")


def test_an_interrupted_build_holds_no_lock(cache: Path) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.obtain(store.BASES, {}, "x", interrupted, lambda _: 0, lambda *_: None)
    (lock,) = (path for path in cache.glob("*.lock") if ".build" not in path.name)
    assert store.remove("bases", lock.stem)


def test_an_entry_in_a_read_only_directory_is_held_while_it_is_used(cache: Path) -> None:
    """By another user than the one who may write there."""
    number(store.BASES, 1)
    release()
    (key,) = keys()
    code = (
        "import os, sys; from halfbyte import store\n"
        "if os.geteuid() == 0:\n"
        "    opened = os.open\n"
        "    def read_only(path, flags, *rest, **more):\n"
        "        if flags & os.O_RDWR: raise PermissionError(13, 'Permission denied', str(path))\n"
        "        return opened(path, flags, *rest, **more)\n"
        "    os.open = read_only\n"
        "found = store.obtain(store.BASES, {'number': 1}, 'x', lambda: 7, lambda p: 1, lambda *_: None)\n"
        "print(found, flush=True); sys.stdin.read()\n"
    )
    if os.geteuid() != 0:
        cache.chmod(0o555)
        (cache / f"{key}.lock").chmod(0o444)
    environment = launch.environment(XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "1\n"
        assert [entry.in_use for entry in store.entries()] == [True]
        process.communicate("")
    cache.chmod(0o755)
    assert [entry.in_use for entry in store.entries()] == [False]


def test_entries_of_the_first_version_are_used_and_listed(cache: Path) -> None:
    number(store.BASES, 1)
    release()
    (key,) = keys()
    manifest = json.loads((cache / key / "manifest.json").read_text())
    assert manifest.pop("label") == manifest["description"]["base"] == "number 1"
    (cache / key / "manifest.json").write_text(json.dumps(manifest))
    assert number(store.BASES, 1) == 1
    assert [(entry.base, entry.damaged) for entry in store.entries()] == [("number 1", False)]


def test_the_cache_command_without_a_home_and_with_odd_names(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.cli import main

    number(store.BASES, 1)
    release()
    os.mkdir(os.fsencode(cache) + b"/\xff")
    (cache / "0123").mkdir()
    (cache / "0123.lock").mkdir()
    assert main(["cache", "ls"]) == 0
    assert main(["cache", "rm", "--all"]) == 0
    assert keys() == []
    capsys.readouterr()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert main(["cache", "ls"]) == 2
    assert "there is no home directory; set XDG_CACHE_HOME" in capsys.readouterr().err
