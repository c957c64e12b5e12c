"""What memory a step may plan with: what is free on this rank's device, or the size that the user states."""

import os
from pathlib import Path

import psutil
import torch

from halfbyte.errors import UserError
from halfbyte.terminal.wording import size_in_bytes

# The share of free memory that a step may plan with. Other processes use a host's free memory as well, and where it
# runs out the kernel kills one.
SHARE = {"cuda": 0.9, "cpu": 0.5}


def check_budget(budget: str) -> None:
    """Raise :class:`UserError` unless ``budget`` is ``auto``, ``min`` or a size."""
    if budget not in ("auto", "min") and size_in_bytes(budget) is None:
        raise UserError(
            f"{budget!r} is neither `auto` nor `min` nor a size; write a size such as `12GiB` or `800MB`",
            option="memory_budget",
        )


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a step may plan with on ``device`` now; on a CPU the ranks of a machine share them."""
    if device.type != "cuda":
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return int(SHARE["cpu"] * host_memory() / local_ranks)
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    capped = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    return int(SHARE["cuda"] * (min(free, capped) + reserved - allocated))


def host_memory() -> int:
    """Return the bytes of host memory that are available, to this container where it has a limit (cgroup version 2)."""
    available: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
    except OSError:
        return available
    return available if limit.strip() == "max" else min(available, int(limit) - int(used))
