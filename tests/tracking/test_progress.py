import io
import re
import sys

import pytest
from rich.console import Console
from rich.progress import Task

from halfbyte.terminal.wording import count, memory
from halfbyte.tracking.progress import RunProgress, figures


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _drawn(terminal: io.StringIO) -> list[str]:
    """The lines that were drawn, one after the other and over one another."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", terminal.getvalue())]


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


@pytest.mark.parametrize("remaining", [90, 500 * 3600])  # seconds
@pytest.mark.parametrize("columns", [50, 80, 120])
def test_the_bar_drops_figures_before_the_counter(
    monkeypatch: pytest.MonkeyPatch, columns: int, remaining: int
) -> None:
    """Every drawn line fits, and has steps and time left; logged rows are printed above it."""
    monkeypatch.setattr(Task, "time_remaining", property(lambda task: remaining))
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = RunProgress(bar=True)
    progress.begin(0, 100_000)
    progress.step(20)
    row = {**ROW, "mean_token_accuracy": 0.5, "rewards/accuracies": 0.5, "rewards/margins": 1.5}
    progress.row(row, 12_345.0)
    progress.end()
    lines = _drawn(terminal)
    drawn = [line for line in lines if line.startswith("train")]
    assert drawn
    assert all(len(line) <= columns for line in drawn)
    assert re.search(r" 20/100000 \d+:\d\d:\d\d", drawn[-1])
    assert ("loss 1.234" in drawn[-1]) is (columns > 50)
    assert any(line.startswith("step 20/100000  loss 1.234  lr 2.0e-04") for line in lines)


def test_time_left_shows_where_a_step_takes_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns, from the second step on, with the rows of the log above the bar."""
    seconds = [0.0]
    screen = io.StringIO()
    console = Console(width=80, force_terminal=True, file=screen, get_time=lambda: seconds[0])
    monkeypatch.setattr("halfbyte.tracking.progress.Console", lambda: console)
    monkeypatch.setattr("halfbyte.tracking.progress.say", lambda line: pytest.fail(f"under the bar: {line}"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = RunProgress(bar=True)
    progress.begin(0, 1000)
    for step in (1, 2, 3):
        seconds[0] += 120
        progress.step(step)
        progress.row({**ROW, "step": step}, 12_345.0)
    progress.end()
    lines = _drawn(screen)
    drawn = [line for line in lines if line.startswith("train")]
    assert max(map(len, drawn)) <= 80
    assert "3/1000 33:14:00 loss 1.234" in " ".join(drawn[-1].split())  # 997 steps of two minutes
    rows = [
        place for place, line in enumerate(lines) if line.startswith("step 3/1000  loss 1.234  lr 2.0e-04")
    ]
    assert len(rows) == 1
    assert lines[rows[0] + 1].startswith("train")


def test_ties_are_no_accuracy_of_zero() -> None:
    start = {
        "rewards/accuracies": 0.0,
        "rewards/chosen": 0.0,
        "rewards/rejected": 0.0,
        "rewards/margins": 0.0,
    }
    assert figures(start) == "accuracy - (ties)  margin 0"
    assert figures({f"eval_{key}": value for key, value in start.items()}) == "accuracy - (ties)  margin 0"
    rounded = {**start, "rewards/accuracies": 0.25, "rewards/chosen": 1.3e-7, "rewards/margins": 1.3e-7}
    assert figures(rounded) == "accuracy - (ties)  margin 1.3e-07"
    lost = {
        "rewards/accuracies": 0.0,
        "rewards/chosen": -0.5,
        "rewards/rejected": 0.5,
        "rewards/margins": -1.0,
    }
    assert figures(lost) == "accuracy 0.000  margin -1"


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
