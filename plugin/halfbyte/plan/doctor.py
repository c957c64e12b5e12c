"""``halfbyte doctor``: is this machine ready to train, and what would a launch file run on it."""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
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
    """One thing looked at: what was found, and for what is wrong, what to do."""

    name: str
    ok: bool
    found: str
    mend: str = ""


def main(arguments: list[str]) -> int:
    """Print the checks; 1 if one failed, or if the launch file would not run as it says."""
    parser = argparse.ArgumentParser(prog="halfbyte doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--launch", type=Path, help="a file of launch/, or one of your own")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    gpus = torch.cuda.device_count()
    found = checks()
    launch = inspect(options.launch, gpus) if options.launch else None
    ok = all(check.ok for check in found) and not (launch and launch.problems)
    if options.json:
        told = {
            "ok": ok,
            "checks": [asdict(check) for check in found],
            "launch": asdict(launch) if launch else None,
        }
        print(json.dumps(told, indent=2))
    else:
        _print(found, launch)
    return 0 if ok else 1


def checks() -> list[Check]:
    """Look at this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [*versions(), _device(device), _backend(device), _dtype(device), _memory(), _cache(), _wandb()]


def versions() -> list[Check]:
    """The installed version of everything halfbyte requires, against what it requires."""
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
    """Quantize a matrix there and back: bitsandbytes imports without a backend that works."""
    try:
        weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        packed, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
        error = (bnb.dequantize_4bit(packed, state) - weights).abs().max().item()
    except Exception as problem:
        return Check(
            "bitsandbytes backend",
            False,
            f"{type(problem).__name__}: {problem}",
            "python -m bitsandbytes tells more",
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
        "" if free > _LEAST_MEMORY else "free some",
    )


def _cache() -> Check:
    root = store.root()
    place = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(place, os.W_OK):
        return Check(
            "base cache", False, f"{place} is not writable", "set XDG_CACHE_HOME to a directory that is"
        )
    return Check("base cache", True, f"{root}, {shutil.disk_usage(place).free / _GIB:.0f} GiB free")


def _wandb() -> Check:
    try:
        ready = wandb_ready()
    except Exception as error:
        return Check("wandb", False, str(error), "wandb login --relogin")
    return Check("wandb", True, "ready" if ready else "no login: runs report to none")


def _print(found: list[Check], launch: Launch | None) -> None:
    width = max(len(check.name) for check in found)
    for check in found:
        mend = f"; {check.mend}" if check.mend else ""
        print(f"{'ok   ' if check.ok else 'WRONG'}  {check.name:<{width}}  {check.found}{mend}")
    if launch is None:
        return
    print(f"{'WRONG' if launch.problems else 'ok   '}  {launch.file}: {launch.runs}")
    for line in (*launch.problems, *launch.notes):
        print(f"       {line}", file=sys.stdout)
