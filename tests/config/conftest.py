"""``config``: settings from a file in a directory of the test's own."""

from pathlib import Path

import pytest

from halfbyte.config import Settings
from tests.config.reading import CLASSES, parse


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``config(text, *argv)``: the settings of a file ``run.yaml`` in the current directory."""
    monkeypatch.chdir(tmp_path)

    def get(text: str | bytes, *argv: str, classes: tuple[type, ...] = CLASSES) -> Settings:
        Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse("--config", "run.yaml", *argv, classes=classes)

    return get
