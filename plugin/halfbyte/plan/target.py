"""Where a planned run would run: the machine at hand, or GPUs and a launch file that the user names."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.distributed import Strategy, support
from halfbyte.distributed.launcher import Request
from halfbyte.errors import UserError
from halfbyte.memory import Memory
from halfbyte.memory.available import host_memory
from halfbyte.plan import launch_file
from halfbyte.terminal.wording import memory

# What a process takes of a GPU beside torch's tensors: CUDA's context, and the libraries' workspaces.
CONTEXT = 512 * 2**20
# Above this share the verdict is `tight`: fragmentation and longer rows need headroom.
_COMFORTABLE = 0.9
_GPU = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB)?(?:\s*[x*\u00d7]\s*(\d+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """The devices of a planned run: their kind, how many, the ``strategy`` over them, and the bytes of one of them.

    ``capacity`` is what a run may use of one, and ``basis`` how it was determined; ``notes`` are problems of the launch
    file on such a machine.
    """

    device: str
    ranks: int
    strategy: str
    capacity: int
    basis: str
    notes: tuple[str, ...] = ()

    @property
    def planned(self) -> Strategy:
        """The strategy as a run that is decided there has it."""
        return Strategy(self.strategy, self.ranks, self.device)

    def verdict(self, held: Memory) -> str:
        """``fits``, ``tight`` (little headroom, or paged state moves to the host) or ``does not fit``."""
        if held.total <= _COMFORTABLE * self.capacity:
            return "fits"
        return "tight" if held.total - held.pageable <= self.capacity else "does not fit"


def find(gpu: str | None, launch: Path | None, *, use_cpu: bool = False) -> Target:
    """Return the devices that ``gpu`` and the ``launch`` file name; without either, those of this machine.

    ``use_cpu`` is the run's option. Raises :class:`UserError` for what names no devices, for CPUs and a GPU at once,
    and for a strategy that is refused.
    """
    size, stated = (0, None) if gpu is None else _parse(gpu)
    if gpu is not None and use_cpu:
        raise UserError(
            "true trains on the CPU, and --gpu plans for a GPU; add `--use_cpu false` for the plan",
            option="use_cpu",
        )
    here = None if use_cpu else torch.cuda.device_count()
    file = None if launch is None else launch_file.inspect(launch, here if gpu is None else stated)
    request = Request() if file is None else file.request
    support.require(request.strategy if request.strategy in support.STRATEGIES else "other")
    count = stated or request.processes
    # What would keep the launch file from running as it says on such a machine.
    notes = () if file is None else tuple(f"{launch}: {each}" for each in file.problems)
    if gpu is not None:
        if request.use_cpu:
            raise UserError(f"{launch} trains on CPUs; take one of the two out", option="--gpu")
        said = f"{memory(size)} less {memory(CONTEXT)} for the CUDA context"
        return Target("cuda", count, _strategy(request, count), size - CONTEXT, said, notes)
    if torch.cuda.is_available() and not (use_cpu or request.use_cpu):
        _, total = torch.cuda.mem_get_info()
        said = f"{torch.cuda.get_device_name()}, {memory(total)} less {memory(CONTEXT)} for the CUDA context"
        return Target("cuda", count, _strategy(request, count), total - CONTEXT, said, notes)
    sharing = max(count // max(request.machines, 1), 1)
    free = host_memory() // sharing
    said = "the memory that is free here" + (f", shared by {sharing}" if sharing > 1 else "")
    return Target("cpu", count, _strategy(request, count), free, said, notes)


def _strategy(request: Request, ranks: int) -> str:
    return "ddp" if request.strategy == "single" and ranks > 1 else request.strategy


def _parse(text: str) -> tuple[int, int | None]:
    """The bytes of one GPU, and how many there are, if the text says so; GB is what vendors call 2^30 bytes."""
    found = _GPU.fullmatch(text.strip())
    if found is None or float(found[1]) == 0 or found[2] == "0":
        raise UserError(f'{text!r} is no GPU; write its memory, as in `24GB` or `"24GB x 2"`', option="--gpu")
    return int(float(found[1]) * 2**30), int(found[2]) if found[2] else None
