"""Small agreements between ranks: one decides for all, all report to one, all fail together."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from halfbyte.errors import UserError

T = TypeVar("T")


class FailedElsewhereError(UserError):
    """This rank did nothing wrong: another one failed, and says so itself."""


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

    A rank whose own block succeeded raises when another's did not, so that none waits for it forever.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if PartialState().num_processes > 1:
        failures = [message for message in gather(f"{failure}" if failure else None) if message]
        if failures and failure is None:
            raise FailedElsewhereError(f"another rank failed while {what}: {failures[0].splitlines()[0]}")
    if failure is not None:
        raise failure
