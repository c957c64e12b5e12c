import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from halfbyte.errors import UserError
from halfbyte.tracking import RunRecord, check_wandb
from halfbyte.tracking.wandb_run import WandbRun, _settings
from tests.tracking import wandb_file
from tests.tracking.conftest import TrackedRun


@pytest.fixture
def environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracked: TrackedRun
) -> Iterator[pytest.MonkeyPatch]:
    """W&B as a fresh process without a login sees it. (`tracked` first: it sets up W&B for itself.)"""
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield monkeypatch
    wandb.teardown()


def _file(directory: Path) -> Path:
    wandb.teardown()  # as the end of a process does: its service has then written everything
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    return path


def test_offline_file_has_every_row_and_the_config(tracked: TrackedRun) -> None:
    run = wandb_file.read(_file(tracked.directory))
    rows = [json.loads(line) for line in (tracked.directory / "metrics.jsonl").read_text().splitlines()]
    history = [{key: row[key] for key in row if not key.startswith("_")} for row in run["history"]]
    assert history == [
        {**{key: value for key, value in row.items() if value is not None}, "train/global_step": row["step"]}
        for row in rows
    ]
    assert (run["project"], run["name"], run["exit_code"]) == ("halfbyte", "sft", 0)
    config = run["config"]
    assert config["learning_rate"] == 2e-4
    assert config["model_init_kwargs"] == {"token": "***", "list": [{"Api_Key": "***"}]}
    assert config["halfbyte"]["recipe"] == "sft"
    assert not list(tracked.directory.glob("wandb/*/files/wandb-metadata.json"))


def test_the_series_have_one_axis_and_their_best_values(tracked: TrackedRun) -> None:
    run = wandb_file.read(_file(tracked.directory))
    record = json.loads((tracked.directory / "run.json").read_text())
    assert run["axes"]["*"] == "train/global_step"
    assert run["summaries"]["eval_loss"] == {"min", "last"}
    assert run["summaries"]["eval_mean_token_accuracy"] == {"max", "last"}
    assert "learning_rate" not in run["summaries"]
    assert (run["group"], run["job_type"], run["id"]) == (record["run_id"], "sft", record["wandb_id"])
    assert run["config"]["halfbyte"]["data"] == record["data"]
    assert run["summary"]["peak_memory_bytes"] == record["peak_memory_bytes"]
    assert run["summary"]["peak_memory_by_phase"] == record["peak_memory_by_phase"]
    assert run["alerts"] == []


class Server:
    """``wandb.init`` as a server with one run would answer, and what was logged."""

    def __init__(self, known: str) -> None:
        self.known, self.options, self.logged = known, {}, []
        self.id, self.offline, self.url = known, False, "https://wandb.test/run"
        self.resumed = False

    def init(self, **options: Any) -> "Server":
        self.options = options
        self.resumed = options.get("id") == self.known
        return self

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


ENDED = {"status": "interrupted", "steps": 4, "wandb_id": "earlier", "wandb_url": "https://wandb.test/run"}


@pytest.mark.parametrize(
    ("change", "known", "continued", "replayed"),
    [
        ({}, "earlier", True, False),
        ({}, "another", True, True),  # it was deleted there
        ({"steps": 5}, "earlier", False, True),  # rows after the checkpoint
        ({"status": "running"}, "earlier", False, True),  # killed: more may have been logged than it says
        ({"wandb_url": None}, "earlier", False, True),  # offline
    ],
)
def test_a_run_is_continued_where_nothing_came_after_the_checkpoint(
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    change: dict[str, Any],
    known: str,
    continued: bool,
    replayed: bool,
) -> None:
    environment.setenv("WANDB_API_KEY", "a" * 40)
    server = Server(known)
    environment.setattr(wandb, "init", server.init)
    rows = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    run = WandbRun(RunRecord(tmp_path, "sft"), None, rows, earlier={**ENDED, **change}, step=4)
    assert ("id" in server.options, server.options.get("resume") == "allow") == (continued, continued)
    assert [row["step"] for row in server.logged] == ([1, 2, 3, 4] if replayed else [])
    assert run.place == {"wandb_id": known, "wandb_url": "https://wandb.test/run"}
    assert server.options["config"]["halfbyte"]["continues_wandb_run"] == "earlier"


