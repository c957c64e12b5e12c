"""Two ranks: one writes, both say how much memory they held."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import sys
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from accelerate import PartialState
from halfbyte.resilience.signals import Signals
from halfbyte.tracking import RunRecord, Tracker
from halfbyte.trainer.base import Conduct
from halfbyte.trainer.compose import compose
from halfbyte.trainer.run_directory import RunDirectory
from tests import tiny

model, directory = sys.argv[1:]
args = SFTConfig(
    output_dir=directory, max_steps=2, per_device_train_batch_size=1, logging_steps=1, save_steps=1,
    use_cpu=True, bf16=False, report_to=[], ddp_find_unused_parameters=False,
)
tracker = Tracker(RunRecord(directory, "sft"), main=PartialState().is_main_process)
conduct = Conduct(tracker=tracker, signals=Signals(lambda _: None), config={}, inputs={})
trainer = compose(SFTTrainer, (RunDirectory,))(
    model=model, args=args, train_dataset=Dataset.from_list(tiny.texts(8)), conduct=conduct
)
with tracker:
    trainer.train()
"""


@pytest.mark.distributed
def test_rank_0_writes_for_both(tmp_path: Path, model_dir: Callable[..., Path]) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script), str(model_dir("llama")), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "completed"
    assert len(record["peak_memory_bytes"]) == 2
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 2]
    assert done.stdout.count("step 1/2") == 1
    assert done.stdout.count("status") == 1
    assert "the most of 2 ranks" in done.stdout
