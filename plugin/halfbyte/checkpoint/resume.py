"""Where a run resumes from: the newest checkpoint that verifies, and why others were skipped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from halfbyte import distributed
from halfbyte.checkpoint import changes, history, usable
from halfbyte.checkpoint.manifest import Manifest
from halfbyte.errors import UserError

_SHOWN = 6


@dataclass(frozen=True)
class Resume:
    """The decision of rank 0, the same on every rank.

    ``path`` is the checkpoint, None to begin at step 0; ``wanted`` says whether a resume was requested;
    ``lines`` are to be printed: what was found and what was skipped, and why.
    """

    wanted: bool = False
    path: str | None = None
    manifest: Manifest | None = None
    lines: tuple[str, ...] = ()

    def changes(self, now: Mapping[str, Any], allowed: Sequence[str] | None, strategy: str) -> list[str]:
        """Compare ``now`` with what the checkpoint was made with; see :func:`halfbyte.checkpoint.changes.compare`."""
        fixed = changes.fixed(strategy, now, self.manifest)
        return changes.compare(self.manifest, self.path, allowed, now, fixed)

    def require_usable(self, output_dir: str, *, overwrite: bool, inputs: Iterable[str] = ()) -> None:
        """Raise :class:`UserError` on every rank if this run may not write into ``output_dir``.

        With ``overwrite`` what is there is moved aside: an earlier run only, and never what holds one of ``inputs``.
        """
        problem = self.problem(output_dir, overwrite=overwrite)
        if problem is None and overwrite:
            problem = history.not_to_be_moved(Path(output_dir), inputs)
        if (problem := distributed.agree(problem)) is not None:
            raise UserError(problem, option="output_dir")

    def problem(self, output_dir: str, *, overwrite: bool) -> str | None:
        """Why this run may not write into ``output_dir``, or None."""
        directory = Path(output_dir)
        if directory.exists() and not directory.is_dir():
            return f"{directory} is a file; name a directory"
        used = directory.is_dir() and any(directory.iterdir())
        if used and self.wanted and (reason := history.unreadable(directory)) is not None:
            return reason
        if not used or self._inside(directory) or (overwrite and self.path is None):
            return None
        if self.path is not None:
            return (
                f"{directory} is not empty and {self.path} is not in it; choose a new directory for "
                f"this continuation, or continue the run in {directory} with `--resume_from_checkpoint auto`"
            )
        if self.wanted:
            if history.holds_a_run(directory):
                return None
            return f"{directory} is not empty and holds no run to continue; choose another"
        return (
            f"{directory} is not empty; choose another, continue it with "
            f"`--resume_from_checkpoint auto`, or move it aside with `--overwrite_output_dir`"
        )

    def prepare(self, output_dir: str) -> list[str]:
        """Set aside what lies after the checkpoint in ``output_dir``; on rank 0. Returns lines to print."""
        directory = Path(output_dir)
        if self.path is not None:
            assert self.manifest is not None
            return history.cut(directory, self.manifest.step) if self._inside(directory) else []
        return history.cut(directory, None) if self.wanted else []

    def _inside(self, directory: Path) -> bool:
        return self.path is not None and Path(self.path).resolve().parent == directory.resolve()


def find(output_dir: str, wanted: str | bool | None) -> Resume:
    """Decide where to resume from: ``wanted`` is a path, or ``auto`` (TRL's ``true``) for the newest that verifies.

    Raises :class:`UserError` on every rank: the path named fails verification, or there are checkpoints and all fail.
    """
    word = str(wanted).lower()
    if wanted is None or word in ("false", "none", ""):
        return Resume()
    answer: Resume | UserError = Resume()
    if PartialState().is_main_process:
        try:
            answer = _newest(Path(output_dir)) if word in ("true", "auto") else _named(Path(str(wanted)))
        except UserError as error:
            answer = error
    answer = distributed.agree(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def _named(path: Path) -> Resume:
    found, problems = usable.check(path)
    if problems:
        raise UserError(
            f"{path} failed verification: {_joined(problems)}; "
            f"`--resume_from_checkpoint auto` looks for the newest that passes",
            option="resume_from_checkpoint",
        )
    return Resume(True, str(path), found, (f"resuming from {path}",))


def _newest(output_dir: Path) -> Resume:
    lines: list[str] = []
    present = history.checkpoints(output_dir)
    for path in present:
        found, problems = usable.check(path)
        if not problems:
            return Resume(True, str(path), found, (*lines, f"resuming from {path}"))
        lines.append(f"skipped {path.name}: {_joined(problems)}")
    if not present:
        return Resume(True, None, None, ("resume_from_checkpoint: no checkpoint yet; starting from step 0",))
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more"]
    raise UserError(
        "\n".join(
            [
                f"no checkpoint in {output_dir} passes verification:",
                *(f"  {line}" for line in lines),
                "repair or remove them, or start over with `--overwrite_output_dir` and no resume",
            ]
        ),
        option="resume_from_checkpoint",
    )


def _joined(problems: list[str]) -> str:
    more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
    return "; ".join(problems[:2]) + more
