"""No rank waits forever: the first that fails speaks, all others leave, and one that is stuck is named.

A thread on every rank writes how far its rank has come to the process group's store, which the launcher
keeps alive when a rank dies, and reads what the others wrote.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.distributed_c10d import _get_default_store
from transformers import Trainer, TrainerCallback

_FAILED = "halfbyte/failed"
_SPOKEN = "halfbyte/spoken"
_BEAT = "halfbyte/beat"
_SECONDS = 1.0
_SILENCE = 5.0
# A rank that learns of another's failure has this long to end by itself.
_GRACE = 5.0
# What rank 0 needs to hear of a failure elsewhere and to write it down.
_RECORDING = 4.0

# NCCL's flight recorder: the last collectives of every rank, dumped when one of them times out.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def record_flights() -> None:
    """Turn NCCL's flight recorder on; before the process group starts, and unless the user set it."""
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)


def speaks_first() -> bool:
    """Whether this rank is the first of the job to report a failure; tells the others that the run is over.

    True in a job of one process. The failures that follow from the first one are not worth a second message.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        store = _store()
        first = store.add(_SPOKEN, 1) == 1
        store.set(_FAILED, str(dist.get_rank()))
    except (RuntimeError, ValueError):  # the store went with the launcher
        return dist.get_rank() == 0
    return first


def leave(code: int) -> None:
    """End this process now with ``code``, if it is a rank among others: tear-down would wait for them.

    The launcher kills all ranks as soon as one ends, so the others stay until rank 0 has heard of the failure
    and recorded it.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if dist.get_rank() != 0:
            time.sleep(_RECORDING)
        os._exit(code)


def explain(error: BaseException) -> str | None:
    """Where every rank was, for an error of the process group that does not say who caused it."""
    lost = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "connection refused")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    if not isinstance(error, RuntimeError) or not any(word in str(error).lower() for word in lost):
        return None
    try:
        beats = _read(_store())
    except (RuntimeError, ValueError):
        return None
    return "a rank was lost or stuck; " + describe(beats, dist.get_world_size())


@dataclass(frozen=True)
class Beat:
    """One rank's latest word: how many pieces of work it has done, and where its main thread is."""

    mark: float
    doing: str
    where: str
    place: str
    since: float
    said: float


def describe(beats: dict[int, Beat], world_size: int) -> str:
    """Who is behind, in one line, and where; every rank's place if none is."""
    silent = [rank for rank in range(world_size) if rank not in beats]
    behind = stragglers(beats)
    if silent:
        return f"no word from rank {', '.join(map(str, silent))}"
    shown = behind or sorted(beats)
    lines = [f"rank {r} ({beats[r].place}): {beats[r].doing}, in {beats[r].where}" for r in shown[:6]]
    return ("behind the others: " if behind else "no rank is behind: ") + "; ".join(lines)


def stragglers(beats: dict[int, Beat]) -> list[int]:
    """The ranks that have done less than the furthest, or have fallen silent: their process stands still."""
    most = max((beat.mark for beat in beats.values()), default=0)
    latest = max((beat.said for beat in beats.values()), default=0)
    return sorted(r for r, beat in beats.items() if beat.mark < most or latest - beat.said > _SILENCE)


class Watch(TrainerCallback):
    """Counts this rank's pieces of work, and ends this process when another rank failed or is stuck."""

    def __init__(self, timeout: float, on_failure: Callable[[], None]) -> None:
        self._timeout = timeout
        self._on_failure = on_failure
        self._mark = 0.0
        self._doing = "starting"
        self._since = time.time()
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._handle: Any = None
        self._state: Any = None

    # What the trainer calls.

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._state = state
        self._handle = model.register_forward_hook(self._forward_done)
        self._over.clear()
        self._write(_store(), dist.get_rank())
        threading.Thread(target=self._run, name="halfbyte-watch", daemon=True).start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step(state.global_step, f"step {state.global_step + 1}, data and forward")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step(state.global_step, f"after step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._over.set()
        self._handle.remove()

    def _forward_done(self, model: Any, *_: Any) -> None:
        if model.training:
            # A fraction of a step: micro-batches and reference passes are the same number on every rank.
            self._step(self._mark + 1e-6, f"step {self._state.global_step + 1}, backward")

    def _step(self, mark: float, doing: str) -> None:
        self._mark, self._doing, self._since = mark, doing, time.time()

    # What the thread does.

    def _run(self) -> None:
        try:
            store, rank, world_size = _store(), dist.get_rank(), dist.get_world_size()
            while not self._over.wait(_SECONDS):
                self._write(store, rank)
                if store.check([_FAILED]):
                    self._leave_after_grace()
                if time.time() - self._since > self._timeout:
                    self._report_stuck(store, rank, world_size)
        except (RuntimeError, ValueError, OSError):
            # The store is gone: so is the launcher, or the node it ran on.
            self._leave_after_grace()

    def _write(self, store: Any, rank: int) -> None:
        place = f"{socket.gethostname()}, process {os.getpid()}"
        store.set(
            f"{_BEAT}/{rank}",
            json.dumps([self._mark, self._doing, self._frame(), place, self._since, time.time()]),
        )

    def _report_stuck(self, store: Any, rank: int, world_size: int) -> None:
        beats = _read(store)
        behind = stragglers(beats)
        stuck = [r for r in behind if time.time() - beats[r].since > self._timeout]
        if len(beats) == world_size and not stuck:
            return  # all ranks are at the same place: a long evaluation, or the collective's own timeout ends it
        if store.add(_SPOKEN, 1) == 1:
            print(
                f"error: no progress for {self._timeout:.0f} s (ddp_timeout); {describe(beats, world_size)}",
                file=sys.stderr,
                flush=True,
            )
            store.set(_FAILED, str(rank))
        self._on_failure()
        os._exit(1)

    def _leave_after_grace(self) -> None:
        self._on_failure()
        if not self._over.wait(_GRACE):
            os._exit(1)

    def _frame(self) -> str:
        """The innermost frame of the main thread that is neither torch's nor Python's own."""
        frame = sys._current_frames().get(self._main or 0)
        innermost = frame
        while frame is not None and "site-packages/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "an unknown place"
        return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def watch(trainer: Trainer, timeout: float, on_failure: Callable[[], None]) -> None:
    """Watch over ``trainer`` on every rank; ``timeout`` in seconds is the process group's.

    ``on_failure`` records that the run failed, on a rank whose main thread may be stuck. Nothing for one process.
    """
    if PartialState().num_processes > 1:
        trainer.add_callback(Watch(timeout, on_failure))


def _store() -> Any:
    """A connection of its own: the process group's waits inside collectives would hold ours up."""
    default: Any = _get_default_store()  # its stub lacks clone()
    store = default.clone()
    store.set_timeout(timedelta(seconds=10))
    return store


def _read(store: Any) -> dict[int, Beat]:
    beats = {}
    for rank in range(dist.get_world_size()):
        if store.check([f"{_BEAT}/{rank}"]):
            beats[rank] = Beat(*json.loads(store.get(f"{_BEAT}/{rank}")))
    return beats
