"""run.json: the configuration of a run, what it ran on, and its results."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.files import overwrite_file, read, replace_file
from halfbyte.terminal.redaction import redact
from halfbyte.terminal.streams import escaped_json

_PACKAGES = ("halfbyte", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


class RunRecord:
    """The contents of ``run.json``; nothing is on disk before `write`.

    Only rank 0 writes, which the caller ensures. The keys are the ones below, of which none is renamed, and whatever
    else `update` is given.
    """

    def __init__(self, output_dir: str | os.PathLike[str], recipe: str) -> None:
        self.output_dir = Path(output_dir)
        self.path = self.output_dir / "run.json"
        self._values: dict[str, Any] = {
            "status": "running",
            "recipe": recipe,
            "run_id": uuid.uuid4().hex[:12],
            "config": {},
            "versions": versions(),
            "base": {},
            "data": {},
            "strategy": {},
            "steps": 0,
            "total_steps": None,
            "tokens_per_second": None,
            "peak_memory_bytes": [],
            "metrics": {"train": {}, "eval": {}, "before": {}},
            "checkpoints": [],
            "next": None,
        }

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key that a run may not have, or ``default``."""
        return self._values.get(key, default)

    def update(self, **values: Any) -> None:
        """Set top-level keys; a mapping is merged, one level deep, into an existing mapping."""
        for key, value in values.items():
            old = self._values.get(key)
            if isinstance(old, dict) and isinstance(value, Mapping):
                self._values[key] = {**old, **value}
            else:
                self._values[key] = value

    def as_dict(self) -> dict[str, Any]:
        """Return what :meth:`write` puts on disk: plain JSON values, without secrets."""
        return dict(redact(plain(self._values)))

    def write(self) -> None:
        """Replace ``run.json`` atomically: a reader sees the old file or the new one, never a part."""
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            replace_file(self.path, escaped_json(text).encode())
        except OSError:
            if self._values["status"] == "running" or not self._write_status():
                raise

    def _write_status(self) -> bool:
        """Write only how the run ended, in place, where a full disk takes no second file; return whether it did."""
        with suppress(OSError, ValueError, TypeError):
            ended = {key: plain(self._values[key]) for key in ("status", "steps")}
            text = json.dumps({**json.loads(read(self.path)), **ended}, indent=2, ensure_ascii=False) + "\n"
            return overwrite_file(self.path, text.encode())
        return False


def read_record(path: Path) -> dict[str, Any]:
    """Return what a ``run.json`` says; nothing where it cannot be read."""
    try:
        found = json.loads(read(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            found[package] = "unknown"
    return found


def peak_memory_bytes() -> int:
    """Return the peak memory of this process in bytes: on its CUDA devices if it used one, else resident in RAM."""
    import torch

    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        if peak := sum(torch.cuda.max_memory_allocated(device) for device in devices):
            return peak
    try:
        # ru_maxrss survives exec, so that on Linux a small child of a large launcher reports the launcher.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def plain(value: Any) -> Any:
    """Return ``value`` in types that JSON has: NaN and infinity become None, tensors of one element numbers."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    return str(value)
