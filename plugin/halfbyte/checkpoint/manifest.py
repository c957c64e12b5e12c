"""manifest.json: what a checkpoint holds, by size and sha256, and whether it still does.

Imports no library, so that `halfbyte verify` starts at once.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte import files as disk
from halfbyte.files import digest, digest_of, entry, sync, write_file

NAME = "manifest.json"
FORMAT = 1
_MOST = 1 << 26  # bytes of a manifest that is read

Listing = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json records beside the files: where the run stood, and what decided how it got there.

    ``config`` is the resolved configuration, redacted; ``inputs`` are fingerprints of what the configuration
    only names (data, base, chat template); ``decided`` is what the machine decided, for a resume to take over
    (the save level); ``data_position`` counts in epochs and batches, and says how a step was cut into them, which
    `on_oom: accumulate` may have changed. ``wandb_id`` is W&B's id of the run.
    """

    step: int
    run_id: str
    world_size: int
    config: Mapping[str, Any]
    config_hash: str
    inputs: Mapping[str, Any]
    data_position: Mapping[str, Any]
    finite: bool
    resumable: bool
    best_step: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    decided: Mapping[str, Any] = field(default_factory=dict)
    wandb_id: str | None = None


def write(directory: Path, manifest: Manifest) -> None:
    """Seal ``directory``: every file and directory in it is forced to disk, and the manifest comes last.

    Raises OSError for what is no regular file, and for what the disk refuses.
    """
    files: Listing = {}
    for name in names(directory):
        files[name] = entry(directory / name, durable=True)
    content: dict[str, Any] = {"format": FORMAT, **asdict(manifest), "files": files}
    content["sha256"] = _own_hash(content)
    write_file(directory / NAME, json.dumps(content, indent=1).encode())
    for at, _, _ in os.walk(directory):
        sync(Path(at))


def read(directory: Path) -> Manifest:
    """The manifest of ``directory``. Raises ValueError, in words for the user, when it fails verification."""
    return _read(directory)[0]


def check(directory: Path) -> tuple[Manifest | None, list[str]]:
    """Compare ``directory`` with its manifest; return the manifest, if it is whole, and every deviation.

    Nothing but names that are found in the directory is opened, links are never followed, and no file is
    decoded: only hashed.
    """
    try:
        manifest, files = _read(directory)
    except ValueError as error:
        return None, [str(error)]
    try:
        found = names(directory)
    except OSError as error:
        return manifest, [str(error)]
    problems = [f"{name} is missing" for name in sorted(files.keys() - set(found))]
    for name in found:
        if name not in files:
            if not Path(name).name.startswith("."):  # what file systems and file browsers leave behind
                problems.append(f"{name} is not in the manifest; remove it")
        elif (problem := deviation(directory / name, files[name])) is not None:
            problems.append(f"{name} {problem}")
    return manifest, problems


def deviation(path: Path, expected: Mapping[str, Any]) -> str | None:
    """How the file at ``path`` differs from its entry, or None."""
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} bytes instead of {expected['size']}"
        return None if digest(path) == expected["sha256"] else "has changed content (sha256)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def listing(directory: Path, chosen: list[str]) -> Listing:
    """Size and sha256 of the files ``chosen`` in ``directory``."""
    return {name: entry(directory / name) for name in chosen}


def text_hash(text: object) -> str | None:
    """A fingerprint of a text or of what prints as one, such as the templates of a tokenizer; None of None."""
    return None if text is None else disk.sha256(str(text))


def names(directory: Path) -> list[str]:
    """The regular files below ``directory`` but its manifest, as relative paths.

    Raises OSError for a link, a device or a pipe: what lies behind one is not part of the checkpoint.
    """
    return sorted(name for name in _walk(directory, directory) if name != NAME)


def _walk(directory: Path, root: Path) -> Iterator[str]:
    for found in os.scandir(directory):
        path = Path(found.path)
        mode = found.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _walk(path, root)
        elif stat.S_ISREG(mode):
            yield path.relative_to(root).as_posix()
        else:
            raise OSError(f"{path.relative_to(root)} is a link or a device, not a file")


def _read(directory: Path) -> tuple[Manifest, Listing]:
    path = directory / NAME
    try:
        if path.is_symlink():
            raise ValueError(f"{NAME} is a link")
        content = json.loads(disk.read(path, _MOST))
    except FileNotFoundError:
        raise ValueError(f"it has no {NAME}: its save never ended, or another program wrote it") from None
    except OSError as error:
        raise ValueError(f"{NAME} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error) if path.is_symlink() else f"{NAME} is damaged") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != _own_hash(content):
        raise ValueError(f"{NAME} is damaged")
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"{NAME} is of another version of halfbyte")
    files = content.pop("files", None)
    try:
        found = Manifest(**content)
        if _is_typed(found) and all(type(each["size"]) is int and each["sha256"] for each in files.values()):
            return found, files
    except (AttributeError, TypeError, KeyError):
        pass
    raise ValueError(f"{NAME} is damaged")


def _is_typed(found: Manifest) -> bool:
    """Whether every field has its type, and a value that a run can have."""
    counts = (found.step, found.world_size, 0 if found.best_step is None else found.best_step)
    texts, flags = (found.run_id, found.config_hash), (found.finite, found.resumable)
    mappings = (found.config, found.inputs, found.data_position, found.versions, found.decided)
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and all(isinstance(text, str) for text in texts)
        and (found.wandb_id is None or isinstance(found.wandb_id, str))
        and all(isinstance(flag, bool) for flag in flags)
        and all(isinstance(mapping, dict) for mapping in mappings)
    )


def _own_hash(content: Mapping[str, Any]) -> str:
    return digest_of(content)
