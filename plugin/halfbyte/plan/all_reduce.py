"""Two processes that add up a number between them: whether ranks on this machine can communicate."""

import subprocess
import sys
import tempfile
from pathlib import Path

RANKS = 2
_SECONDS = 90.0
# Each rank adds its own number and one; imported by neither, so that it costs no more than torch.
_RANK = """
import sys
from datetime import timedelta

import torch
from torch import distributed

place, rank, ranks, backend = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = distributed.FileStore(place, ranks)
distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
number = torch.tensor([rank + 1.0], device=device)
distributed.all_reduce(number)
print(number.item())
distributed.destroy_process_group()
"""


def failure(backend: str) -> str | None:
    """Return why an all-reduce of two ranks over ``backend`` (gloo or nccl) did not add up; None where it did."""
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", _RANK, str(Path(directory) / "store"), str(rank), str(RANKS), backend],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        try:
            ended = [(*rank.communicate(timeout=_SECONDS), rank.returncode) for rank in ranks]
        except subprocess.TimeoutExpired:
            return f"no answer within {_SECONDS:.0f} seconds"
        finally:
            for rank in ranks:
                rank.kill()
    expected = float(sum(range(1, RANKS + 1)))
    for said, complaint, code in ended:
        if code:
            return (complaint.strip().splitlines() or [f"exit code {code}"])[-1]
        if float(said.split()[-1]) != expected:
            return f"a sum of {said.split()[-1]}, not {expected}"
    return None
