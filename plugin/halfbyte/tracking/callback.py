"""The one callback through which a Trainer fills its run directory."""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from halfbyte.checkpoint.history import checkpoints
from halfbyte.errors import Stopped
from halfbyte.files import replace_file
from halfbyte.memory import Peak
from halfbyte.terminal.wording import first_line, say
from halfbyte.tracking import summary
from halfbyte.tracking.card import model_card
from halfbyte.tracking.figures import DEFAULT, Figures
from halfbyte.tracking.held_memory import HeldMemory, beside_predicted
from halfbyte.tracking.metrics import MetricsLog, Throughput
from halfbyte.tracking.progress import RunProgress
from halfbyte.tracking.record import RunRecord, read_record
from halfbyte.tracking.reports import Reports
from halfbyte.tracking.rows import Row, read_rows
from halfbyte.tracking.samples import SamplesLog
from halfbyte.tracking.samples import lines as sample_lines

logger = logging.getLogger(__name__)

# Plots cost more than the rest of a small save together: at saves in quick succession they wait for a later one,
# at the first too.
_REDRAW_SECONDS = 60.0


class Tracker(TrainerCallback):
    """Rows to metrics.jsonl, trackers and the terminal as they come; run.json, plots and card at each save.

    A context manager: leaving it closes the run as completed, failed or interrupted. Works on rank 0 alone (``main``),
    except that every rank reports at the end of training how much memory it held.
    """

    def __init__(
        self,
        record: RunRecord,
        *,
        main: bool = True,
        bar: bool = True,
        figures: Figures = DEFAULT,
        next_command: str | None = None,
        resume_command: str | None = None,
        again_command: str | None = None,
        peak: Peak | None = None,
    ) -> None:
        self.record = record
        self.record.update(figures=figures.as_dict())
        self.metrics = MetricsLog(record.output_dir / "metrics.jsonl")
        self._samples = SamplesLog(record.output_dir / "samples.jsonl")
        self._main = main
        self._next_command, self._resume_command = next_command, resume_command
        self._again_command = again_command  # where there is nothing to resume from
        self._throughput, self._held = Throughput(), HeldMemory(Peak() if peak is None else peak)
        self._figures = figures
        self._progress = RunProgress(bar=bar, figures=figures)
        self._reports = Reports(figures)
        self._warned: set[str] = set()
        self._drawn: dict[str, Any] = {}
        self._finished = False
        self._drawn_at = time.monotonic()
        self._kept_step: int | None = None  # whose weights the run ends with, where it is not the last

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish("completed", self._next_command)
        else:
            interrupted = isinstance(error, KeyboardInterrupt | Stopped)
            status = "interrupted" if interrupted else "failed"
            by_hand = isinstance(error, KeyboardInterrupt) or getattr(error, "signal", None) == "SIGINT"
            if not by_hand:
                self._reports.alert(f"{self.record['recipe']} {status}", first_line(error))
            self.finish(status, self._goes_on)

    # Events of the Trainer, in the order they come.

    def on_train_begin(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        counted_tokens: float | None = None,
        **kwargs: Any,
    ) -> None:
        self._held.loaded(kwargs.get("model"))
        if not self._main:
            return
        self.record.update(status="running", steps=state.global_step, total_steps=state.max_steps)
        self.record.update(next=self._goes_on)  # for a run that is killed
        earlier = read_record(self.record.path)
        self.record.write()
        logs = (read_rows(self.metrics.path), self._samples.rows)
        self._reports.begin(self.record, args, state, control, kwargs.get("model"), *logs, earlier)
        if self._reports.place:
            self.record.update(**self._reports.place)
            self.record.write()
        if self._reports.url:
            say(f"wandb: {self._reports.url}")
        self._progress.begin(state.global_step, state.max_steps)
        self._throughput.begin(self._tokens(counted_tokens, state.epoch))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._main:
            self.record.update(steps=state.global_step)
            self._held.over("train")
            self._throughput.step()
            self._progress.step(state.global_step)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._main or logs is None:
            return
        row = self.metrics.append(logs, state.global_step, state.epoch)
        self.record.update(tokens_per_second=self._throughput.rate)
        self._progress.row(row, row.get("tokens_per_second"))
        self._reports.log(row)

    def on_prediction_step(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._main:
            self._progress.evaluating(len(eval_dataloader) if has_length(eval_dataloader) else None)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._main:
            self._progress.evaluated()
            self._held.over("evaluate")
            self._throughput.resume()

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._main:
            self._held.over("save")
            self.record.update(next=self._goes_on)
            self._write_record()
            self._reports.log_checkpoint(self.record.output_dir / f"checkpoint-{state.global_step}")
            if time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
                self._draw()
            self._throughput.resume()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A collective: every rank comes here.
        peaks, measured = zip(*gather_object([(self._held.peak(), self._held.of_training())]), strict=True)
        if self._main:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._kept_step = state.best_global_step
                self.record.update(best_checkpoint=Path(state.best_model_checkpoint).name)
            self.record.update(peak_memory_bytes=list(peaks))
            if found := beside_predicted(self.record, measured):
                self.record.update(memory=found)
            self._progress.end()

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._main:
            self._reports.push()

    # What the run calls.

    def report_through(self, callbacks: Iterable[TrainerCallback]) -> None:
        """Give transformers' own ``callbacks`` for trackers the rows of this run, on rank 0."""
        if self._main:
            self._reports.report_through(callbacks)

    def rate(self, counted_tokens: float | None, epoch: float | None) -> float | None:
        """Tokens per second of all ranks since the last call, without evaluations and saves; on rank 0."""
        tokens = self._tokens(counted_tokens, epoch) if self._main else None
        return None if tokens is None else self._throughput.count(tokens)

    def sampled_steps(self) -> set[int]:
        """The steps at which completions are in samples.jsonl."""
        return {row["step"] for row in self._samples.rows if "step" in row}

    def sampled(self, rows: list[Row]) -> None:
        """Write, print and report one round of completions, on rank 0; the time of the round is not training's."""
        self._held.over("sample")
        self._samples.append(rows)
        self._progress.lines(sample_lines(rows, self.record["total_steps"]))
        self._reports.log_samples(rows)
        self._throughput.resume()

    def finish(self, status: str, next_command: str | None = None) -> None:
        """Close the run: run.json, plots, model card, trackers, and the summary with the next command.

        Safe on every rank and after a failure; only rank 0 does anything, and only once. ``status`` is completed,
        failed or interrupted; ``next_command`` is the exact command to run next.
        """
        if not self._main or self._finished:
            return
        self._finished = True
        self._progress.end()
        if not self.record["peak_memory_bytes"]:  # stopped before the ranks could say
            self.record.update(peak_memory_bytes=[self._held.peak()])
        self.record.update(status=status, next=next_command, peak_memory_by_phase=dict(self._held.phases))
        there = self.record.output_dir.is_dir()  # if it was taken away, that is not undone
        if status == "completed":
            self._write_record()
        elif there:
            self._try("run.json", self._write_record)
        there = there and self.record.path.is_file()  # a disk too full for it takes nothing else
        plots = self._draw() if there else []
        if there:
            self.write_card()
        self._try("metrics.jsonl", self.metrics.close)
        self._try("samples.jsonl", self._samples.close)
        where = self._reports.finish(self.record, status)
        values, place = self.record.as_dict(), self.record.output_dir
        summary.show(values, place, self._figures, plots, where)

    def fail(self) -> None:
        """Close the run as failed: for a thread that ends a process whose main thread is stuck."""
        self.finish("failed", self._goes_on)

    def abandon(self, signum: int) -> None:
        """Write to disk that a signal ended the run, and no more: for a thread that ends the process at once."""
        if self._main and not self._finished:
            self._finished = True
            self.record.update(status="interrupted", next=self._goes_on)
            self.record.write()

    @property
    def _goes_on(self) -> str | None:
        """The command after a run that did not complete: a resume, where a checkpoint was saved."""
        return self._resume_command if checkpoints(self.record.output_dir) else self._again_command

    def write_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write README.md; takes the place of `Trainer.create_model_card`, whose arguments it accepts."""
        if self._main:
            self._try("the model card", lambda: self._write_card(model_name))

    def card(self, model_name: str | None = None, *, where: str | None = None) -> str:
        """The model card; ``where`` is the repository that it is pushed to, beside the weights."""
        self._update_record()
        return model_card(self.record, model_name, figures=self._figures, where=where)

    def _write_card(self, model_name: str | None) -> None:
        replace_file(self.record.output_dir / "README.md", self.card(model_name).encode())

    def _write_record(self) -> None:
        self._update_record()
        self.record.write()

    def _update_record(self) -> None:
        saved = [path.name for path in reversed(checkpoints(self.record.output_dir))]
        self.record.update(metrics=self.metrics.summary(self._kept_step), checkpoints=saved)

    def _draw(self) -> list[Path]:
        self._drawn_at = time.monotonic()

        def draw() -> list[Path]:
            # matplotlib takes a second and, for its first run, a cache on disk.
            from halfbyte.tracking import plots

            directory = self.record.output_dir / "plots"
            title = f"{self.record['recipe']}, {self.record.output_dir.resolve().name}"
            return plots.draw(self.metrics.rows, directory, title, self._drawn, figures=self._figures)

        return self._try("the plots", draw) or []

    def _try(self, what: str, write: Callable[[], Any]) -> Any:
        """Plot and model-card failures never stop training, nor hide how it failed: each is reported once."""
        try:
            return write()
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                logger.warning("Could not write %s: %s: %s", what, type(error).__name__, error)
            return None

    def _tokens(self, counted: float | None, epoch: float | None) -> float | None:
        """The tokens of the run so far; for a trainer that does not count them, the data's size by epoch."""
        size = self.record["data"].get("tokens")
        return counted if counted is not None else size * epoch if size and epoch else None
