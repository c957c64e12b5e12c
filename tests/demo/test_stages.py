"""What the demo hands to the recipes, and how it follows them."""

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from halfbyte.demo import corpus, stages


def test_data_files_split_by_module(library: corpus.Corpus, tmp_path: Path) -> None:
    stages.write_data(library, tmp_path, stages.Size(held_out_rows=50))
    modules = {pair.docstring: pair.module for pair in library.pairs}
    for kind, side in (("sft", "completion"), ("dpo", "chosen")):
        for part, is_test in (("train", False), ("test", True)):
            rows = [json.loads(line) for line in (tmp_path / kind / f"{part}.jsonl").open(encoding="utf-8")]
            assert all(corpus.held_out(modules[row[side][0]["content"]]) == is_test for row in rows)
            assert len(rows) == 50 if is_test else len(rows) > 2000


def test_follow_logs_everything_and_shows_progress(tmp_path: Path) -> None:
    program = "import sys; print('step 1/2  loss 3'); print('noise', file=sys.stderr); sys.exit(5)"
    shown = io.StringIO()
    status = stages._follow([sys.executable, "-c", program], tmp_path / "x.log", "x", Console(file=shown))
    assert status == 5
    assert shown.getvalue() == "x: step 1/2  loss 3\n"
    assert sorted((tmp_path / "x.log").read_text().split("\n")) == ["", "noise", "step 1/2  loss 3"]


def test_children_run_one_thread_each(tmp_path: Path) -> None:
    program = "import os; print('step 0/0', os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'])"
    stages._follow([sys.executable, "-c", program], tmp_path / "x.log", "x", Console(file=io.StringIO()))
    assert (tmp_path / "x.log").read_text() == "step 0/0 1 1\n"
