"""The W&B run: what metrics.jsonl and run.json hold, and nothing else about this machine."""

import logging
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import wandb
from wandb.errors import AuthenticationError
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from halfbyte.errors import UserError
from halfbyte.terminal.redaction import redact
from halfbyte.terminal.wording import first_line
from halfbyte.tracking.record import RunRecord
from halfbyte.tracking.rows import Row
from halfbyte.tracking.samples import COLUMNS, text_of

logger = logging.getLogger(__name__)

# Seconds that a server which does not answer may cost: once before the first step, once after the last.
_INIT_TIMEOUT = 10.0
_FINISH_TIMEOUT = 60.0


def check_wandb(report_to: str | Iterable[str] | None) -> None:
    """Raise :class:`UserError` if ``report_to`` names wandb and no run could start; prompts and connects nowhere.

    That is so without a login, unless W&B is offline or disabled.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if not {"wandb", "all"}.intersection(names):
        return
    try:
        ready = wandb_ready()
    except AuthenticationError as error:
        raise UserError(
            f"wandb: {error}. Log in again with `wandb login --relogin`.", option="report_to"
        ) from None
    if not ready:
        raise UserError(
            "wandb: there is no W&B login on this machine. Run `wandb login`, or set\n"
            "WANDB_MODE=offline to record the run here and upload it later with `wandb sync`,\n"
            "or write `report_to: none`.",
            option="report_to",
        )


def wandb_ready() -> bool:
    """Return whether a W&B run could start without a prompt: a login, or offline or disabled by the environment.

    Raises ``wandb.errors.AuthenticationError`` if the login that was found is malformed.
    """
    # The public wandb.login() prompts on a terminal; these are what it calls before it does.
    settings = wandb_setup.singleton().settings
    if settings.mode in ("offline", "dryrun", "disabled"):
        return True
    login = wbauth.authenticate_session(
        host=settings.base_url, source="halfbyte", prompt=False, update_session=False
    )
    return login is not None


def wandb_missing() -> str | None:
    """Return why no W&B run could start here, or None."""
    try:
        return None if wandb_ready() else "no login found"
    except AuthenticationError as error:
        return f"invalid W&B credentials ({error})"


class WandbRun:
    """One W&B run on rank 0; a failure of W&B is reported once and never stops training.

    The project is WANDB_PROJECT or ``halfbyte``; entity, group, id, mode and directory follow W&B's own
    environment variables, and a sweep agent's. A server that does not answer makes the run an offline one.

    A resumed run is a new run of W&B that begins with ``rows``, those of metrics.jsonl up to the checkpoint: W&B
    can neither cut what came after them nor, offline, continue a run. Its config names the run before it.
    """

    def __init__(
        self,
        record: RunRecord,
        run_name: str | None,
        rows: Iterable[Row] = (),
        continues: str | None = None,
    ) -> None:
        for variable in ("WANDB_LOG_MODEL", "WANDB_WATCH"):
            if os.environ.get(variable, "false").lower() not in ("", "false", "0"):
                logger.warning("%s is not supported and has no effect here.", variable)
        self._broken = False
        self._run: Any = None
        settings = wandb_setup.singleton().settings
        if settings.mode == "disabled":
            return
        swept = settings.sweep_id is not None  # an agent names the project, and each of its runs
        options: dict[str, Any] = {
            "project": None if swept else settings.project or "halfbyte",
            "name": redact(
                run_name or settings.run_name or (None if swept else record.output_dir.resolve().name)
            ),
            "notes": redact(settings.run_notes),
            "group": redact(settings.run_group),
            "job_type": redact(settings.run_job_type),
            "tags": redact(settings.run_tags),
            "config": _config(record, continues),
            "dir": None if os.environ.get("WANDB_DIR") else str(record.output_dir),
            "settings": _settings(),
        }
        try:
            self._run = self._start(options)
            # One history row for each row of metrics.jsonl, on the run's own step: W&B's step may not go
            # back, and a resumed run's does.
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
            self._replay(rows)
        except Exception as error:
            self._give_up(error)

    def _start(self, options: dict[str, Any]) -> Any:
        try:
            return wandb.init(**options)
        except Exception as error:
            reason = redact(first_line(error))
            logger.warning("W&B does not answer (%s): this run is recorded offline.", reason)
            return wandb.init(**options, mode="offline")

    def _replay(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        if rows and self._run.resumed:  # WANDB_RUN_ID and WANDB_RESUME
            logger.warning(
                "W&B continues run %s: what it logged after step %s is in its series twice.",
                self._run.id,
                rows[-1]["step"],
            )
            return
        for row in rows:
            self.log(row)

    def _give_up(self, error: Exception) -> None:
        if not self._broken:
            self._broken = True
            logger.warning("W&B failed, training continues without it: %s", redact(str(error)))

    @property
    def id(self) -> str | None:
        """W&B's id of this run."""
        return None if self._run is None else str(self._run.id)

    @property
    def url(self) -> str | None:
        """Where the run can be watched; None when it is offline."""
        return None if self._run is None or self._run.offline else self._run.url

    def log(self, row: Row) -> None:
        """Log one row of ``metrics.jsonl`` under its own names."""
        if self._run is None or self._broken:
            return
        try:
            self._run.log({key: value for key, value in row.items() if value is not None})
        except Exception as error:
            self._give_up(error)

    def log_samples(self, rows: Sequence[Row]) -> None:
        """Log one round of completions as a table."""
        if self._run is None or self._broken:
            return
        columns = [column for column in COLUMNS if column in rows[0]]
        shown = [{**row, "prompt": text_of(row["prompt"])} for row in rows]
        try:
            table = wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in shown])
            self._run.log({"step": rows[0]["step"], "samples": table})
        except Exception as error:
            self._give_up(error)

    def finish(self, exit_code: int) -> str | None:
        """End the run; return the line that says where it is."""
        if self._run is None:
            return None
        offline, directory = self._run.offline, Path(self._run.settings.sync_dir)
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            if not isinstance(error, TimeoutError):
                self._give_up(error)
            offline = True
        self._run, url = None, self.url
        return f"wandb sync {shlex.quote(os.path.relpath(directory))}" if offline or self._broken else url


def _config(record: RunRecord, continues: str | None) -> dict[str, Any]:
    """The resolved configuration, flat; what the run stands on, under the name ``halfbyte``."""
    values = record.as_dict()
    about = {key: values[key] for key in ("recipe", "run_id", "versions", "base", "data", "strategy")}
    if continues is not None:
        about["continues_wandb_run"] = continues
    return {**values["config"], "halfbyte": about}


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
