"""The exceptions that the command line acts on: invalid input, a run that ended itself, a signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Invalid input: what is wrong, where, and what to do, in at most ten lines.

    The command line prints it without a traceback and exits with status 2. ``option`` is the key at fault as the
    user writes it: where it was given in a YAML file, ``place`` puts the file and line before it.
    ``split`` and ``row`` are the place in a data set, rows counted from 1.
    """

    def __init__(
        self,
        what: str,
        *,
        option: str | None = None,
        split: str | None = None,
        row: int | None = None,
        place: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.option, self.split, self.row = what, option, split, row
        self.place = place

    def __str__(self) -> str:
        rows = None if self.row is None else f"{self.split or 'data'} row {self.row}"
        head = self.place or self.option
        return ": ".join(part for part in (head, rows or self.split, self.what) if part)


@contextmanager
def about(option: str) -> Iterator[None]:
    """Lay a UserError that is raised inside, and names no option, to ``option``."""
    try:
        yield
    except UserError as error:
        error.option = error.option or option
        raise


class FailedElsewhereError(UserError):
    """This rank succeeded; another one failed, and reports the failure itself."""


class Halted(RuntimeError):  # noqa: N818 - like Stopped, an end and not always a failure
    """Training ended itself, on every rank at the same step; the message says why and what to do.

    The command line prints it once, without a traceback, and exits with status 1.
    """


class Stopped(BaseException):
    """A signal ended the run, on every rank at the same step.

    Like KeyboardInterrupt it is no Exception, so that no handler takes it for a failure to pass over.
    ``code`` is the exit status, 128 plus the signal's number.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal.Signals(signum).name
        self.code = 128 + signum
