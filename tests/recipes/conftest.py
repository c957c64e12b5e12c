"""What a recipe says to rows and options that it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import main
from tests import tiny
from tests.checkpoint.runs import options


@pytest.fixture
def refused(
    model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """``refused("kto", rows, max_length="2")``: what it prints, before it touches the output directory."""

    def told(recipe: str, rows: list[dict[str, Any]], **given: str) -> str:
        data = tiny.write_rows(tmp_path / "rows", [*rows] * 2, held_out=len(rows))
        output = tmp_path / "run"
        assert main([recipe, *options(model_dir("llama"), data, output, **given)]) == 2
        assert not output.exists()
        return capsys.readouterr().err

    return told
