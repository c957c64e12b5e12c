"""Trackers beside W&B: what they hold is what metrics.jsonl holds."""

import json
import socket
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    INTEGRATION_TO_CALLBACK,
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    rewrite_logs,
)

from halfbyte.errors import UserError
from halfbyte.tracking import RunRecord, Tracker, check_trackers
from halfbyte.tracking.reported import Reported
from tests import tiny
from tests.checkpoint.runs import ROWS, options, read_rows, run
from tests.tracking import event_file
from tests.tracking.conftest import CANARY, CONFIG

ModelDir = Callable[..., Path]


def _expected(rows: list[dict[str, Any]]) -> list[tuple[int, str, float]]:
    """The scalars of ``rows`` under upstream's names, in TensorBoard's precision."""
    return [
        (row["step"], name, float(np.float32(value)))
        for row in rows
        for name, value in rewrite_logs(row).items()
        if value is not None and name not in ("train/step", "train/time")
    ]


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_an_interrupted_run_reads_as_one_in_tensorboard(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """No row twice, none left out, the evaluations before and after training among them; and nothing is sent."""
    output, on_log = tmp_path / "run", Tracker.on_log
    rows = tiny.write_rows(tmp_path / "rows", ROWS[recipe](12))
    evaluated = {"eval_strategy": "steps", "eval_steps": "3", "eval_on_start": "true", "save_steps": "2"}
    given = {**evaluated, "max_steps": "4", "hub_token": "hf_CANARYCANARYCANARY", "report_to": "tensorboard"}
    words = options(model_dir("llama"), rows, output, **given)

    def connects(*args: object) -> None:
        raise AssertionError("a connection")

    def breaks(self, args, state, control, **kwargs) -> None:
        on_log(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise RuntimeError("the node is gone")

    monkeypatch.setattr(socket.socket, "connect", connects)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "on_log", breaks)
        assert run(recipe, words) == 1
    (first,) = (output / "runs").iterdir()
    interrupted = event_file.scalars(first)
    assert interrupted == _expected(read_rows(output))
    assert run(recipe, words, "--resume_from_checkpoint", "auto") == 0
    (last,) = (output / "runs").iterdir()
    found = event_file.scalars(last)
    assert found == _expected(read_rows(output))
    assert [step for step, name, _ in found if name == "train/loss"] == [1, 2, 3, 4]
    assert [step for step, name, _ in found if name == "eval/loss"] == [0, 3, 4]
    assert [event_file.scalars(path) for path in output.glob("_earlier/1/runs/*")] == [interrupted]

    texts = event_file.texts(last)
    args, record = json.loads(texts["args"]), json.loads((output / "run.json").read_text())
    assert args["hub_token"] == "***"
    assert {key: args[key] for key in record["config"]} == record["config"]
    assert args["halfbyte.run_id"] == record["run_id"]
    assert args["halfbyte.data"] == record["data"]
    assert json.loads(texts["model_config"])["model_type"] == "llama"
    assert CANARY.encode() not in b"".join(path.read_bytes() for path in output.rglob("events.out.*"))


def _begin(directory: Path, kind: type, rows: list[dict] = (), model: Any = None, **given: Any) -> Reported:
    record = RunRecord(directory, "sft")
    record.update(config=CONFIG, data={"rows": 8})
    args = TrainingArguments(str(directory), report_to="none", use_cpu=True, **given)
    reported = Reported(kind())
    reported.begin(record, args, TrainerState(global_step=len(rows)), TrainerControl(), model, rows)
    return reported


def test_no_secret_is_in_what_a_tracker_holds(tmp_path: Path) -> None:
    _begin(tmp_path, TensorBoardCallback).finish("completed")
    (directory,) = (tmp_path / "runs").iterdir()
    assert json.loads(event_file.texts(directory)["args"])["model_init_kwargs"] == {
        "token": "***",
        "list": [{"Api_Key": "***"}],
    }
    assert CANARY.encode() not in b"".join(path.read_bytes() for path in directory.iterdir())


def test_a_tracker_that_fails_is_reported_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OSError("disk full, token=CANARY")

    monkeypatch.setattr(TensorBoardCallback, "on_log", fails)
    reported = _begin(tmp_path, TensorBoardCallback, [{"step": 1, "loss": 1.0}])
    reported.log({"step": 2, "loss": 1.0})
    reported.finish("completed")
    assert [record.message for record in caplog.records] == [
        "TensorBoard failed, training continues without it: disk full, token=***"
    ]


class Stand(ModuleType):
    """A stand-in for a tracker's package: what transformers' callback calls, by name, with its arguments."""

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, tuple, dict]] = []
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def called(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Stand:
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    stand = Stand("mlflow", utils=SimpleNamespace(validation=limits), __version__="3.17")
    active = SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def active_run() -> SimpleNamespace | None:
        return active if len(stand.called("start_run")) > len(stand.called("end_run")) else None

    stand.active_run = active_run
    monkeypatch.setitem(sys.modules, "mlflow", stand)
    for name in ("MLFLOW_RUN_ID", "DISABLE_MLFLOW_INTEGRATION"):
        monkeypatch.delenv(name, raising=False)
    return stand


ENDS = {"completed": (), "failed": ("FAILED",), "interrupted": ("KILLED",)}


@pytest.mark.parametrize("status", ENDS)
def test_mlflow_has_the_rows_from_the_first_and_how_the_run_ended(
    tmp_path: Path, mlflow: Stand, status: str
) -> None:
    reported = _begin(tmp_path / "out", MLflowCallback, [{"step": 1, "loss": 2.0}])
    reported.log({"step": 2, "time": 1.0, "loss": 1.0, "eval_loss": 3.0})
    reported.finish(status)
    assert [kwargs["run_name"] for _, kwargs in mlflow.called("start_run")] == ["out"]
    logged = [(kwargs["step"], kwargs["metrics"]) for _, kwargs in mlflow.called("log_metrics")]
    assert logged == [(1, {"loss": 2.0}), (2, {"loss": 1.0, "eval_loss": 3.0})]
    (((params,), _),) = mlflow.called("log_params")
    assert params["lora_r"] == 16
    assert CANARY not in str(params)
    assert [args for args, _ in mlflow.called("end_run")] == [ENDS[status]]


def test_a_run_that_mlflow_continues_begins_with_no_row_again(
    tmp_path: Path, mlflow: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    _begin(tmp_path, MLflowCallback, [{"step": 1, "loss": 2.0}])
    assert mlflow.called("log_metrics") == []


def test_trackio_has_the_rows_and_a_name_of_its_own_for_each_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unset = SimpleNamespace(get=lambda: None)
    config: dict[str, Any] = {}
    config_holder = SimpleNamespace(
        update=lambda values, **_: config.update(values), __setitem__=config.__setitem__
    )
    variables = SimpleNamespace(current_space_id=unset, current_project=unset)
    stand = Stand("trackio", config=config_holder, context_vars=variables)
    monkeypatch.setitem(sys.modules, "trackio", stand)
    model = SimpleNamespace(config={"model_type": "llama"})  # without num_parameters
    reported = _begin(tmp_path / "out", TrackioCallback, [{"step": 1, "loss": 2.0}], model, run_name="mine")
    reported.log({"step": 2, "time": 1.0, "epoch": 0.5, "eval_loss": 3.0})
    reported.push()
    reported.finish("completed")
    ((_, given),) = stand.called("init")
    assert given["name"].startswith("mine-2")
    assert [args[0] for args, _ in stand.called("log")] == [
        {"train/loss": 2.0, "train/global_step": 1},
        {"train/epoch": 0.5, "eval/loss": 3.0, "train/global_step": 2},
    ]
    assert len(stand.called("finish")) == 1
    assert config["lora_r"] == 16
    assert CANARY not in str(config)


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK))
def test_a_tracker_that_is_missing_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.tracking.installed.get_available_reporting_integrations", list)
    with pytest.raises(UserError, match=r"not installed here; (`pip|set [A-Z]|not supp)") as caught:
        check_trackers([name])
    assert str(caught.value).startswith(f"report_to: {name}: ")
