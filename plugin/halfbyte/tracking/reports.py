"""The trackers that a run reports to: W&B, and transformers' own callbacks of the others."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from halfbyte.tracking.figures import Figures
from halfbyte.tracking.record import RunRecord
from halfbyte.tracking.reported import Reported
from halfbyte.tracking.rows import Row
from halfbyte.tracking.wandb_run import WandbRun


class Reports:
    """What every tracker of ``report_to`` gets from rank 0: the same rows, and how the run ends."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._wandb: WandbRun | None = None
        self._others: list[Reported] = []
        self._begun = False

    def report_through(self, callbacks: Iterable[TrainerCallback]) -> None:
        """Drive ``callbacks`` of transformers from here."""
        self._others += map(Reported, callbacks)

    def begin(
        self,
        record: RunRecord,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        rows: list[Row],
        samples: list[Row],
        earlier: Mapping[str, Any],
    ) -> None:
        """Start a run with each tracker, once; a resumed one with the ``rows`` and ``samples`` up to its checkpoint.

        ``earlier`` is run.json as the run before this one left it.
        """
        if self._begun:
            return
        self._begun = True
        if "wandb" in args.report_to:
            logs, step = (rows, samples), state.global_step
            self._wandb = WandbRun(
                record, args.run_name, *logs, figures=self._figures, earlier=earlier, step=step
            )
        for other in self._others:
            other.begin(record, args, state, control, model, rows)

    @property
    def place(self) -> dict[str, str]:
        """What run.json says of the W&B run."""
        return {} if self._wandb is None else self._wandb.place

    @property
    def url(self) -> str | None:
        """Where the W&B run can be watched."""
        return None if self._wandb is None else self._wandb.url

    def log(self, row: Row) -> None:
        """Log one row of ``metrics.jsonl``."""
        if self._wandb is not None:
            self._wandb.log(row)
        for other in self._others:
            other.log(row)

    def log_samples(self, rows: Sequence[Row]) -> None:
        """Log one round of completions."""
        if self._wandb is not None:
            self._wandb.log_samples(rows)

    def log_checkpoint(self, directory: Path) -> None:
        """Log a checkpoint, where that is asked for."""
        if self._wandb is not None:
            self._wandb.log_checkpoint(directory)

    def alert(self, title: str, text: str) -> None:
        """Notify whoever wants to be, where the tracker can."""
        if self._wandb is not None:
            self._wandb.alert(title, text)

    def push(self) -> None:
        """Pass on that the run is pushed to the hub."""
        for other in self._others:
            other.push()

    def finish(self, record: RunRecord, status: str) -> str | None:
        """End the run with each tracker; return where W&B's is."""
        for other in self._others:
            other.finish(status)
        return None if self._wandb is None else self._wandb.finish(record, status)
