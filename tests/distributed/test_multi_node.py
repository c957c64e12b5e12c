"""Two machines, for real: a launcher in each of two network namespaces, joined by a virtual cable.

Where the machine does not allow namespaces, two launchers on 127.0.0.1.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import launch, tiny

STEPS = 6
TIMEOUT = 300


def ip(*words: str) -> bool:
    """Whether ``ip WORDS`` succeeded."""
    try:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def machines() -> Iterator[tuple[list[list[str]], str, dict[str, str]]]:
    """For each machine the words that start a command there; machine 0's address; the environment."""
    names = [f"hb{os.getpid()}-{rank}" for rank in (0, 1)]
    ends = [f"hb{os.getpid()}v{rank}" for rank in (0, 1)]
    # A subnet of this test's own, so that two runs on one machine do not meet.
    subnet = f"10.{200 + os.getpid() // 256 % 50}.{os.getpid() % 256}"
    joined = all(ip("netns", "add", name) for name in names)
    joined = joined and ip(
        "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]
    )
    for rank, (name, end) in enumerate(zip(names, ends, strict=True)):
        joined = joined and ip("-n", name, "addr", "add", f"{subnet}.{rank + 1}/24", "dev", end)
        joined = (
            joined and ip("-n", name, "link", "set", end, "up") and ip("-n", name, "link", "set", "lo", "up")
        )
    try:
        if joined:
            starts = [["ip", "netns", "exec", name] for name in names]
            yield starts, f"{subnet}.1", {}
        else:
            yield [[], []], "127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo"}
    finally:
        for name in names:
            ip("netns", "del", name)


def options(model: Path, rows: str, output: Path, batch: int) -> list[str]:
    return [
        *("sft", "--model_name_or_path", str(model), "--dataset_name", rows, "--output_dir", str(output)),
        *("--max_steps", str(STEPS), "--logging_steps", "1", "--per_device_train_batch_size", str(batch)),
        *("--learning_rate", "1e-3", "--save_strategy", "no", "--report_to", "none", "--dtype", "float32"),
    ]


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.distributed
def test_two_machines_train_as_one_process(model_dir, tmp_path: Path, machines) -> None:
    starts, address, extra = machines
    print("machines:", starts, address)
    model, rows = model_dir("llama"), tiny.write_rows(tmp_path / "rows", tiny.conversations(40))
    started = []
    for rank, start in enumerate(starts):
        words = [
            *(*start, sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(launch.ROOT / "launch" / "multi_node.yaml")),
            *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
            *("--main_process_ip", address, "--main_process_port", str(20000 + os.getpid() % 10000)),
            *("-m", "halfbyte", *options(model, rows, tmp_path / "two", 2), "--use_cpu"),
        ]
        if start:
            extra = {"GLOO_SOCKET_IFNAME": f"hb{os.getpid()}v{rank}"}
        started.append(
            subprocess.Popen(
                words,
                env=launch.environment(**extra),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    one = launch.halfbyte(*options(model, rows, tmp_path / "one", 4))
    assert one.returncode == 0, one.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["strategy"]["world_size"] == 2
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    print("losses:", expected, found)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)
