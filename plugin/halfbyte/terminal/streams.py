"""Standard output and error without secrets: what upstream prints, logs and warns passes here, tracebacks too."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from halfbyte.terminal.redaction import redact_text

# Control characters but tab and newline, what reverses the direction of text, and halves of characters.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What bars and colors need: carriage returns, and the sequences that begin with ESC [.
_NOT_OF_BARS = re.compile(rf"(?!\r|\x1b\[){_UNSEEN.pattern}")


def printable(text: str) -> str:
    """``text`` without secrets, and with every character that would steer a terminal written as its escape."""
    return _UNSEEN.sub(_escape, redact_text(text))


def escaped_json(text: str) -> str:
    """JSON whose strings have such characters as their escapes."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def clean() -> Iterator[None]:
    """Redact whatever is written to standard output and error, by anyone, while the block runs."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream if stream is None else _Clean(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Clean:
    """A text stream that redacts each piece written to it; in all else the stream itself."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_NOT_OF_BARS.sub(_escape, redact_text(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
