"""No rank waits forever: the first that fails reports it, all others exit, and a stuck rank is named.

A thread on every rank writes its rank's progress to the process group's store, which the launcher keeps alive when a
rank dies, and reads the others' progress. Keys in that store:

``halfbyte/failed``    the number of a rank that failed; its existence means that the run is over
``halfbyte/reports``   how many ranks wanted to report a failure; the one that counts 1 prints
``halfbyte/beat/R``    rank R's latest :class:`Beat`, as a JSON list of its fields
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.distributed_c10d import _get_default_store
from transformers import Trainer, TrainerCallback

from halfbyte.terminal.wording import on_local_rank_0, say_on_this_rank

_FAILED, _REPORTS, _BEAT = "halfbyte/failed", "halfbyte/reports", "halfbyte/beat"

# Seconds.
_INTERVAL = 1.0  # between two beats
_SILENCE = 5.0  # without a beat, until a rank counts as stuck
_GRACE = 5.0  # for a rank to end by itself once another has failed
_RECORDING = 4.0  # for rank 0 to learn of a failure elsewhere and to record it
_STORE_TIMEOUT = 10.0

# NCCL's flight recorder: the last collectives of every rank, dumped when one of them times out.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def record_flights() -> None:
    """Turn on NCCL's flight recorder, unless the user set it; call it before the process group starts."""
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)


def speaks_first() -> bool:
    """Mark the run as failed, and return whether this rank is the first of the job to do so.

    Only that rank reports: the other failures follow from its own. In a job without a process group it is the one
    with local rank 0.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return on_local_rank_0()
    try:
        store = _store()
        first = store.add(_REPORTS, 1) == 1
        store.set(_FAILED, str(dist.get_rank()))
    except (RuntimeError, ValueError):  # the store ended with the launcher
        return dist.get_rank() == 0
    return first


def leave(code: int) -> None:
    """Exit now with ``code`` if this process is one rank of several, since tear-down would wait for the others.

    The launcher kills all ranks as soon as one exits, so ranks other than 0 wait until rank 0 has recorded the
    failure. Returns in a job of one process.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if dist.get_rank() != 0:
            time.sleep(_RECORDING)
        os._exit(code)


def explain(error: BaseException) -> str | None:
    """Return where every rank is, for a process group's error that does not name its cause; else None."""
    lost = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "connection refused")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    if not isinstance(error, RuntimeError) or not any(word in str(error).lower() for word in lost):
        return None
    try:
        beats = _beats(_store())
    except (RuntimeError, ValueError):
        return None
    return "a rank was lost or stuck; " + describe(beats, dist.get_world_size())


@dataclass(frozen=True)
class Beat:
    """One rank's progress: steps done (a forward is a small fraction), its phase, and its main thread's frame.

    ``since`` is when the phase began and ``written`` when this was written, in seconds since the epoch.
    """

    progress: float
    phase: str
    frame: str
    process: str
    since: float
    written: float


def describe(beats: dict[int, Beat], world_size: int) -> str:
    """Return which ranks are behind and where they are, in one line; every rank's place if none is behind."""
    silent = [rank for rank in range(world_size) if rank not in beats]
    behind = stragglers(beats)
    if silent:
        return f"no progress was ever reported by rank {', '.join(map(str, silent))}"
    shown = behind or sorted(beats)
    lines = [f"rank {r} ({beats[r].process}): {beats[r].phase}, in {beats[r].frame}" for r in shown[:6]]
    return ("behind the others: " if behind else "no rank is behind: ") + "; ".join(lines)


def stragglers(beats: dict[int, Beat]) -> list[int]:
    """Return the ranks with less progress than the furthest, or without a recent beat: their process is stopped."""
    most = max((beat.progress for beat in beats.values()), default=0)
    latest = max((beat.written for beat in beats.values()), default=0)
    return sorted(r for r, beat in beats.items() if beat.progress < most or latest - beat.written > _SILENCE)


