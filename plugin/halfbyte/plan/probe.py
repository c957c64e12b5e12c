"""A short measured probe: a few real steps of the run, in a process and a directory of their own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from halfbyte.errors import Halted

_STEPS = 6
_OFF = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": "false",
    "push_to_hub": "false",
    "load_best_model_at_end": "false",
    "report_to": "none",
    "logging_steps": 1,
    "disable_tqdm": "true",
}
# Not the probe's: it begins, and leaves nothing.
_NOT = {
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "sample_prompts",
    "sample_steps",
    "sample_max_new_tokens",
}


def tokens_per_second(recipe: str, options: list[str]) -> float:
    """Train ``recipe`` with ``options`` for a few steps; return the tokens that one process computed in a second.

    Raises :class:`Halted` with what the run said if it did not end well.
    """
    with tempfile.TemporaryDirectory() as scratch:
        own = {**_OFF, "max_steps": _STEPS, "output_dir": f"{scratch}/probe"}
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "halfbyte", recipe, *_without({*own, *_NOT}, options), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-6:])
            raise Halted(f"the probe failed:\n{said}")
        rate = json.loads((Path(scratch) / "probe" / "run.json").read_text(encoding="utf-8"))[
            "tokens_per_second"
        ]
    if rate is None:
        raise Halted("the probe measured no rate: this trainer does not count its tokens")
    return float(rate)


def _without(names: Collection[str], options: list[str]) -> list[str]:
    """The ``options`` but those of ``names``, with their values."""
    kept, inside = [], False
    for word in options:
        if word.startswith("--"):
            inside = word.removeprefix("--").partition("=")[0] in names
        if not inside:
            kept.append(word)
    return kept
