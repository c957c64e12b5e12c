"""Anonymous memory (RssAnon) of this process: now, and at most while a block runs."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self


class Watched:
    """How RssAnon grows, in bytes, while a ``with`` block runs; read every ``seconds``, and where the block ends."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.growth = 0
        self._seconds, self._over = seconds, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._before = anonymous()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.growth = max(self.growth, self.held())

    def held(self) -> int:
        """Return by how much RssAnon is larger now than where the block began."""
        return anonymous() - self._before

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            self.growth = max(self.growth, self.held())


def anonymous() -> int:
    """Return the bytes of RssAnon now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
