"""A cache of its own for each test, and no lock that outlives it."""

import os
from pathlib import Path

import pytest

from halfbyte import store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "halfbyte" / "bases"
    while store._in_use:
        os.close(store._in_use.pop())
