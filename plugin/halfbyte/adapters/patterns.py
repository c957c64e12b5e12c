"""Regular expressions in an adapter's configuration, tried in a process of their own: one may run for years."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from halfbyte.errors import UserError
from halfbyte.terminal.wording import shorten

_PLAIN = re.compile(r"[\w.-]*")
# The interpreter's own engine, ended by the kernel after 0.3 s of CPU time, however busy the machine is.
_TRIAL = """
import json, re, signal, sys, warnings
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_VIRTUAL, 0.3)
for pattern in patterns:
    print(json.dumps(pattern), flush=True)
    try:
        match = re.compile(pattern).fullmatch
    except (re.error, RecursionError, OverflowError) as error:
        sys.exit(str(error))
    for name in names:
        match(name)
"""


def check(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` if a pattern in ``fields`` is invalid, or takes over 0.3 s on ``model``'s names.

    ``fields`` are PEFT's: a text in ``target_modules`` or ``exclude_modules`` is a pattern for whole module paths, the
    keys of ``rank_pattern`` and ``alpha_pattern`` and ``layers_pattern`` for parts of them.
    """
    found: dict[str, str] = {}
    for field in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(field), str):
            found[fields[field]] = field
    for field in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        given = fields.get(field) or ()
        for part in [given] if isinstance(given, str) else given:
            found[rf"(.*\.)?({part})"] = field
    patterns = [pattern for pattern in found if not _PLAIN.fullmatch(pattern.removeprefix(r"(.*\.)?("))]
    if patterns:
        _try(patterns, found, [name for name, _ in model.named_modules()])


def _try(patterns: Sequence[str], fields: Mapping[str, str], names: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", _TRIAL],
        input=json.dumps([patterns, names]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    pattern = json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -signal.SIGVTALRM:
        problem = (
            "takes too long to match this model's module names: it tries them in exponentially many ways"
        )
    else:
        problem = f"is not a regular expression: {done.stderr.strip()}"
    raise UserError(f"the pattern {shorten(pattern, 100)!r} {problem}", option=fields[pattern])
