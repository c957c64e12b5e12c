"""A user without a home directory, or with one that cannot be written: a run goes on, and keeps nothing there."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte import caches, store
from tests import launch, tiny

VARIABLES = (
    *("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "MPLCONFIGDIR", "TRITON_HOME"),
    *("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"),
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No variable is set, and the directory for temporary files is this test's own."""
    for name in (*VARIABLES, "HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    caches.place.cache_clear()
    yield tmp_path / f"halfbyte-{os.getuid()}"
    caches.place.cache_clear()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_directory_libraries_get_one_and_the_store_is_not_kept(
    homeless, temporary: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches.provide()
    assert os.environ["HOME"] == str(temporary)
    assert not [name for name in VARIABLES if name in os.environ], "they follow HOME"
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == (f"caches that cannot be written are in {temporary} instead: HOME\n")
    with pytest.raises(FileNotFoundError, match="no home directory; set XDG_CACHE_HOME"):
        store.cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary / "given"))
    assert store.cache_directory() == temporary / "given" / "halfbyte"


def test_a_home_directory_that_cannot_be_written_is_kept_and_nothing_is_cached_in_it(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    caches.provide()
    assert os.environ["HOME"] == "/dev/null"
    assert {os.environ[name] for name in VARIABLES} == {str(temporary / n.lower()) for n in VARIABLES}


def test_what_can_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "rows"))
    monkeypatch.setenv("TRITON_HOME", "/dev/null")
    before = dict(os.environ)
    caches.provide()
    after = dict(os.environ)
    assert {name for name in after if after[name] != before.get(name)} == {"TRITON_HOME"}
    assert "TRITON_HOME" in capsys.readouterr().err


def test_a_directory_of_someone_else_is_not_used(temporary: Path) -> None:
    temporary.symlink_to(temporary.with_name("theirs"))
    temporary.with_name("theirs").mkdir()
    found = caches.place()
    assert found.name.startswith("halfbyte-")
    assert found not in (temporary, temporary.with_name("theirs"))
    assert caches.place() == found
    found.rmdir()


@pytest.mark.faults
def test_a_run_of_a_user_whom_the_system_does_not_know(model_dir, tmp_path: Path) -> None:
    """In a working directory that cannot be written, as in a container that another user built."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, and setpriv")
    rows, output = tmp_path / "rows", tmp_path / "out"
    tiny.write_rows(rows, tiny.conversations(24))
    (tmp_path / "tmp").mkdir(mode=0o777)
    for folder in (output, tmp_path / "tmp"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    reading = "+dac_read_search"  # the interpreter and pytest's directories may be root's own
    user = ["--reuid", "12345", "--regid", "12345", "--clear-groups", "--inh-caps", reading]
    done = subprocess.run(
        ["setpriv", *user, "--ambient-caps", reading, sys.executable, "-m", "halfbyte", "sft",
         "--model_name_or_path", str(model_dir("llama")), "--dataset_name", str(rows),
         "--output_dir", str(output / "run"), "--max_steps", "2", "--report_to", "wandb"],
        env={**launch.environment(WANDB_MODE="offline", TMPDIR=str(tmp_path / "tmp")), "PATH": os.environ["PATH"]},
        cwd="/", capture_output=True, text=True, timeout=launch.TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the quantized base is not kept for later runs: there is no home directory" in done.stderr
    assert (output / "run" / "adapter_model.safetensors").is_file()
