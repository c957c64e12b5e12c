"""What ``halfbyte doctor`` checks: versions, device, quantization backend, dtype, memory, cache, W&B login."""

import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import bitsandbytes.functional as bnb
import psutil
import torch
from packaging.requirements import Requirement

from halfbyte import store
from halfbyte.plan.launch_file import Launch, inspect
from halfbyte.quantization import choose_compute_dtype
from halfbyte.tracking import wandb_ready

_GIB = 2**30
_LEAST_MEMORY = 2 * _GIB


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, what was found, and what to do where it failed."""

    name: str
    ok: bool
    found: str
    mend: str = ""


def checks() -> list[Check]:
    """Check this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [*versions(), _device(device), _backend(device), _dtype(device), _memory(), _cache(), _wandb()]


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
    free = psutil.virtual_memory().available
    return Check(
        "free memory",
        free > _LEAST_MEMORY,
        f"{free / _GIB:.1f} GiB",
        "" if free > _LEAST_MEMORY else f"free at least {_LEAST_MEMORY / _GIB:.0f} GiB",
    )


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
    return Check("wandb", True, "ready" if ready else "no login: runs report to none")
