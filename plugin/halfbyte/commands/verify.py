"""``halfbyte verify DIR``: check a run, a checkpoint or a merged model against what was recorded of it."""

import json
from pathlib import Path

from halfbyte.checkpoint import manifest, usable
from halfbyte.checkpoint.history import checkpoints, step_of
from halfbyte.commands.parser import Parser
from halfbyte.errors import UserError
from halfbyte.export import MERGE_RECORD
from halfbyte.files import read
from halfbyte.terminal.wording import say, shorten

_MOST = 1 << 26  # bytes of run.json that are read


def main(arguments: list[str]) -> int:
    """Print which parts of DIR are intact; return 1 if one is damaged."""
    parser = Parser("verify")
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="a run's output_dir, a checkpoint of it, or a merged model",
    )
    directory: Path = parser.parse(arguments).directory
    try:
        list(directory.iterdir())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot read {shorten(str(directory), 200)}: {reason}", option="halfbyte verify"
        ) from error
    if step_of(directory) is not None or (directory / manifest.NAME).exists():
        return 0 if _checkpoint(directory)[0] else 1
    if (listed := _listed(directory / MERGE_RECORD)) is not None:
        return 0 if _print_result("merged model", _problems(directory, listed)) else 1
    return _run(directory)


def _run(directory: Path) -> int:
    present = checkpoints(directory)
    listed = _listed(directory / "run.json")
    if not present and listed is None:
        raise UserError(
            f"{directory} is neither a checkpoint (no {manifest.NAME}) nor a run that has saved "
            f"one (no checkpoint-N, and no list of final files in run.json)",
            option="halfbyte verify",
        )
    results = [(path, *_checkpoint(path)) for path in present]
    final = True
    if listed is not None:
        final = _print_result("final weights", _problems(directory, listed))
    newest = next((path for path, sound, resumable in results if sound and resumable), None)
    if newest is not None:
        say(f"a resume starts from {newest.name}")
    elif present:
        say("no checkpoint can be resumed from")
    return 0 if final and all(sound for _, sound, _ in results) else 1


def _problems(directory: Path, listed: manifest.Listing) -> list[str]:
    """What of the listed files is not as it was written."""
    return [
        f"{name} {problem}"
        for name, entry in listed.items()
        if (problem := manifest.deviation(directory / name, entry)) is not None
    ]


def _listed(path: Path) -> manifest.Listing | None:
    """Return the files that were listed in ``path``, run.json or merge.json, or None if there are none."""
    try:
        listed = json.loads(read(path, _MOST))["files"]
        assert all(Path(name).name == name and {"size", "sha256"} <= listed[name].keys() for name in listed)
    except FileNotFoundError:
        return None
    except KeyError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, RecursionError):
        raise UserError(f"{path} is damaged", option="halfbyte verify") from None
    return dict(listed) or None


def _checkpoint(path: Path) -> tuple[bool, bool]:
    """Return whether ``path`` is intact, and whether it has what a resume needs."""
    found, problems = manifest.check(path)
    if found is not None and not problems and not found.finite:
        problems = ["its weights are not finite"]
    note = ""
    if found is not None and not found.resumable:
        note = " (weights only: it cannot be resumed from)"
    elif found is not None and not problems and (obstacles := usable.obstacles(path, found)):
        note = f" (it cannot be resumed from: {'; '.join(obstacles)})"
    return _print_result(f"{path.name}{note}", problems), not note


def _print_result(name: str, problems: list[str]) -> bool:
    say(f"{name}: {'damaged' if problems else 'ok'}", *(f"  {problem}" for problem in problems))
    return not problems
