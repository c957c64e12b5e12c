"""Agreement between ranks: rank 0 decides for all, all report to all, all fail together.

Keys in the process group's store, for the n-th block of :func:`on_every_rank`: ``halfbyte/n/finished`` counts the
ranks that succeeded, ``halfbyte/n/failed`` is the first line of a failure. For one of :func:`on_the_first`:
``halfbyte/n/result`` is what rank 0 returned, 1 or 0, and ``halfbyte/n/hurry`` exists once a rank wants it to end. For
one of :func:`in_step`: ``halfbyte/n/hurry`` likewise, ``halfbyte/n/failed`` counts the ranks that failed, and
``halfbyte/n/alone`` is what one of them alone had.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import distributed_c10d

from halfbyte.errors import FailedElsewhereError, Halted
from halfbyte.terminal.wording import first_line

T = TypeVar("T")
_POLL_SECONDS = 0.05
_ALIKE_SECONDS = 30.0  # between the first and the last rank's failure of one cause
_blocks = itertools.count()  # every rank runs the same blocks in the same order


def agree(value: T) -> T:
    """Return rank 0's ``value`` on every rank."""
    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Return every rank's ``value``, in rank order, on every rank."""
    return list(gather_object([value]))


@contextmanager
def on_every_rank(what: str) -> Iterator[None]:
    """Run a block that must succeed on all ranks, or fail on all of them.

    A rank whose own block succeeded raises :class:`FailedElsewhereError` when another's did not. The ranks
    communicate through the process group's store and not by a collective: a rank that failed may have left others
    waiting inside the block, and a second collective would hang with them.
    """
    if PartialState().num_processes == 1:
        yield
        return
    store = distributed_c10d._get_default_store()
    block = f"halfbyte/{next(_blocks)}"
    failed, finished = f"{block}/failed", f"{block}/finished"
    try:
        yield
    except BaseException as error:  # a signal, or a panic of a library, ends all ranks as well
        if store.check([failed]):  # most likely this error only reports that the other rank exited
            raise _another(what, store.get(failed)) from error
        store.set(failed, first_line(error))
        raise
    store.add(finished, 1)
    while not store.check([failed]):
        if store.add(finished, 0) == PartialState().num_processes:
            return
        time.sleep(_POLL_SECONDS)
    raise _another(what, store.get(failed))


def on_the_first(work: Callable[[Callable[[], bool]], bool], hurry: Callable[[], bool]) -> bool:
    """Run ``work`` on rank 0 while the others wait, by the store and not by a collective; return its result everywhere.

    ``work`` gets a function that says whether any rank's ``hurry`` has become true, so that it should end.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work(hurry)
    store = distributed_c10d._get_default_store()
    block = f"halfbyte/{next(_blocks)}"
    result, wanted = f"{block}/result", f"{block}/hurry"
    if state.is_main_process:
        done = False
        try:
            done = work(lambda: hurry() or store.check([wanted]))
        finally:
            store.set(result, "1" if done else "0")
        return done
    while not store.check([result]):
        if hurry():
            store.set(wanted, "")
        time.sleep(_POLL_SECONDS)
    return bool(store.get(result) == b"1")


def in_step(work: Callable[[Callable[[], bool]], bool], hurry: Callable[[], bool]) -> bool:
    """Run ``work``, which has collectives, on every rank; return rank 0's result everywhere.

    ``work`` gets a function that says whether any rank's ``hurry`` has become true; ranks may see that at different
    moments. An error that every rank has is raised again. Raises :class:`Halted` for one that others do not have:
    they wait in a collective.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work(hurry)
    store = distributed_c10d._get_default_store()
    block = f"halfbyte/{next(_blocks)}"
    wanted = f"{block}/hurry"

    def hurried() -> bool:
        if hurry():
            store.set(wanted, "")
        return bool(store.check([wanted]))

    try:
        done = work(hurried)
    except Exception as error:
        reason = f"rank {state.process_index} failed alone: {type(error).__name__}: {first_line(error)}"
        if (alone := _failed_alone(store, block, reason, state.num_processes)) is not None:
            raise Halted(alone) from error
        raise
    return agree(done)


def _failed_alone(store: Any, block: str, reason: str, ranks: int) -> str | None:
    """Wait for the failure of all ranks; return the ``reason`` of the first where the others do not fail in time."""
    failed, alone, begun = f"{block}/failed", f"{block}/alone", time.monotonic()
    if store.check([alone]):  # this failure only reports that the other rank exited
        return str(store.get(alone).decode())
    count = store.add(failed, 1)
    while count < ranks:
        if time.monotonic() - begun > _ALIKE_SECONDS:
            store.set(alone, reason)
            return reason
        time.sleep(_POLL_SECONDS)
        count = store.add(failed, 0)
    return None


def _another(what: str, message: bytes) -> FailedElsewhereError:
    return FailedElsewhereError(f"another rank failed while {what}: {message.decode()}")
