"""The exceptions that mean something to the command line: a mistake, a run that ended itself, a signal."""

import signal


class UserError(ValueError):
    """A mistake in what the user wrote or launched.

    The message says what is wrong, where (``file.yaml:line`` for YAML), and what to do, in at most ten
    lines. The command line prints it without a traceback and exits with status 2.
    """


class Halted(RuntimeError):  # noqa: N818 - like Stopped, an end and not always a mistake
    """Training ended itself, on every rank at the same step; the message says why and what to do.

    The command line prints it once, without a traceback, and exits with status 1.
    """


class Stopped(BaseException):
    """A signal ended the run, on every rank at the same step.

    Like KeyboardInterrupt it is no Exception: nothing on the way may take it for a failure to pass over.
    ``code`` is the exit status, 128 plus the signal's number.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal.Signals(signum).name
        self.code = 128 + signum
