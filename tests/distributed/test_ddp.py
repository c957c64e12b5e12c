"""Two processes under ``accelerate launch`` fail together, once, and soon. What they train: test_matrix.py."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests import launch, tiny


def test_a_mistake_is_said_once_and_writes_nothing(tmp_path: Path, model_dir) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(12))
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"model_name_or_path: {model_dir('llama')}\ndataset_name: {rows}\nlearning_rat: 1.0e-4\n"
    )
    done = launch.accelerate("sft", "--config", str(config), "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 1  # the launcher's own, whatever its children end with
    assert [line.startswith("error: ") for line in done.stderr.splitlines()].count(True) == 1
    assert done.stderr.count(f"{config}:3: learning_rat: unknown option; did you mean learning_rate?") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def fail(tmp_path: Path, model_dir, site: str) -> Callable[[int, str], CompletedProcess[str]]:
    """``fail(rank, place)``: a run on two processes of which only ``rank`` fails."""

    def run(rank: int, place: str) -> CompletedProcess[str]:
        rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(20))
        options = {
            "model_name_or_path": str(model_dir("llama")),
            "dataset_name": rows,
            "dtype": "float32",
            "max_steps": "4",
            "logging_steps": "1",
            "report_to": "none",
            "output_dir": str(tmp_path / "run"),
            "failing_rank": str(rank),
            "failing_at": place,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        return launch.accelerate("witness-sft", *words, PYTHONPATH=site)

    return run


def test_a_failure_that_leaves_others_waiting_ends_the_run(
    tmp_path: Path, fail: Callable[[int, str], CompletedProcess[str]]
) -> None:
    """Rank 0 fails where rank 1 waits for it in a barrier."""
    done = fail(0, "prepare")
    assert done.returncode == 1
    assert "error: witness-sft: only rank 0 fails" in done.stderr
    assert not (tmp_path / "run").exists()
