"""Whether a checkpoint can be resumed from: one definition for resumes, saves and ``halfbyte verify``.

Imports no library, so that `halfbyte verify` starts at once.
"""

from pathlib import Path

from halfbyte.checkpoint import manifest
from halfbyte.checkpoint.history import step_of
from halfbyte.checkpoint.manifest import Manifest


def is_usable(path: Path) -> bool:
    """Whether the checkpoint ``path`` can be resumed from."""
    return not check(path)[1]


def check(path: Path) -> tuple[Manifest | None, list[str]]:
    """Return the manifest of ``path``, and why it cannot be resumed from: damage, or what it never held."""
    found, problems = manifest.check(path)
    if path.is_symlink():
        problems = ["it is a link", *problems]
    if found is not None and not problems:
        problems = obstacles(path, found)
    return found, problems


def obstacles(path: Path, found: Manifest) -> list[str]:
    """Why the checkpoint ``path``, whose files are as its manifest ``found`` lists them, cannot be resumed from."""
    problems = []
    if not found.resumable:
        problems.append("it was saved with save_only_model, without the optimizer")
    if not found.finite:
        problems.append("its weights are not finite")
    if found.step != step_of(path) and step_of(path) is not None:
        problems.append(f"its manifest is that of checkpoint-{found.step}: it was renamed or copied")
    if found.resumable and (absent := _absent_state(path, found)):
        problems.append(f"it holds no {absent}, without which a resume would start over silently")
    return problems


def _absent_state(path: Path, found: Manifest) -> str | None:
    """What of the training state a checkpoint lacks, or None: optimizer, schedule, the Trainer's, generators."""
    generators = ["rng_state.pth"] if found.world_size == 1 else []
    generators += [f"rng_state_{rank}.pth" for rank in range(found.world_size) if found.world_size > 1]
    # DeepSpeed, which leaves `latest`, may keep the schedule in its own state.
    schedule = [] if (path / "latest").is_file() else ["scheduler.pt"]
    for name in ("trainer_state.json", *schedule, *generators):
        if not (path / name).is_file():
            return name
    # One file, FSDP2's directory of shards, or DeepSpeed's, which is named after the step.
    states = ("optimizer.pt", "optimizer.bin", "optimizer_0", f"global_step{found.step}")
    return None if any((path / name).exists() for name in states) else "optimizer.pt"
