"""`halfbyte verify`: what is usable is printed, and the exit code separates damage from invalid input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.checkpoint import manifest, resume
from halfbyte.cli import main
from tests.checkpoint.test_manifest import recorded
from tests.checkpoint.test_resume import STATE


@pytest.fixture
def output(tmp_path: Path) -> Path:
    for step in (5, 10):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "weights").write_bytes(b"w" * step)
        for name in ("trainer_state.json", "scheduler.pt", "rng_state.pth", "optimizer.pt"):
            (directory / name).write_bytes(b"state")
        (directory / "trainer_state.json").write_text(json.dumps({**STATE, "global_step": step}))
        manifest.write(directory, recorded(step=step))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"final")
    listed = manifest.listing(tmp_path, ["adapter_model.safetensors"])
    (tmp_path / "run.json").write_text(json.dumps({"files": listed}))
    return tmp_path


def test_a_whole_run(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "checkpoint-10: ok",
        "checkpoint-5: ok",
        "final weights: ok",
        "a resume starts from checkpoint-10",
    ]


def test_a_damaged_checkpoint(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "checkpoint-10" / "weights").write_bytes(b"w" * 4)
    assert main(["verify", str(output)]) == 1
    printed = capsys.readouterr().out
    assert "checkpoint-10: damaged\n  weights has 4 bytes instead of 10\n" in printed
    assert "a resume starts from checkpoint-5" in printed
    assert main(["verify", str(output / "checkpoint-10")]) == 1
    assert main(["verify", str(output / "checkpoint-5")]) == 0


def test_damaged_final_weights(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "adapter_model.safetensors").write_bytes(b"finaL")
    assert main(["verify", str(output)]) == 1
    assert "adapter_model.safetensors has changed content" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "printed"),
    [({"finite": False}, "its weights are not finite"), ({"resumable": False}, "weights only")],
)
def test_a_checkpoint_that_is_whole_but_not_usable(output: Path, capsys, given: dict, printed: str) -> None:
    for name in ("checkpoint-5", "checkpoint-10"):
        (output / name / "manifest.json").unlink()
        manifest.write(output / name, recorded(**given))
    main(["verify", str(output)])
    out = capsys.readouterr().out
    assert printed in out
    assert "no checkpoint can be resumed from" in out


def test_it_names_the_checkpoint_that_a_resume_takes(output: Path, capsys) -> None:
    (output / "checkpoint-10").rename(output / "checkpoint-20")
    assert main(["verify", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        "checkpoint-20 (it cannot be resumed from: its manifest is that of checkpoint-10: it was renamed or "
        "copied): ok"
    )
    assert printed[-1] == "a resume starts from checkpoint-5"
    assert resume.find(str(output), "auto").path == str(output / "checkpoint-5")


def test_a_checkpoint_without_its_optimizer_is_not_resumed_from(output: Path, capsys) -> None:
    for step in (5, 10):
        directory = output / f"checkpoint-{step}"
        (directory / "optimizer.pt").unlink()
        manifest.write(directory, recorded(step=step))
    assert main(["verify", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "it holds no optimizer.pt" in printed
    assert "no checkpoint can be resumed from" in printed


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--json"], [".", "--json"], ["no-such-directory"]])
def test_a_mistake_ends_with_2(arguments: list[str]) -> None:
    assert main(["verify", *arguments]) == 2


def test_a_directory_that_is_no_run_ends_with_2(tmp_path: Path, capsys) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "neither a checkpoint" in capsys.readouterr().err


def test_it_needs_no_torch(output: Path) -> None:
    code = (
        "import sys; from halfbyte.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, "verify", str(output)], check=True, stdout=subprocess.DEVNULL)
