"""Whether a checkpoint can be resumed from: one definition for resumes, saves and ``halfbyte verify``.

Imports no library, so that `halfbyte verify` starts at once.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any

from halfbyte.checkpoint import manifest
from halfbyte.checkpoint.history import step_of
from halfbyte.checkpoint.manifest import Manifest
from halfbyte.files import read

STATE = "trainer_state.json"
# What the Trainer continues from.
_FIELDS: dict[str, Any] = {
    "global_step": int,
    "max_steps": int,
    "epoch": int | float,
    "num_train_epochs": int | float,
    "total_flos": int | float,
    "log_history": list,
    "stateful_callbacks": dict,
    "best_metric": int | float | None,
    "best_global_step": int | None,
}


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
    elif found.resumable and not _is_state(path / STATE, found):
        problems.append(f"its {STATE} is not that of a run at step {found.step}")
    return problems


def _absent_state(path: Path, found: Manifest) -> str | None:
    """What of the training state a checkpoint lacks, or None: optimizer, schedule, the Trainer's, generators."""
    single = found.world_size == 1
    generators = ("rng_state.pth" if single else f"rng_state_{rank}.pth" for rank in range(found.world_size))
    # DeepSpeed, which leaves `latest`, may keep the schedule in its own state.
    schedule = [] if (path / "latest").is_file() else ["scheduler.pt"]
    for name in chain((STATE, *schedule), generators):
        if not (path / name).is_file():
            return name
    # One file, FSDP2's directory of shards, or DeepSpeed's, which is named after the step.
    states = ("optimizer.pt", "optimizer.bin", "optimizer_0", f"global_step{found.step}")
    return None if any((path / name).exists() for name in states) else "optimizer.pt"


def _is_state(path: Path, found: Manifest) -> bool:
    """Whether ``path`` is a state that the Trainer can continue from: of the manifest's step, its fields typed."""
    try:
        state = json.loads(read(path))
        fields = {name: state[name] for name in _FIELDS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    typed = all(isinstance(fields[name], kinds) for name, kinds in _FIELDS.items())
    return (
        typed
        and fields["global_step"] == found.step
        and all(isinstance(row, dict) for row in fields["log_history"])
    )
