"""metrics.jsonl: every row that the Trainer logs, its summary for run.json, and the throughput."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.tracking.record import plain
from halfbyte.tracking.rows import Row, RowsLog


class MetricsLog:
    """Append rows to ``metrics.jsonl``, each flushed as it is logged."""

    def __init__(self, path: Path) -> None:
        self._log = RowsLog(path)

    @property
    def path(self) -> Path:
        return self._log.path

    @property
    def rows(self) -> list[Row]:
        """All rows, those of the run that this one resumes among them."""
        return self._log.rows

    def append(self, logs: Mapping[str, Any], step: int, epoch: float | None) -> Row:
        """Write one row and return it: step, epoch, time (seconds since 1970), then what was logged."""
        row: Row = plain({"step": step, "epoch": epoch, "time": round(time.time(), 3), **logs})
        self._log.append(row)
        return row

    def close(self) -> None:
        self._log.close()

    def summary(self, kept_step: int | None = None) -> dict[str, Row]:
        """Return the last figures under TRL's own keys, each with its step.

        ``train``: the last training row and the Trainer's closing one; ``eval``: the last evaluation after step 0, or
        that of ``kept_step``, whose weights the run ends with; ``before``: the evaluation at step 0 (`eval_on_start`).
        """
        train: Row = {}
        closing: Row = {}
        last: Row = {}
        before: Row = {}
        for row in self.rows:
            figures = {key: value for key, value in row.items() if key != "time"}
            if is_evaluation(row):
                # One evaluation logs one row for each of its data sets.
                if row["step"] == 0:
                    before |= figures
                elif last.get("step") == row["step"]:
                    last |= figures
                elif kept_step is None or last.get("step") != kept_step:
                    last = figures
            elif "train_runtime" in row:
                closing = figures
            elif "loss" in row:
                train, closing = figures, {}
        return {"train": train | closing, "eval": last, "before": before}


def is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(key.startswith("eval_") for key in row)


class Throughput:
    """Training tokens per second, without the time of evaluations and saves.

    Tokens are TRL's `num_tokens`, which counts those of all ranks; that of a resumed run continues.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0.0
        self._mark = time.perf_counter()
        self._counted = (0.0, 0.0)  # seconds and tokens at the last row
        self._before = 0.0

    def begin(self, tokens: float | None) -> None:
        """Start the clock of a session that begins with `tokens` counted."""
        self._before = tokens or 0.0
        self.resume()

    def resume(self) -> None:
        """Start the clock, after an evaluation or a save."""
        self._mark = time.perf_counter()

    def step(self) -> None:
        """Count the time since the last step or `resume`."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def count(self, tokens: float) -> float | None:
        """Take the tokens of the run so far; return the rate since the last call."""
        tokens -= self._before
        seconds, before = self._counted
        self.tokens, self._counted = tokens, (self.seconds, tokens)
        elapsed = self.seconds - seconds
        return (tokens - before) / elapsed if elapsed > 0 else None

    @property
    def rate(self) -> float | None:
        """Tokens per second of the session, up to the last `count`; None when nothing was counted."""
        seconds = self._counted[0]
        return self.tokens / seconds if seconds > 0 and self.tokens > 0 else None
