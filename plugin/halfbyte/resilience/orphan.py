"""A rank ends with its launcher: an orphan would train on, unseen. Imports no torch."""

import os
import signal
import sys

from halfbyte.errors import Stopped

# Set by accelerate launch and by torchrun in the processes that they start.
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_the_launcher() -> None:
    """Have the kernel send SIGTERM to this process when its launcher ends (Linux only).

    Raises :class:`Stopped` if the launcher has ended already.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in _LAUNCHED):
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        raise Stopped(signal.SIGTERM, "the launcher has ended")
