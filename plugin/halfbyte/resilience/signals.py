"""Signals: a flag first, one stop that all ranks agree on at a step boundary, and an end for ranks that hang.

SIGTERM, SIGINT and SIGUSR1 only set a flag. At the next boundary (the end of a step, a batch of an
evaluation, the end of a save) the ranks compare flags, save a checkpoint together and raise `Stopped`.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from halfbyte.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BOUNDARY_SECONDS = 10.0  # a rank that reaches no boundary for so long hangs, or is too slow to be saved
GRACE_SECONDS = 30.0  # what torchrun, and Kubernetes by default, give a process before SIGKILL
RESERVE_SECONDS = 5.0  # of these, for what comes after a save
# A launcher passes on a signal that its group, its pod or its job step was sent as a whole.
SAME_SECONDS = 3.0

_KEY = "halfbyte"  # in trainer_state.json, beside the states of callbacks

_watch: "Watch | None" = None


class Watch:
    """The signals of this process, seen by a thread of their own.

    A Python signal handler waits for the main thread, which may be inside a collective that never returns;
    the wake-up file descriptor is written by the C handler at once. ``abandon`` is called, in that thread,
    before the process is ended without having reached a boundary.
    """

    def __init__(self, abandon: Callable[[int], None]) -> None:
        self.received: int | None = None
        self.since = 0.0
        self.boundary = False  # reached after the signal, or inside a save: the main thread is alive
        self._abandon = abandon
        self._parent, self._orphaned = os.getppid(), False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._run, name="halfbyte-signals", daemon=True)
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1

    def start(self) -> None:
        """Take over the signals; on the main thread."""
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _seen) for number in SIGNALS}
        self._thread.start()

    def stop(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def elapsed(self) -> float:
        """Seconds since the first signal."""
        return time.monotonic() - self.since

    def _run(self) -> None:
        while True:
            wait = None
            if self.received is not None:
                wait = max(0.0, BOUNDARY_SECONDS - self.elapsed()) if not self.boundary else 0.5
            if not select.select([self._read], [], [], wait)[0]:
                if not self.boundary and self.elapsed() >= BOUNDARY_SECONDS:
                    self._end(f"no step ended within {BOUNDARY_SECONDS:.0f} s of it")
                continue
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number in SIGNALS:
                    self._arrived(number)

    def _arrived(self, number: int) -> None:
        orphaned = os.getppid() != self._parent and not self._orphaned
        self._orphaned = self._orphaned or orphaned
        if self.received is None:
            self.since = time.monotonic()
            self.received = number
            what = "the launcher is gone" if orphaned else f"{signal.Signals(number).name} received"
            _say(f"{what}: saving at the end of this step; a second signal stops at once")
        elif not orphaned and self.elapsed() > SAME_SECONDS:
            self._end("a second signal")

    def _end(self, why: str) -> None:
        assert self.received is not None
        _say(f"stopped at once by {signal.Signals(self.received).name}: {why}; nothing more is saved")
        with suppress(Exception):
            self._abandon(self.received)
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(128 + self.received)


class _CutOff(BaseException):
    """Ends an evaluation; caught around it."""


class StopTogether(TrainerCallback):
    """Stops every rank at the same boundary, with a checkpoint where there is time to write one."""

    def __init__(self, trainer: Trainer, watch: Watch) -> None:
        self._trainer, self._watch = trainer, watch
        self._stopping: int | None = None
        self._save_seconds = self._used = 0.0
        self._save = trainer._save_checkpoint
        trainer._save_checkpoint = self._timed_save
        self._evaluate = trainer.evaluate
        trainer.evaluate = self._evaluate_or_stop

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make up for the evaluation that a stop cut off; the Trainer restores the generators after this."""
        if state.stateful_callbacks.pop(_KEY, {}).get("evaluation_due"):
            metrics = self._trainer._evaluate(None, None)
            self._trainer._determine_best_metric(metrics=metrics, trial=None)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._agree()
        if self._stopping is not None:
            self._refuse_a_late_save(state)
            if control.should_evaluate:
                state.stateful_callbacks[_KEY] = {"evaluation_due": True}
            control.should_evaluate, control.should_save = False, True  # on_save stops
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._agree()
        if self._stopping is not None:
            raise self._stopped(state, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step} is saved")

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._agree()
        if self._stopping is None:
            return
        place = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.global_step == 0 or place.is_dir():
            raise self._stopped(state, "the evaluation is cut off")
        self._refuse_a_late_save(state)
        raise _CutOff

    def _evaluate_or_stop(self, *args: Any, **kwargs: Any) -> Any:
        """`evaluate`, and outside of it, where the generators are training's again, the save that it was cut for."""
        try:
            return self._evaluate(*args, **kwargs)
        except _CutOff:
            trainer = self._trainer
            trainer.state.stateful_callbacks[_KEY] = {"evaluation_due": True}
            trainer._save_checkpoint(trainer.model_wrapped, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)  # raises Stopped
            raise

    def remove(self) -> None:
        """Undo what construction and `add_callback` did."""
        self._trainer.remove_callback(self)
        self._trainer._save_checkpoint = self._save
        self._trainer.evaluate = self._evaluate

    def _agree(self) -> None:
        """Learn whether any rank was sent a signal, and how much of the grace period is used on the slowest."""
        if self._stopping is not None:
            return
        received, used = self._watch.received or 0, 0.0
        if received:
            used = self._watch.elapsed() + self._save_seconds
        if self._trainer.args.world_size > 1:
            flags = torch.tensor(
                [float(received), used, self._save_seconds], device=self._trainer.args.device
            )
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            received, used = int(flags[0]), max(float(flags[1]), float(flags[2]))
        self._watch.boundary = received != 0
        if received:
            self._stopping, self._used = received, used

    def _refuse_a_late_save(self, state: TrainerState) -> None:
        if self._used > GRACE_SECONDS - RESERVE_SECONDS:
            raise self._stopped(
                state,
                f"no checkpoint: the last took {self._save_seconds:.0f} s to save, too long for the "
                f"{GRACE_SECONDS:.0f} s that launchers leave; the one before it stays",
            )

    def _stopped(self, state: TrainerState, what: str) -> Stopped:
        assert self._stopping is not None
        name = signal.Signals(self._stopping).name
        return Stopped(self._stopping, f"stopped by {name} at step {state.global_step}: {what}")

    def _timed_save(self, *args: Any, **kwargs: Any) -> None:
        start = time.monotonic()
        self._watch.boundary = True
        self._save(*args, **kwargs)  # on_save comes next, and is a boundary
        self._save_seconds = time.monotonic() - start


@contextmanager
def stopping(trainer: Trainer, abandon: Callable[[int], None]) -> Iterator[None]:
    """Have signals end the block, in which ``trainer`` trains, by `Stopped`.

    ``abandon(signum)`` is called in another thread before this process is ended without having come to a
    boundary: it has a moment to say so on disk. Off the main thread signals are left as they are.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = Watch(abandon)
    callback = StopTogether(trainer, watch)
    trainer.add_callback(callback)
    _watch = watch
    watch.start()
    try:
        yield
    finally:
        _watch = None
        watch.stop()
        callback.remove()


def _seen(number: int, frame: FrameType | None) -> None:
    """The Python half of a handler; the thread has been told already."""


def _in_a_fork() -> None:
    """Keep loader workers from answering for their parent: they share its pipe, and Ctrl-C reaches them too."""
    if _watch is not None:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_a_fork)


def _say(line: str) -> None:
    rank = os.environ.get("RANK")
    with suppress(OSError, ValueError):
        print(f"rank {rank}: {line}" if rank else line, file=sys.stderr, flush=True)
