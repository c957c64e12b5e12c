"""Runs are found below a directory and read as they were recorded; what is none is named."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from halfbyte.checkpoint.place import lock_beside
from halfbyte.errors import UserError
from halfbyte.tracking.figures import (
    DEFAULT,
    LANGUAGE_MODELING,
    PREFERENCES,
    SCORES,
    WITHOUT_REFERENCE,
    Figures,
)
from halfbyte.tracking.runs import DEPTH, find
from tests.tracking.conftest import TrackedRun
from tests.tracking.written import write_run


def test_a_real_run_is_read_with_its_recipe_s_figures(tracked: TrackedRun) -> None:
    (run,) = find([tracked.directory]).runs
    assert (run.name, run.status, run.record["recipe"]) == (tracked.directory.name, "completed", "sft")
    assert (run.record["steps"], run.total_steps) == (3, 3)
    assert run.peak_memory is not None
    assert run.peak_memory > 1e6
    assert run.figures == DEFAULT
    assert [step for step, _ in run.parts("loss")["eval"]] == [0, 3]
    assert [step for step, _ in run.parts("loss")["train"]] == [1, 2, 3]


def test_runs_are_found_and_named_below_the_folder_that_all_are_in(tmp_path: Path) -> None:
    for name in ("sweep/run-10", "sweep/run-2", "other"):
        write_run(tmp_path / name)
    write_run(tmp_path / "sweep" / "run-2" / "checkpoint-10")  # no run of its own, whatever it holds
    deep = write_run(tmp_path.joinpath(*"a" * (DEPTH + 1)))
    (tmp_path / "notes").mkdir()
    found = find([tmp_path, tmp_path / "sweep" / "run-2"])
    assert [run.name for run in found.runs] == ["other", "sweep/run-2", "sweep/run-10"]
    assert found.left_out == [f"{tmp_path}: no run.json in a, notes"]
    assert [run.name for run in find([deep]).runs] == ["a"]


def test_a_run_inside_a_run_is_found(tmp_path: Path) -> None:
    write_run(tmp_path / "runs")
    write_run(tmp_path / "runs" / "second")
    (tmp_path / "runs" / "plots").mkdir()
    found = find([tmp_path / "runs"])
    assert [run.name for run in found.runs] == ["runs", "runs/second"]
    assert found.left_out == []


DAMAGED = {
    "{": "run.json is damaged",
    "[]": "run.json is damaged, or not one of halfbyte's",
    "[" * 100_000: "run.json is damaged",
    '{"status": "completed"}': "run.json is damaged, or not one of halfbyte's",
    '{"status": 1, "recipe": "sft", "steps": 1, "config": {}}': "run.json is damaged, or not one of halfbyte's",
    "\ud800": "run.json is damaged",
}


def test_what_is_damaged_is_named_and_stops_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    for number, text in enumerate(DAMAGED):
        place = write_run(tmp_path / f"bad-{number}")
        (place / "run.json").write_bytes(text.encode(errors="surrogatepass"))
    (write_run(tmp_path / "bad-none") / "run.json").unlink()
    write_run(tmp_path / "no-log").joinpath("metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "no-log" / "metrics.jsonl")
    found = find([tmp_path, tmp_path / "nowhere"])
    assert [run.name for run in found.runs] == ["good", "no-log"]
    assert found.runs[1].rows == []
    lines = {Path(line.partition(": ")[0]).name: line.partition(": ")[2] for line in found.left_out}
    assert [lines[f"bad-{number}"] for number in range(len(DAMAGED))] == list(DAMAGED.values())
    assert lines["bad-none"] == "no run: it has no run.json"
    assert lines["metrics.jsonl"] == "cannot be read: not a regular file"
    assert lines["nowhere"] == "cannot be read: No such file or directory"


@pytest.mark.parametrize("odd", [{"base": 3, "data": [], "versions": None, "strategy": "x"}, {"figures": 3}])
def test_odd_values_are_as_if_absent(tmp_path: Path, odd: dict) -> None:
    odd |= {"peak_memory_bytes": "much", "tokens_per_second": [], "total_steps": "many"}
    write_run(
        tmp_path / "run", record=odd, datasets=3, rows=[{"step": 5, "loss": True}, {"step": 6, "loss": []}]
    )
    (run,) = find([tmp_path]).runs
    assert (run.peak_memory, run.tokens_per_second, run.total_steps) == (None, None, 20)
    assert run.parts("loss")["train"] == [(10, 1.6), (20, 1.1)]
    assert (run.figures == DEFAULT) is ("figures" in odd)


def test_nothing_found_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no run was found\n  .*: no run: there is no run.json down to 4 folders"
    ):
        find([tmp_path])


def test_a_run_that_nothing_holds_is_told_from_one_at_work(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", record={"status": "running", "steps": 0})
    (run,) = find([place]).runs
    assert (run.status, run.abandoned) == ("running?", True)
    assert run.steps == 20  # run.json is as old as the last save
    with lock_beside(place).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (run,) = find([place]).runs
        assert (run.status, run.abandoned) == ("running", False)
    assert not find([write_run(tmp_path / "done")]).runs[0].abandoned


def test_a_resumed_run_counts_the_last_row_of_a_step(tmp_path: Path) -> None:
    rows = [{"step": 10, "loss": 0.25}, {"step": 10, "eval_loss": 0.5}]
    (run,) = find([write_run(tmp_path / "run", rows=rows)]).runs
    assert run.parts("loss")["train"][0] == (10, 0.25)
    assert run.parts("loss")["eval"][1] == (10, 0.5)


@pytest.mark.parametrize("figures", [DEFAULT, LANGUAGE_MODELING, PREFERENCES, SCORES, WITHOUT_REFERENCE])
def test_figures_come_back_from_run_json(figures: Figures) -> None:
    assert Figures.from_dict(json.loads(json.dumps(figures.as_dict()))) == figures


@pytest.mark.parametrize(
    "odd",
    [
        {"plots": {"../../x": {"title": "x", "label": "x", "keys": ["loss"]}}},
        {"figures": {"loss": {"label": "loss", "form": "9999999999d"}}},
        {"figures": {"loss": {"label": "loss", "better": "often"}}},
        {"figures": {"loss": {"label": "loss", "form": 3}}},
        {"plots": {"x": {"title": "x", "label": "x", "keys": ["loss"], "bounds": "ab"}}},
        {"plots": {"x": {"title": "x", "label": "x", "keys": 3}}},
    ],
)
def test_figures_that_are_none_are_refused(odd: dict) -> None:
    with pytest.raises((TypeError, ValueError)):
        Figures.from_dict({"figures": {}, "plots": {}, "settings": [], **odd})