def test_a_sweep_s_metric_keeps_its_last_value(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("WANDB_MODE", "offline")
    environment.setenv("WANDB_SWEEP_ID", "abc")
    run = WandbRun(RunRecord(tmp_path / "out", "sft"), None)
    run.log({"step": 1, "eval_loss": 2.0})
    run.finish(RunRecord(tmp_path / "out", "sft"), "completed")
    assert wandb_file.read(_file(tmp_path / "out"))["summaries"] == {}


def test_the_flush_interval_and_the_waits_are_bounded() -> None:
    settings = _settings()
    assert 0 < settings.x_transaction_log_flush_interval <= 2
    assert settings.init_timeout <= 10
    assert 0 < settings.finish_timeout <= 60


def test_no_login_is_an_error_that_says_what_to_do(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"(?s)wandb login.*WANDB_MODE=offline"):
        check_wandb(["wandb"])


@pytest.mark.parametrize("report_to", [None, "none", [], ["tensorboard"]])
def test_other_trackers_need_no_login(environment: pytest.MonkeyPatch, report_to: object) -> None:
    check_wandb(report_to)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_API_KEY", "a" * 40)],
)
def test_a_login_or_offline_is_enough(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    check_wandb("wandb")


def test_a_malformed_login_is_an_error(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match="wandb login"):
        check_wandb("wandb")


def test_a_server_that_is_down_leaves_an_offline_run(
    environment: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv("WANDB_API_KEY", "a" * 40)
    environment.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    environment.setattr("halfbyte.tracking.wandb_run._INIT_TIMEOUT", 0.5)
    record = RunRecord(tmp_path / "out", "sft")
    run = WandbRun(record, None)
    run.log({"step": 1, "loss": 2.0})
    line = run.finish(record, "completed")
    assert line is not None
    assert line.startswith("wandb sync ")
    assert [record.message.split("(")[0] for record in caplog.records if record.name.startswith("half")] == [
        "W&B does not answer "
    ]
    assert wandb_file.read(_file(tmp_path / "out"))["history"][0]["loss"] == 2.0


def test_a_sweep_agent_s_values_and_names_are_kept(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(yaml.safe_dump({"wandb_version": 1, "learning_rate": {"value": 3e-4}}))
    environment.setenv("WANDB_MODE", "offline")
    environment.setenv("WANDB_PROJECT", "swept")
    environment.setenv("WANDB_RUN_GROUP", "night")
    environment.setenv("WANDB_SWEEP_ID", "abc")
    environment.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    record = RunRecord(tmp_path / "out", "sft")
    record.update(config={"learning_rate": 3e-4, "lora_r": 8})
    environment.setenv("WANDB_NOTES", "password=CANARY9x7q")
    environment.setenv("WANDB_JOB_TYPE", "token=CANARY9x7q")
    environment.setenv("WANDB_TAGS", "nightly,auth=CANARY9x7q")
    swept = WandbRun(record, "rows of https://CANARY9x7q@host")
    swept.alert("sft failed", "password=CANARY9x7q")
    swept.finish(record, "failed")
    assert b"CANARY" not in _file(tmp_path / "out").read_bytes()
    run = wandb_file.read(_file(tmp_path / "out"))
    assert run["name"] == "rows of https://***@host"
    assert (run["project"], run["group"]) == ("swept", "night")
    assert (run["config"]["learning_rate"], run["config"]["lora_r"]) == (3e-4, 8)


def test_samples_are_a_table(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("WANDB_MODE", "offline")
    record = RunRecord(tmp_path / "out", "dpo")
    run = WandbRun(record, None)
    turns = [{"role": "user", "content": "two"}]
    rows = [
        {"step": 4, "number": n, "prompt": prompt, "completion": "c", "reference": "r", "ended": "stop"}
        for n, prompt in enumerate(("one", turns), 1)
    ]
    run.log_samples(rows)
    run.finish(record, "completed")
    (history,) = wandb_file.read(_file(tmp_path / "out"))["history"]
    assert history["step"] == 4
    assert history["samples._type"] == "table-file"
    (table,) = (tmp_path / "out").glob(f"wandb/offline-run-*/files/{history['samples.path']}")
    content = json.loads(table.read_text())
    assert content["columns"] == list(rows[0])
    assert content["data"] == [[4, 1, "one", "c", "r", "stop"], [4, 2, "user: two", "c", "r", "stop"]]


def test_a_broken_run_is_said_once(
    environment: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv("WANDB_MODE", "offline")
    record = RunRecord(tmp_path / "out", "sft")
    run = WandbRun(record, "name")
    wandb.teardown()  # its service is gone
    run.log({"step": 1, "loss": 1.0})
    run.log({"step": 2, "loss": 1.0})
    assert len([record for record in caplog.records if "W&B failed" in record.message]) == 1
    assert "wandb sync" in str(run.finish(record, "failed"))
