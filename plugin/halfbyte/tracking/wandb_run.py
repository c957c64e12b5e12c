"""The W&B run: what metrics.jsonl and run.json hold, and nothing else about this machine."""

import logging
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import wandb
from wandb.sdk import wandb_setup

from halfbyte.terminal.redaction import redact
from halfbyte.terminal.wording import first_line, shorten
from halfbyte.tracking.configuration import about
from halfbyte.tracking.figures import DEFAULT, Figures
from halfbyte.tracking.record import RunRecord
from halfbyte.tracking.rows import Row
from halfbyte.tracking.samples import COLUMNS, text_of

logger = logging.getLogger(__name__)

# Seconds that a server which does not answer may cost: once before the first step, once after the last.
_INIT_TIMEOUT = 10.0
_FINISH_TIMEOUT = 60.0

_AXIS = "train/global_step"  # upstream's name of the axis, so that runs of both are drawn on one
_MEMORY = ("peak_memory_bytes", "peak_memory_by_phase", "memory")
_BEST = {"less": "min", "greater": "max"}


class WandbRun:
    """One W&B run on rank 0; a failure of W&B is reported once and never stops training.

    The project is WANDB_PROJECT or ``halfbyte``; group and job type are the id of the halfbyte run, which all its
    resumes share, and the recipe. W&B's own environment variables, and a sweep agent's, come first. A server that does
    not answer makes the run an offline one.

    ``earlier`` is run.json as the run before this one left it. A resume at ``step`` continues its W&B run where that is
    on a server and has nothing after the step. Otherwise it is a new run of W&B that begins with ``rows`` and
    ``samples``, those up to the checkpoint: W&B can neither cut what came after them nor, offline, continue a run. Its
    config names the run before it. The summary has the best value of each of the ``figures`` that are compared.
    """

    def __init__(
        self,
        record: RunRecord,
        run_name: str | None,
        rows: Iterable[Row] = (),
        samples: Iterable[Row] = (),
        *,
        figures: Figures = DEFAULT,
        earlier: Mapping[str, Any] = MappingProxyType({}),
        step: int = 0,
    ) -> None:
        # Of the others the best is chance, or there is none.
        self._best = {
            figure.key: _BEST[figure.direction]
            for figure in figures.compared
            if figure.direction != "neither"
        }
        self._artifacts = _artifacts()
        if os.environ.get("WANDB_WATCH", "false").lower() not in ("", "false", "0"):
            logger.warning("WANDB_WATCH is not supported and has no effect here.")
        self._broken = False
        self._defined: set[str] = set()
        self._run: Any = None
        before = record.get("wandb_id") or earlier.get("wandb_id")  # of the checkpoint, or of the directory
        settings = wandb_setup.singleton().settings
        if settings.mode == "disabled":
            return
        swept = settings.sweep_id is not None  # an agent names the project, and each of its runs
        self._summarizes = not swept  # a sweep reads the last value of its metric, by name
        options: dict[str, Any] = {
            "project": None if swept else settings.project or "halfbyte",
            "name": redact(
                run_name or settings.run_name or (None if swept else record.output_dir.resolve().name)
            ),
            "notes": redact(settings.run_notes),
            "group": redact(settings.run_group) or (None if swept else record["run_id"]),
            "job_type": redact(settings.run_job_type) or record["recipe"],
            "tags": redact(settings.run_tags),
            "config": _config(record, before),
            "dir": None if os.environ.get("WANDB_DIR") else str(record.output_dir),
            "settings": _settings(),
        }
        continued: dict[str, Any] = {}
        if _goes_on(earlier, step) and settings.run_id is None and settings.mode != "offline":
            continued = {"id": earlier["wandb_id"], "resume": "allow", "allow_val_change": True}
        try:
            self._run = self._start(options, continued)
            # One history row for each row of metrics.jsonl, on the run's own step: W&B's step may not go
            # back, and a resumed run's does.
            self._run.define_metric(_AXIS, hidden=True)
            self._run.define_metric("*", step_metric=_AXIS)
            self._replay(list(rows), list(samples), continues=bool(continued))
        except Exception as error:
            self._give_up(error)

    def _start(self, options: dict[str, Any], continued: dict[str, Any]) -> Any:
        try:
            return wandb.init(**options, **continued)
        except Exception as error:
            reason = redact(first_line(error))
            logger.warning("W&B does not answer (%s): this run is recorded offline.", reason)
            return wandb.init(**options, mode="offline")

    def _replay(self, rows: list[Row], samples: list[Row], *, continues: bool) -> None:
        if rows and self._run.resumed:
            if not continues:  # WANDB_RUN_ID and WANDB_RESUME
                logger.warning(
                    "W&B continues run %s: what it logged after step %s is in its series twice.",
                    self._run.id,
                    rows[-1]["step"],
                )
            return
        rounds = [list(group) for _, group in groupby(samples, key=lambda row: row["step"])]
        for row in rows:
            while rounds and rounds[0][0]["step"] <= row["step"]:  # a round comes before the row of its step
                self.log_samples(rounds.pop(0))
            self.log(row)
        for each in rounds:
            self.log_samples(each)

    def _give_up(self, error: Exception) -> None:
        if not self._broken:
            self._broken = True
            logger.warning("W&B failed, training continues without it: %s", redact(str(error)))

    @property
    def id(self) -> str | None:
        """W&B's id of this run."""
        return None if self._run is None else str(self._run.id)

    @property
    def place(self) -> dict[str, str]:
        """What run.json says of the run."""
        found = {"wandb_id": self.id, "wandb_url": self.url}
        return {key: value for key, value in found.items() if value is not None}

    @property
    def url(self) -> str | None:
        """Where the run can be watched; None when it is offline."""
        return None if self._run is None or self._run.offline else self._run.url

    def log(self, row: Row) -> None:
        """Log one row of ``metrics.jsonl`` under its own names."""
        values = {key: value for key, value in row.items() if value is not None}
        self._try(lambda run: self._log(run, values))

    def _log(self, run: Any, values: dict[str, Any]) -> None:
        for key in values.keys() - self._defined if self._summarizes else ():
            self._defined.add(key)
            if (best := self._best.get(key.removeprefix("eval_"))) is not None:
                run.define_metric(key, step_metric=_AXIS, summary=f"{best},last")
        run.log({**values, _AXIS: values["step"]})

    def log_samples(self, rows: Sequence[Row]) -> None:
        """Log one round of completions as a table."""
        columns = [column for column in COLUMNS if column in rows[0]]
        shown = [{**row, "prompt": text_of(row["prompt"])} for row in rows]

        def log(run: Any) -> None:
            table = wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in shown])
            run.log({_AXIS: rows[0]["step"], "step": rows[0]["step"], "samples": table})

        self._try(log)

    def alert(self, title: str, text: str) -> None:
        """Have W&B notify whoever wants to be, as they set it up there."""
        self._try(lambda run: run.alert(title=title, text=str(redact(text)), level="WARN"))

    def log_checkpoint(self, directory: Path) -> None:
        """Log a checkpoint as an artifact, where WANDB_LOG_MODEL is ``checkpoint``."""
        if self._artifacts == "checkpoint":
            self._try(lambda run: self._log_artifact(run, [directory], directory.name))

    def finish(self, record: RunRecord, status: str) -> str | None:
        """End the run: its memory, and its weights where WANDB_LOG_MODEL asks for them; return where it is."""
        if self._run is None:
            return None
        values = record.as_dict()
        memory = {key: values[key] for key in _MEMORY if values.get(key)}
        self._try(lambda run: run.summary.update(memory))
        files = [record.output_dir / name for name in values.get("files", ())]
        if self._artifacts and files and status == "completed":
            self._try(lambda run: self._log_artifact(run, files, "final"))
        offline, directory = self._run.offline, Path(self._run.settings.sync_dir)
        try:
            self._run.finish(exit_code=0 if status == "completed" else 1)
        except Exception as error:
            if not isinstance(error, TimeoutError):
                self._give_up(error)
            offline = True
        self._run, url = None, self.url
        return f"wandb sync {shlex.quote(os.path.relpath(directory))}" if offline or self._broken else url

    def _log_artifact(self, run: Any, paths: Sequence[Path], alias: str) -> None:
        artifact = wandb.Artifact(f"model-{run.id}", type="model")
        for path in paths:
            if path.is_dir():
                artifact.add_dir(str(path))
            else:
                artifact.add_file(str(path))
        run.log_artifact(artifact, aliases=[alias])

    def _try(self, act: Callable[[Any], Any]) -> None:
        if self._run is None or self._broken:
            return
        try:
            act(self._run)
        except Exception as error:
            self._give_up(error)


