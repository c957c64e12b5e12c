"""What identifies a base checkpoint: its bytes, so that one model under two names has one fingerprint."""

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

_BLOCK = 1 << 16
_BLOCKS = 16


def fingerprint(name_or_path: str, revision: str = "main") -> str | None:
    """Return a sha256 over ``config.json`` and samples of every weight file, or None if no file is local.

    A weight file is sampled at its head (where safetensors keeps names, dtypes and shapes) and at sixteen evenly
    spaced blocks of 64 KiB, and its size is included. That takes milliseconds for a checkpoint of any size, and two
    different trainings never agree in all samples.
    """
    directory = directory_of(name_or_path, revision)
    if directory is None:
        return None
    digest = hashlib.sha256()
    for path in [directory / "config.json", *weight_files(directory)]:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for block in range(_BLOCKS):
                file.seek(block * size // _BLOCKS)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def directory_of(name_or_path: str, revision: str) -> Path | None:
    """Return the local directory, or the hub cache's snapshot, that holds the checkpoint; None if neither exists."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path) if (Path(name_or_path) / "config.json").is_file() else None
    cached = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def weight_files(directory: Path) -> list[Path]:
    """Return the checkpoint's weight files, sorted by name."""
    return sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".bin"))
