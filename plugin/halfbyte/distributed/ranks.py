"""Agreement between ranks: rank 0 decides for all, all report to all, all fail together.

Keys in the process group's store, for the n-th block of :func:`on_every_rank`: ``halfbyte/n/finished`` counts the
ranks that succeeded, ``halfbyte/n/failed`` is the first line of a failure. For one of :func:`on_the_first`:
``halfbyte/n/result`` is what rank 0 returned, 1 or 0, and ``halfbyte/n/hurry`` exists once a rank wants it to end.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import distributed_c10d

from halfbyte.errors import FailedElsewhereError
from halfbyte.terminal.wording import first_line

T = TypeVar("T")
_POLL_SECONDS = 0.05
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


def _another(what: str, message: bytes) -> FailedElsewhereError:
    return FailedElsewhereError(f"another rank failed while {what}: {message.decode()}")
