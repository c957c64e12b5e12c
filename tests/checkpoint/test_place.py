"""An output directory that no run can write to is refused with its key and line, before anything is loaded or made."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte import locks
from halfbyte.checkpoint import history, place
from halfbyte.checkpoint.held import held
from halfbyte.cli import main
from halfbyte.errors import UserError

Make = Callable[[Path], str]


def below_a_file(root: Path) -> str:
    (root / "file").write_text("x")
    return str(root / "file" / "deeper" / "run")


def a_file(root: Path) -> str:
    (root / "file").write_text("x")
    return str(root / "file")


def a_dangling_link(root: Path) -> str:
    (root / "link").symlink_to(root / "gone")
    return str(root / "link")


def below_a_dangling_link(root: Path) -> str:
    (root / "link").symlink_to(root / "gone")
    (root / "gone").write_text("a file")
    return str(root / "link" / "run")


def a_circle(root: Path) -> str:
    (root / "link").symlink_to(root / "link")
    return str(root / "link" / "run")


def a_pipe(root: Path) -> str:
    os.mkfifo(root / "pipe")
    return str(root / "pipe")


PLACES: dict[str, tuple[Make, str]] = {
    "below a file": (below_a_file, "which is no directory"),
    "a file": (a_file, "is a file; name a directory"),
    "a dangling link": (a_dangling_link, "which does not exist"),
    "below a link to a file": (below_a_dangling_link, "which is no directory"),
    "a circle of links": (a_circle, "cannot be used"),
    "256 characters": (lambda root: str(root / ("x" * 256)), "File name too long"),
    "128 letters of two bytes": (lambda root: str(root / ("\u00e9" * 128)), "File name too long"),
    "a long path": (lambda root: str(root / "/".join(["x" * 200] * 30)), "cannot be used"),
    "a pipe": (a_pipe, "is a file; name a directory"),
    "the root": (lambda root: "/", "is the root directory"),
    "the root in other words": (lambda root: "/tmp/..", "is the root directory"),
    "a NUL": (lambda root: "a\0b", "NUL"),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_bad_place_is_refused_by_key_and_line_and_nothing_is_made(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture
) -> None:
    make, said = PLACES[where]
    output = make(tmp_path)
    config = tmp_path / "run.yaml"
    written = output.replace("\0", "\\0")
    config.write_text(
        f'model_name_or_path: no/such/base\noutput_dir: "{written}"\ndataset_name: no/such/rows\n'
    )
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "auto"]):
        assert main(["sft", "--config", str(config), *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{config}:2: output_dir: " in error
        assert said in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["run", "new/deep/run", ".", "./run/", "run/../other", "x" * 250])
def test_a_good_place_is_not(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place.obstacle(name) is None
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_utf8_is_refused_before_weights_cannot_be_saved() -> None:
    assert "not UTF-8" in str(place.obstacle(os.fsdecode(b"runs/o\xff")))


def as_nobody(do: Callable[[], None]) -> int:
    """The exit code of ``do`` in a fork without privileges."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            do()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_place_that_this_user_may_not_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o555)

    def look() -> None:
        for name in ("there", "there/run", "there/deep/run"):
            refusal = place.obstacle(str(tmp_path / name)) or ""
            assert "is read-only for this user" in refusal or "Permission denied" in refusal

    assert as_nobody(look) == 0


@pytest.fixture
def no_file_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a directory that is mounted into a read-only one, as in a container, answers."""

    def refuse(path: Path) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(locks, "open_lock", refuse)


def test_a_directory_in_a_read_only_one_is_held_by_itself(no_file_beside: None, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with held(str(output)), pytest.raises(UserError, match="in use by another run; "), held(str(output)):
        pass
    with held(str(output)):
        pass
    assert list(output.iterdir()) == []


def test_a_file_system_without_locks_is_said_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(lock: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "try_to_hold", refuse)
    opened = len(os.listdir("/proc/self/fd"))
    with held(str(tmp_path / "new" / "run")):
        pass
    assert (
        "cannot be locked (No locks available): a second run in it would not be noticed"
        in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == opened


def test_what_cannot_be_renamed_is_not_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    assert history.not_to_be_moved(tmp_path / "run", ()) is None
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "run")
    assert "cannot be renamed" in (history.not_to_be_moved(tmp_path / "run", ()) or "")
