"""``halfbyte doctor``: is this machine ready to train, and what would a launch file run on it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte import caches
from halfbyte.commands.parser import Parser
from halfbyte.terminal.wording import say

if TYPE_CHECKING:
    from halfbyte.plan.doctor import Check
    from halfbyte.plan.launch_file import Launch


def main(arguments: list[str]) -> int:
    """Print the checks; return 1 if one failed, or if the launch file would not run as it says."""
    parser = Parser("doctor")
    parser.add_argument(
        "--launch", type=Path, metavar="FILE", help="a file of launch/, or one of your own, to check as well"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse(arguments)
    caches.provide()
    from halfbyte.plan import doctor  # imports torch

    launch = doctor.inspect_launch(options.launch) if options.launch else None
    checks = doctor.checks()
    ok = all(check.ok for check in checks) and not (launch and launch.problems)
    if options.json:
        report = {
            "ok": ok,
            "checks": [asdict(check) for check in checks],
            "launch": asdict(launch) if launch else None,
        }
        say(json.dumps(report, indent=2))
    else:
        _print(checks, launch)
    return 0 if ok else 1


def _print(checks: "list[Check]", launch: "Launch | None") -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        advice = f"; {check.mend}" if check.mend else ""
        state = "WRONG" if not check.ok else "warn " if check.warn else "ok   "
        say(f"{state}  {check.name:<{width}}  {check.found}{advice}")
    if launch is None:
        return
    say(f"{'WRONG' if launch.problems else 'ok   '}  {launch.file}: {launch.runs}")
    for line in (*launch.problems, *launch.notes):
        say(f"       {line}")
