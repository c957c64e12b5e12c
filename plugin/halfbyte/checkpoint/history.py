"""What a resume sets aside: rows and checkpoints after its step, kept under ``_earlier/N`` of the run."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from halfbyte.files import next_free, read, replace_file

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
_TENSORBOARD = "runs"  # where upstream's callback writes, unless the environment says otherwise
EARLIER = "_earlier"  # upstream pushes no name that begins with an underscore
_PREFIX = "checkpoint-"
# What marks a directory as that of an earlier run, and is kept when the run starts over.
_OF_A_RUN = (
    *(METRICS, SAMPLES, "run.json"),
    *("adapter_model.safetensors", "model.safetensors", "README.md", "plots"),
)


def checkpoints(output_dir: Path) -> list[Path]:
    """The directories checkpoint-N, the newest step first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.glob(f"{_PREFIX}*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def step_of(path: Path) -> int | None:
    """N of checkpoint-N; None for any other name."""
    number = path.name.removeprefix(_PREFIX)
    return int(number) if path.name.startswith(_PREFIX) and number.isdecimal() else None


def holds_a_run(output_dir: Path) -> bool:
    """Whether everything visible in ``output_dir`` can be a run's own: an empty directory too."""
    visible = [path.name for path in output_dir.iterdir() if not path.name.startswith((".", "_"))]
    return not visible or any((output_dir / name).exists() for name in (METRICS, "run.json", EARLIER))


def unreadable(output_dir: Path) -> str | None:
    """Why the run in ``output_dir`` cannot be continued, or None: a log that is no file would block or break it."""
    for name in (METRICS, SAMPLES, "run.json"):
        path = output_dir / name
        if os.path.lexists(path) and not path.is_file():
            return f"{path} is no regular file; remove it"
    return None


def not_to_be_moved(output_dir: Path, inputs: Iterable[str]) -> str | None:
    """Why ``output_dir`` may not be moved aside, or None: it must hold a run, and nothing that this run reads."""
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return None
    if output_dir.is_symlink():
        return f"{output_dir} is a link, which is not moved aside; name the directory that it points at"
    place = output_dir.resolve()
    if place == Path.cwd() or place in Path.cwd().parents:
        return f"{output_dir} is the working directory or above it, which is not moved aside; choose another"
    for name in inputs:
        path = Path(name).expanduser()
        if any(found == place or place in found.parents for found in _read_at(path, place)):
            return f"{output_dir} holds {name}, which this run reads, and is not moved aside; choose another"
    if os.path.ismount(place) or not os.access(place.parent, os.W_OK | os.X_OK):
        return f"{output_dir} cannot be renamed where it is, and so not moved aside; choose another"
    logged = any((output_dir / name).is_file() for name in (METRICS, "run.json"))
    if not logged and not checkpoints(output_dir):
        return f"{output_dir} holds no run, and only an earlier run is moved aside; choose another"
    return None


def _read_at(path: Path, place: Path) -> Iterator[Path]:
    """Where ``path`` really is, and what the links in a directory point at, unless it is above ``place``."""
    try:
        if not path.exists():
            return
        yield path.resolve()
    except (OSError, RuntimeError, ValueError):  # no path at all
        return
    if path.resolve() in place.parents:
        return
    for folder, folders, files in os.walk(path):
        for entry in (Path(folder) / name for name in (*folders, *files)):
            if entry.is_symlink():
                yield Path(os.path.realpath(entry))


def cut(output_dir: Path, step: int | None) -> list[str]:
    """Set aside what the run in ``output_dir`` made after ``step`` (None: all of it); return lines to print.

    The whole metrics.jsonl is copied before its later rows are cut, samples.jsonl likewise, and checkpoints are moved,
    not deleted.
    """
    lines = []
    aside = next_free(output_dir / EARLIER)
    if step is None:
        for name in _OF_A_RUN:
            if (output_dir / name).exists():
                _move(output_dir / name, aside)
        _move_events(output_dir, aside)
        return [f"the logs of the earlier run are now in {aside}"] if aside.exists() else []
    for log in (output_dir / METRICS, output_dir / SAMPLES):
        if not log.exists():
            continue
        kept, dropped = _rows_until(log, step)
        if dropped:
            aside.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, aside / log.name)
            replace_file(log, b"".join(kept))
            lines.append(f"{log.name}: {dropped} rows after step {step} cut (kept in {aside / log.name})")
    if _move_events(output_dir, aside):
        lines.append(f"{_TENSORBOARD}: moved to {aside}, since TensorBoard's new files begin with its rows")
    later = [path for path in checkpoints(output_dir) if (step_of(path) or 0) > step]
    for path in later:
        _move(path, aside)
    if later:
        lines.append(f"{', '.join(path.name for path in later)}: moved to {aside}")
    return lines


def _rows_until(log: Path, step: int) -> tuple[list[bytes], int]:
    kept, dropped, ended = [], 0, False
    for line in read(log).splitlines():
        try:
            row = json.loads(line)
            # The row that ended a session, and the evaluation after it, come again at the new end.
            ended = ended or "train_runtime" in row
            keep = row["step"] <= step and not ended
        except (ValueError, KeyError, TypeError, RecursionError):
            keep = False  # cut short by a kill
        if keep:
            kept.append(line + b"\n")
        else:
            dropped += 1
    return kept, dropped


def _move_events(output_dir: Path, aside: Path) -> bool:
    """Move TensorBoard's files, where there are any: they can neither be cut nor be continued."""
    found = any((output_dir / _TENSORBOARD).glob("*/events.out.tfevents.*"))
    if found:
        _move(output_dir / _TENSORBOARD, aside)
    return found


def _move(path: Path, aside: Path) -> None:
    aside.mkdir(parents=True, exist_ok=True)
    os.replace(path, aside / path.name)
