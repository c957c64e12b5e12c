"""Merging and quantizing hold what a file of the output holds, and not the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launch
from tests.benchmarks import export

SIZE, SHARD = 80 * 10**6, 2 * 10**6
# First on a base of one layer: what a process loads once is not what is measured.
GROWTH = """
import json, sys
from pathlib import Path
from halfbyte.cli import main
from tests.benchmarks.export import watch
root, shard = Path(sys.argv[1]), sys.argv[2]
def words(command, of, most, name):
    more = ["--measure", "none"] if command == "merge" else []
    of = f"{of}-adapter" if command == "merge" else f"{of}-base"
    return [command, str(root / of), "--output_dir", str(root / name), "--max_shard_size", most, *more]
grown = {}
assert main(words("merge", "small", shard, "first")) == 0
for command in ("merge", "quantize"):
    grown[command] = watch(words(command, "large", shard, command))
grown["merge, one file"] = watch(words("merge", "large", "1GB", "whole"))
print(json.dumps(grown))
"""


@pytest.mark.faults
def test_memory_grows_by_files_and_not_by_the_model(tmp_path: Path) -> None:
    for name, size in (("small", 1), ("large", SIZE)):
        base = export.base(tmp_path / f"{name}-base", size, hidden=384, inner=1024)
        export.adapter(tmp_path / f"{name}-adapter", base)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), str(SHARD)],
        env=launch.environment(),
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
        timeout=launch.TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown["merge"] < 0.6 * SIZE, grown
    assert grown["quantize"] < 0.6 * SIZE, grown
    assert grown["merge, one file"] > 0.9 * SIZE, "what holds the model must be seen"
