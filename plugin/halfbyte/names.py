"""Names that are a directory here or a repository on the hub: which one is, and what is wrong with neither."""

from pathlib import Path

from huggingface_hub import constants

from halfbyte.files import LONGEST_TEXT
from halfbyte.terminal.wording import nearest, shorten

_TEXTS = (".json", ".jinja", ".txt", ".model")


def is_path(name: str) -> bool:
    """Whether ``name`` cannot be a repository on the hub, which is ``model`` or ``owner/model``."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def is_local(name: str) -> bool:
    """Whether ``name`` says nothing elsewhere: it is a path, or something that is here."""
    return is_path(name) or Path(name).exists()


def public(name: str) -> str:
    """``name`` as others may read it: a hub id unchanged, of a local path the last name."""
    return Path(name).expanduser().resolve().name if is_local(name) else name


def missing(name: str) -> str:
    """Say where ``name``, which was not found, was looked for, and the nearest directory; reads no network."""
    near = _nearest_directory(name)
    hint = f"; did you mean {near}?" if near is not None else ""
    if is_path(name):
        return f"there is no directory {shorten(name, 200)}{hint}"
    if constants.HF_HUB_OFFLINE:
        where = "is no directory and not in the hub's local cache, and HF_HUB_OFFLINE is set"
        return f"{shorten(name, 200)!r} {where}{hint}"
    return f"{shorten(name, 200)!r} is neither a directory nor on the hub{hint}"


def cannot_be_fetched(name: str) -> bool:
    """Whether the hub cannot have ``name``, which is no directory: it is a path, or the hub is not to be asked."""
    return is_path(name) or constants.HF_HUB_OFFLINE


def unreadable(directory: Path) -> str | None:
    """What is wrong with the first file of a model in ``directory`` that would block its reader, or fill the memory."""
    for path in sorted(directory.iterdir()):
        if not (path.is_file() or path.is_dir()):
            return f"{path} is not a file: it may be a pipe, or a link to nothing; remove it"
        if path.suffix in _TEXTS and path.is_dir():
            return f"{path} is a directory in the place of a file; remove it"
        if path.suffix in _TEXTS and path.stat().st_size > LONGEST_TEXT:
            return f"{path} has more than {LONGEST_TEXT:,} bytes, which no configuration or tokenizer has; replace it"
    return None


def _nearest_directory(name: str) -> str | None:
    path = Path(name)
    try:
        names = [
            each.name for each in path.parent.iterdir() if each.is_dir() and not each.name.startswith(".")
        ]
    except OSError:
        return None
    near = nearest(path.name, names)
    return None if near is None else f"{name.rstrip('/').removesuffix(path.name)}{near}"