def _artifacts() -> str | None:
    """What WANDB_LOG_MODEL asks for, as for the Trainer: ``end``, ``checkpoint``, or None."""
    asked = os.environ.get("WANDB_LOG_MODEL", "").lower()
    if asked in ("", "false", "0"):
        return None
    if asked in ("end", "checkpoint"):
        return asked
    logger.warning("WANDB_LOG_MODEL: %s has no meaning; write end or checkpoint.", shorten(asked))
    return None


def _goes_on(earlier: Mapping[str, Any], step: int) -> bool:
    """Whether the W&B run of the run.json ``earlier`` is on a server and has nothing after ``step``."""
    ended = earlier.get("status") in ("interrupted", "failed") and earlier.get("steps") == step
    return ended and all(isinstance(earlier.get(key), str) for key in ("wandb_id", "wandb_url"))


def _config(record: RunRecord, continues: str | None) -> dict[str, Any]:
    """The resolved configuration, flat; what the run stands on, under the name ``halfbyte``."""
    found = about(record)
    if continues is not None:
        found["continues_wandb_run"] = continues
    return {**record.as_dict()["config"], "halfbyte": found}


def _settings() -> wandb.Settings:
    """No prompt, no chatter, bounded waits; no command line, code or console in the run, for those hold
    secrets."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        init_timeout=_INIT_TIMEOUT,
        finish_timeout=_FINISH_TIMEOUT,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=1.0,
    )
