"""Files of JSON rows that a run appends to, one a line, and that a resumed run continues."""

import json
from pathlib import Path
from typing import Any, TextIO

from halfbyte.files import named, read

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; an incomplete last line, of a run that was killed, is ignored."""
    rows = []
    if path.exists():
        for line in read(path).splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


class RowsLog:
    """Append rows to the file at ``path``, flushed as they come.

    A resumed run appends to the file of the run before it. The file is opened at the first row, so that a run that
    never starts creates no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._file: TextIO | None = None

    def append(self, *rows: Row) -> None:
        """Write ``rows``, whose values are JSON's, in one piece."""
        if self._file is None:
            self._file = self._open()
        with named(self.path):
            self._file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            self._file.flush()
        self.rows += rows

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(self.path)
        file = self.path.open("a", encoding="utf-8")
        if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            file.write("\n")  # a killed run left half a row
        return file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
