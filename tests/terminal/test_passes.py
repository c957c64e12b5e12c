"""Long passes say how far they are, short ones nothing; on rank 0, by a bar on a terminal and by lines elsewhere."""

import sys

import pytest

from halfbyte.terminal import passes
from halfbyte.terminal.passes import Pass, shown


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(passes, "time", clock)
    return clock


def walk(clock, seconds, total=1000, step=1, **options):
    with Pass("counting", total, **options) as progress:
        for _ in range(seconds):
            clock.now += 1
            progress.advance(step)


def test_a_short_pass_says_nothing(clock, capsys):
    with shown(bar=True):
        walk(clock, 1)
    assert capsys.readouterr().out == ""


def test_a_long_pass_says_how_far_it_is_and_when_it_ends(clock, capsys):
    with shown(bar=True):
        walk(clock, 100, step=10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "counting: 20 of 1,000 rows, 10 rows/s, 98 s left"
    assert lines[1] == "counting: 120 of 1,000 rows, 10 rows/s, 88 s left"
    assert lines[-1] == "counting: 1,000 rows in 2 min, 10 rows/s"
    assert len(lines) < 12


def test_a_pass_whose_caller_sums_it_up_ends_without_a_line(clock, capsys):
    with shown(bar=True):
        walk(clock, 100, summed_up=False)
    assert " in " not in capsys.readouterr().out


def test_what_was_there_before_is_not_in_the_rate(clock, capsys):
    with shown(bar=False):
        walk(clock, 2, step=10, done=500)
    assert "520 of 1,000 rows, 10 rows/s, 48 s left" in capsys.readouterr().out


def test_an_unknown_total_has_no_end(clock, capsys):
    with shown(bar=False):
        walk(clock, 2, total=None)
    assert capsys.readouterr().out.splitlines()[0] == "counting: 2 rows, 1 rows/s"


@pytest.mark.parametrize("rank", ["1", "7"])
def test_other_ranks_say_nothing(clock, capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    with shown(bar=True):
        walk(clock, 10)
    assert capsys.readouterr().out == ""


def test_outside_of_the_block_and_after_an_error_nothing_is_said(clock, capsys):
    walk(clock, 10)
    clock.now += 100
    with pytest.raises(TypeError), shown(bar=True):
        walk(clock, 1, step="none")
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_and_a_line_at_the_end(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with shown(bar=True):
        walk(clock, 3, step=100)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("counting: 300 rows in 3 s, 100 rows/s")
