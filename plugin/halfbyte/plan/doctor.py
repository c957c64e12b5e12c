"""What ``halfbyte doctor`` checks: versions, device, quantization, ranks, memory, disk, cache, logins."""

import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import bitsandbytes.functional as bnb
import huggingface_hub
import psutil
import torch
from bitsandbytes import cextension
from huggingface_hub import get_token
from packaging.requirements import Requirement

from halfbyte import store
from halfbyte.memory.available import host_memory
from halfbyte.plan import all_reduce
from halfbyte.plan.launch_file import Launch, inspect
from halfbyte.quantization import choose_compute_dtype
from halfbyte.tracking import wandb_ready

_GIB = 2**30
_LEAST_MEMORY = 2 * _GIB
_LEAST_DISK = 5 * _GIB


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, what was found, and what to do where it failed.

    One that passed may ``warn``: a run starts, and something that a user may expect of it does not work.
    """

    name: str
    ok: bool
    found: str
    mend: str = ""
    warn: bool = False


def checks() -> list[Check]:
    """Check this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        *versions(),
        _device(device),
        _library(device),
        _backend(device),
        _dtype(device),
        _ranks(),
        _memory(),
        _disk(),
        _cache(),
        _hub(),
        _wandb(),
    ]


def inspect_launch(path: Path) -> Launch:
    """Return what the launch file at ``path`` would run on this machine; raises UserError for another kind of file."""
    return inspect(path, torch.cuda.device_count())


def versions() -> list[Check]:
    """Compare the installed version of each requirement with what halfbyte requires."""
    found = []
    for text in metadata.requires("halfbyte") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "none"
        ok = version != "none" and requirement.specifier.contains(version, prereleases=True)
        found.append(Check(requirement.name, ok, version, "" if ok else f"pip install '{text}'"))
    return found


def _device(device: torch.device) -> Check:
    if device.type == "cpu":
        return Check("device", True, f"no GPU; {psutil.cpu_count(logical=False)} CPU cores")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("device", True, f"{len(names)} x {names[0]}" if len(set(names)) == 1 else ", ".join(names))


def _library(device: torch.device) -> Check:
    """Which of bitsandbytes' libraries is loaded: it imports without one, and says so when it is needed."""
    library = getattr(cextension.lib, "_lib", None)
    name = Path(getattr(library, "_name", "") or "").name
    if not name:
        return Check("bitsandbytes library", False, "none was loaded", "`python -m bitsandbytes` shows why")
    fits = device.type == "cpu" or "cuda" in name or "rocm" in name
    mend = "" if fits else "torch has a GPU and bitsandbytes none: install the build for this CUDA version"
    return Check("bitsandbytes library", fits, name, mend)


def _ranks() -> Check:
    backend = "nccl" if torch.cuda.device_count() >= all_reduce.RANKS else "gloo"
    why = all_reduce.failure(backend)
    name = f"{all_reduce.RANKS} ranks, {backend}"
    if why is None:
        return Check(name, True, "an all-reduce adds up")
    mend = f"name the interface that ranks use: {backend.upper()}_SOCKET_IFNAME=lo on one machine"
    return Check(name, False, why, mend)


def _backend(device: torch.device) -> Check:
    """Quantize and dequantize a matrix: bitsandbytes imports even where its backend does not work."""
    try:
        weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        packed, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
        error = (bnb.dequantize_4bit(packed, state) - weights).abs().max().item()
    except Exception as problem:
        return Check(
            "bitsandbytes backend",
            False,
            f"{type(problem).__name__}: {problem}",
            "`python -m bitsandbytes` shows more",
        )
    return Check("bitsandbytes backend", error < 0.2, f"NF4 on {device.type}, largest error {error:.3f}")


def _dtype(device: torch.device) -> Check:
    return Check("compute dtype", True, str(choose_compute_dtype(device)).removeprefix("torch."))


def _memory() -> Check:
    free = host_memory()
    return Check(
        "free memory",
        free > _LEAST_MEMORY,
        f"{free / _GIB:.1f} GiB",
        "" if free > _LEAST_MEMORY else f"free at least {_LEAST_MEMORY / _GIB:.0f} GiB",
    )


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    enough = free > _LEAST_DISK
    mend = "" if enough else "checkpoints go below output_dir; name one on a larger disk"
    return Check("free disk here", True, f"{free / _GIB:.0f} GiB", mend, warn=not enough)


def _hub() -> Check:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return Check("hub", True, "offline, as HF_HUB_OFFLINE says: what is cached or local is used")
    if get_token() is None:
        mend = "`hf auth login`, where a model is gated or private"
        return Check("hub", True, "no login", mend, warn=True)
    return Check("hub", True, "a token was found, and not verified")


def _cache() -> Check:
    try:
        root = store.root()
    except OSError as error:
        return Check("base cache", False, str(error), "set XDG_CACHE_HOME to a writable directory")
    place = next(path for path in (root, *root.parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return Check(
            "base cache", False, f"{place} is not writable", "set XDG_CACHE_HOME to a writable directory"
        )
    return Check("base cache", True, f"{root}, {shutil.disk_usage(place).free / _GIB:.0f} GiB free")


def _wandb() -> Check:
    try:
        ready = wandb_ready()
    except Exception as error:
        return Check("wandb", False, str(error), "wandb login --relogin")
    if ready:
        return Check("wandb", True, "ready")
    mend = "`wandb login`, or WANDB_MODE=offline"
    return Check("wandb", True, "no login: runs report to none", mend, warn=True)
