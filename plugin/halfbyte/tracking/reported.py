"""A tracker beside W&B: transformers' own callback for it, given the rows of metrics.jsonl and no secret."""

import copy
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback

from halfbyte.terminal.redaction import redact
from halfbyte.tracking.configuration import about
from halfbyte.tracking.record import RunRecord
from halfbyte.tracking.rows import Row

logger = logging.getLogger(__name__)

UPSTREAM: tuple[type[TrainerCallback], ...] = (TensorBoardCallback, TrackioCallback, MLflowCallback)
"""The callbacks that are driven from here; those of other trackers stay with the Trainer."""

_NO_FIGURES = ("step", "time")
_ENDS = {"failed": "FAILED", "interrupted": "KILLED"}  # MLflow's words


def without_telemetry() -> None:
    """Have MLflow send no usage data, unless the environment says otherwise; it reads that when it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


class Reported:
    """One of the :data:`UPSTREAM` callbacks, on rank 0; a failure is reported once and never stops training.

    Upstream sends it the Trainer's arguments with nested secrets, ends it before the last evaluation, never ends it
    where a run fails, and does not know what a resumed run has logged. Here it gets the configuration of ``run.json``
    in the arguments' place, ends with the run, and begins with the rows up to the checkpoint.
    """

    def __init__(self, callback: TrainerCallback) -> None:
        self._callback = callback
        self._name = type(callback).__name__.removesuffix("Callback")
        self._broken = False
        self._owned = True  # the tracker's run: MLflow's may be a caller's
        self._args: Any = None
        self._state, self._control, self._model = TrainerState(), TrainerControl(), None

    def begin(
        self,
        record: RunRecord,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        rows: Iterable[Row],
    ) -> None:
        """Start a run of the tracker, with the ``rows`` of the run that this one resumes."""
        name = str(redact(args.run_name or record.output_dir.resolve().name))
        if isinstance(self._callback, TrackioCallback):
            # It continues a run of the same name, with what came after the checkpoint.
            name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._state, self._control, self._model = state, control, model
        self._args = _Arguments(args, name, record)
        if isinstance(self._callback, MLflowCallback):
            self._owned = import_module("mlflow").active_run() is None
            if "MLFLOW_RUN_ID" in os.environ:  # which continues that run
                rows = ()
        self._call("on_train_begin")
        for row in rows:
            self.log(row)

    def log(self, row: Row) -> None:
        """Log one row of ``metrics.jsonl`` at its step."""
        state = copy.copy(self._state)
        state.global_step = row["step"]
        logs = {key: value for key, value in row.items() if value is not None and key not in _NO_FIGURES}
        self._call("on_log", state=state, logs=logs)

    def push(self) -> None:
        """Pass on that the run is pushed to the hub."""
        self._call("on_push_begin")

    def finish(self, status: str) -> None:
        """End the tracker's run; ``status`` is completed, failed or interrupted."""
        if isinstance(self._callback, MLflowCallback) and status in _ENDS and self._owned:
            self._try(lambda: import_module("mlflow").end_run(_ENDS[status]))
        self._call("on_train_end")

    def _call(self, event: str, state: TrainerState | None = None, **kwargs: Any) -> None:
        act = getattr(self._callback, event)
        self._try(lambda: act(self._args, state or self._state, self._control, model=self._model, **kwargs))

    def _try(self, act: Callable[[], Any]) -> None:
        if self._broken or self._args is None:
            return
        try:
            act()
        except Exception as error:
            self._broken = True
            logger.warning("%s failed, training continues without it: %s", self._name, redact(str(error)))


class _Arguments:
    """A Trainer's arguments as a tracker may see them: as a whole, the configuration of the run without secrets."""

    def __init__(self, args: Any, run_name: str, record: RunRecord) -> None:
        self._args, self.run_name = args, run_name
        # Flat, as trackers that take only scalars show it.
        self._values = {
            **record.as_dict()["config"],
            **{f"halfbyte.{key}": value for key, value in about(record).items()},
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._values)

    def to_json_string(self) -> str:
        return json.dumps(self._values, indent=2)
