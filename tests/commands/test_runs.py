"""`halfbyte runs`: a table that fits the terminal, plain lines elsewhere, and JSON with everything."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.cli import main
from tests.tracking.written import write_run

SAME = ["nothing differs between the configurations"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_run(tmp_path / "slow", (2.0, 1.5, 1.25), learning_rate=1e-5)
    write_run(tmp_path / "fast", (2.0, 0.75, 1.0), learning_rate=1e-3, record={"status": "failed"})
    return tmp_path


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """``terminal(columns, *arguments)``: the lines of a command on a terminal so wide."""

    def run(columns: int, *arguments: str) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout.isatty", lambda: True, raising=False)
            patch.setattr(
                "halfbyte.tracking.overview.Console", lambda: Console(width=columns, force_terminal=False)
            )
            assert main(["runs", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_plain_lines_have_every_column(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(sweep), "--sort", "eval_loss"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [
        "name best eval loss status last eval loss steps recipe tokens_per_second peak_memory base data",
        "fast 0.75 @10 failed 1 20/20 sft 1.23k 2.00 GiB owner/base chat, 56 rows",
        "slow 1.25 @20 completed 1.25 20/20 sft 1.23k 2.00 GiB owner/base chat, 56 rows",
        "by eval_loss, the least first",
    ]
    assert lines[5:7] == [
        "which is better",
        "eval loss: best is fast, 0.75 at step 10, last 1; next slow, 1.25 at step 20",
    ]
    assert lines[8:] == ["what differs", "fast slow", "learning_rate 0.001 1e-05"]


def test_a_terminal_of_80_columns(sweep: Path, terminal: Callable[..., list[str]]) -> None:
    lines = terminal(80, str(sweep))
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines[:4]] == [
        ["best", "last", "tokens", "peak"],
        ["name", "eval", "loss", "status", "eval", "loss", "steps", "per", "second", "memory"],
        ["fast", "0.75", "@10", "failed", "1", "20/20", "1.23k", "2.00", "GiB"],
        ["slow", "1.25", "@20", "completed", "1.25", "20/20", "1.23k", "2.00", "GiB"],
    ]
    assert lines[4] == "all: sft, owner/base, chat, 56 rows"


def test_a_narrow_terminal_drops_what_matters_least_and_says_so(
    sweep: Path, terminal: Callable[..., list[str]]
) -> None:
    write_run(sweep / ("a-run-with-a-name-that-is-longer-than-the-terminal" * 2), (2.0, 1.0))
    lines = terminal(48, str(sweep))
    assert max(map(len, lines)) <= 48
    text = " ".join(" ".join(lines).split())
    assert "no room in 48 columns: last eval loss, tokens per second, peak memory (--json has them)" in text
    assert "1.25 @20" in text
    assert "0.0001: a-run-with-a-name" in text  # each value with its runs: side by side is too wide


def test_where_and_nothing_left(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(sweep), "--where", "status=failed", "recipe=sft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "fast"]
    assert main(["runs", str(sweep), "--where", "recipe=dpo"]) == 0
    assert capsys.readouterr().out == "none of 2 runs has recipe=dpo\n"


def test_json_has_everything(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(sweep), "--json", "--sort", "eval_loss"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in listed] == ["fast", "slow"]
    for run in listed:
        recorded = json.loads((sweep / run["name"] / "run.json").read_text())
        assert recorded.items() <= run.items()
        assert Path(run["directory"]) == sweep / run["name"]
    assert listed[0]["best"] == {
        "eval_loss": {"best": 0.75, "best_step": 10, "last": 1.0, "last_step": 20, "greater_is_better": False}
    }
    assert main(["runs", str(sweep), "--json", "--where", "recipe=dpo"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_what_is_left_out_is_named_on_standard_error(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep / "fast" / "run.json").write_text("{")
    assert main(["runs", str(sweep), "--json"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 1
    assert printed.err == f"left out: {sweep / 'fast'}: run.json is damaged\n"


def test_whatever_stands_in_the_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what no run of ours writes: the output is a table and JSON all the same."""
    pair = {"eval_rewards/accuracies": 0.5, "eval_rewards/chosen": [], "eval_rewards/rejected": "x"}
    rows = [
        {"step": True},
        {"step": 10**400, "eval_loss": 1.0},
        {"step": 5, "eval_loss": float("nan"), **pair},
    ]
    for name, odd in (("a", float("inf")), ("b", 10**400)):
        record = {
            "tokens_per_second": odd,
            "peak_memory_bytes": [odd],
            "base": {"sha": [odd]},
            "tokenizer": 3,
        }
        place = write_run(tmp_path / name, recipe="dpo", beta=odd, record=record)
        with (place / "metrics.jsonl").open("a") as file:
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))
    for options in ([], ["--sort", "beta"], ["--sort", "tokens_per_second"], ["--where", "beta=null"]):
        assert main(["runs", str(tmp_path), *options]) == 0
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [run["best"]["eval_loss"]["last"] for run in listed] == [None, None]


def test_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a run that stopped, however many there are, and with one alone; the line to copy is whole."""
    command = "halfbyte sft --config a.yaml " + "--resume_from_checkpoint auto " * 9
    for name, status in (("a", "completed"), ("b", "interrupted"), ("c", "failed")):
        write_run(tmp_path / name, record={"status": status, "next": f"{command}{name}"})
    write_run(tmp_path / "d", record={"best_checkpoint": "checkpoint-10", "next": None})
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5:8] == [
        *(f"{name}: next: {command}{name}" for name in "bc"),
        "d: its weights are those of checkpoint-10, the best",
    ]
    assert main(["runs", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"a: next: {command}a"


def test_one_run_and_a_killed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", record={"status": "running"})
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "running?" in lines[1]
    assert lines[2:] == [
        "run: run.json says running, and no process of this machine holds it: killed, or elsewhere"
    ]


def test_equal_runs_differ_in_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1:] == SAME


def test_no_secret_and_no_control_character_of_a_foreign_run_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "hf_" + "A1b2C3d4" * 4
    for name in ("a", "b\x1b[31m"):
        write_run(tmp_path / name, run_kind=f"{token} {name}")
    for options in ([], ["--json"]):
        assert main(["runs", str(tmp_path), *options]) == 0
        printed = capsys.readouterr().out
        assert token not in printed
        assert "\x1b" not in printed