class Watch(TrainerCallback):
    """Publish this rank's progress, and end this process when another rank has failed or is stuck."""

    def __init__(self, timeout: float, on_failure: Callable[[], None]) -> None:
        self._timeout = timeout
        self._on_failure = on_failure
        self._progress = 0.0
        self._phase = "starting"
        self._since = time.time()
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._handle: Any = None
        self._state: Any = None

    # Called by the trainer, on the main thread.

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._state = state
        self._handle = model.register_forward_hook(self._forward_done)
        self._over.clear()
        self._publish(_store(), dist.get_rank())
        threading.Thread(target=self._run, name="halfbyte-watch", daemon=True).start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._enter(state.global_step, f"step {state.global_step + 1}, data and forward")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._enter(state.global_step, f"after step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._over.set()
        self._handle.remove()

    def _forward_done(self, model: Any, *_: Any) -> None:
        if model.training:
            # A fraction of a step: every rank runs the same number of micro-batches and reference forwards.
            self._enter(self._progress + 1e-6, f"step {self._state.global_step + 1}, backward")

    def _enter(self, progress: float, phase: str) -> None:
        self._progress, self._phase, self._since = progress, phase, time.time()

    # On the watching thread.

    def _run(self) -> None:
        try:
            store, rank, world_size = _store(), dist.get_rank(), dist.get_world_size()
            while not self._over.wait(_INTERVAL):
                self._publish(store, rank)
                if store.check([_FAILED]):
                    self._exit_after_grace()
                if time.time() - self._since > self._timeout:
                    self._report_stuck(store, rank, world_size)
        except (RuntimeError, ValueError, OSError):
            # The store is unreachable: the launcher, or the node it ran on, has ended.
            self._exit_after_grace()

    def _publish(self, store: Any, rank: int) -> None:
        process = f"{socket.gethostname()}, process {os.getpid()}"
        beat = Beat(self._progress, self._phase, self._frame(), process, self._since, time.time())
        store.set(f"{_BEAT}/{rank}", json.dumps(astuple(beat)))

    def _report_stuck(self, store: Any, rank: int, world_size: int) -> None:
        beats = _beats(store)
        behind = stragglers(beats)
        stuck = [r for r in behind if time.time() - beats[r].since > self._timeout]
        if len(beats) == world_size and not stuck:
            return  # no rank is behind: a long evaluation, or a collective that its own timeout will end
        if store.add(_REPORTS, 1) == 1:
            say_on_this_rank(
                f"error: no progress for {self._timeout:.0f} s (ddp_timeout); {describe(beats, world_size)}"
            )
            store.set(_FAILED, str(rank))
        self._on_failure()
        os._exit(1)

    def _exit_after_grace(self) -> None:
        self._on_failure()
        if not self._over.wait(_GRACE):
            os._exit(1)

    def _frame(self) -> str:
        """The innermost frame of the main thread outside torch: function, file and line."""
        frame = sys._current_frames().get(self._main or 0)
        innermost = frame
        while frame is not None and "site-packages/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "an unknown place"
        return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def watch(trainer: Trainer, timeout: float, on_failure: Callable[[], None]) -> None:
    """Add a :class:`Watch` to ``trainer``, on every rank; nothing for one process.

    ``timeout``, in seconds, is the process group's. ``on_failure`` records that the run failed; it is called on the
    watching thread, as the main thread may be stuck.
    """
    if PartialState().num_processes > 1:
        trainer.add_callback(Watch(timeout, on_failure))


def _store() -> Any:
    """A separate connection to the store: the process group's own is blocked while a collective waits."""
    default: Any = _get_default_store()  # its stub lacks clone()
    store = default.clone()
    store.set_timeout(timedelta(seconds=_STORE_TIMEOUT))
    return store


def _beats(store: Any) -> dict[int, Beat]:
    beats = {}
    for rank in range(dist.get_world_size()):
        if store.check([f"{_BEAT}/{rank}"]):
            beats[rank] = Beat(*json.loads(store.get(f"{_BEAT}/{rank}")))
    return beats
