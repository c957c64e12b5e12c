"""What identifies a base checkpoint: its bytes, so that one model under two names has one fingerprint."""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from halfbyte import identity, names
from halfbyte.errors import UserError
from halfbyte.terminal.wording import first_line

_SHA256 = re.compile("[0-9a-f]{64}")


def fingerprint(name_or_path: str, revision: str = "main") -> str | None:
    """Return a sha256 over ``config.json`` and every weight file, or None if no file is local."""
    directory = directory_of(name_or_path, revision)
    if directory is None:
        return None
    digest = hashlib.sha256()
    for path in [directory / "config.json", *weight_files(directory)]:
        digest.update(f"{path.name}:{content(path)}\n".encode())
    return digest.hexdigest()


def content(path: Path) -> str:
    """Return the sha256 of a checkpoint's file: the name of a large file in the hub's cache, else that of its bytes."""
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    return identity.sha256(real)


def require(name_or_path: str, revision: str = "main") -> None:
    """Raise :class:`UserError` for a base that is not there, as far as this machine alone shows."""
    path = Path(name_or_path)
    problem = None
    if path.is_dir():
        problem = names.unreadable(path) or _damage(path)
    elif path.exists():
        problem = f"{name_or_path} is a file; name the directory of a model"
    elif names.cannot_be_fetched(name_or_path) and directory_of(name_or_path, revision) is None:
        problem = names.missing(name_or_path)
    if problem is not None:
        raise UserError(problem, option="model_name_or_path")


def _damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, as far as its configuration and the headers of its weights show."""
    config = directory / "config.json"
    if not config.is_file():
        return f"{directory} is not a model: it has no config.json"
    try:
        content = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return f"{config} is not a JSON object; download or save the model again"
    tensors = 0
    for path in weight_files(directory):
        if path.is_dir():
            return f"{path} is a directory; remove it"
        if path.suffix == ".safetensors":
            try:
                with safe_open(
                    path, framework="pt"
                ) as file:  # reads the header, which must fit the file's size
                    tensors += len(file.keys())
            except (SafetensorError, OSError) as error:
                return f"{path} is damaged: {first_line(error)}; download or save the model again"
    layers = content.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors > 0:  # they would all be made before one is missed
        return f"{config} names {layers:,} layers, and the weights have {tensors:,} tensors; download the model again"
    return None


def directory_of(name_or_path: str, revision: str) -> Path | None:
    """Return the local directory, or the hub cache's snapshot, that holds the checkpoint; None if neither exists."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path) if (Path(name_or_path) / "config.json").is_file() else None
    try:
        cached = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    except HFValidationError:  # not a name that the hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def weight_bytes(name_or_path: str, revision: str) -> int | None:
    """Return the bytes of the checkpoint's weight files on this machine, or None if there are none."""
    directory = directory_of(name_or_path, revision)
    files = weight_files(directory) if directory is not None else []
    return sum(path.stat().st_size for path in files) if files else None


def weight_files(directory: Path) -> list[Path]:
    """Return the checkpoint's weight files, sorted by name."""
    return sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin"))
