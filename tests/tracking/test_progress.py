import io
import sys

import pytest

from halfbyte.tracking.progress import RunProgress, figures
from halfbyte.wording import count, memory


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROW = {"step": 20, "loss": 1.2341, "learning_rate": 2e-4, "grad_norm": 0.812}


def test_a_row_is_one_compact_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RunProgress(bar=True)  # standard output is captured, so no terminal
    progress.begin(0, 100)
    progress.row(ROW, 12_345.0)
    progress.row({"step": 20, "eval_loss": 1.5, "eval_rewards/accuracies": 0.875}, None)
    progress.row({"step": 100, "train_runtime": 3.0, "train_loss": 1.0}, None)
    progress.end()
    assert capsys.readouterr().out.splitlines() == [
        "step 20/100  loss 1.234  lr 2.0e-04  grad 0.81  12.3k tok/s",
        "step 20/100  eval  loss 1.5  accuracy 0.875",
    ]


def test_figures_that_are_not_finite_are_said() -> None:
    assert figures({"loss": None, "grad_norm": 1.0}) == "loss nan  grad 1"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = RunProgress(bar=True)
    progress.begin(0, 100)
    progress.step(20)
    progress.row(ROW, None)
    progress.end()
    assert "20/100" in terminal.getvalue()
    assert "loss 1.234" in terminal.getvalue()


def test_no_bar_keeps_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = RunProgress(bar=False)
    progress.begin(0, 100)
    progress.step(20)
    progress.row(ROW, None)
    progress.end()
    assert terminal.getvalue() == "step 20/100  loss 1.234  lr 2.0e-04  grad 0.81\n"


def test_units() -> None:
    assert [count(value) for value in (3.14159, 950, 12_345, 1.2e6)] == ["3.14", "950", "12.3k", "1.2M"]
    assert [memory(value) for value in (50 * 2**20, 3 * 2**30)] == ["50 MiB", "3.00 GiB"]
