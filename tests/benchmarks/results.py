"""RESULTS.md: sections under headings, each replaced on its own, so that what a person wrote in others stays."""

import re
from pathlib import Path

from tests.benchmarks.workload import CASES

FILE = Path(__file__).with_name("RESULTS.md")
EMULATED = ", without native bf16"
OVERHEAD = "## Outside the steps"
PREPARATION = "## Before the first step"
SCHEMES = "### The order of schemes"
METHODS = "### QLoRA, LoRA and full fine-tuning"
MEMORY = "## Memory, predicted and measured"
EXPERTS = "## Loading experts"
ORDER = (
    "## The machine",
    "## The cases",
    *(f"### {case.name}{suffix}" for suffix in ("", EMULATED) for case in CASES),
    OVERHEAD,
    PREPARATION,
    MEMORY,
    EXPERTS,
    SCHEMES,
    METHODS,
)


def write(*sections: str) -> None:
    """Put ``sections`` into RESULTS.md."""
    text = FILE.read_text(encoding="utf-8")
    for section in sections:
        text = replaced(text, section)
    FILE.write_text(text, encoding="utf-8")


def replaced(text: str, section: str) -> str:
    """``text`` with ``section`` in the place of the one with its heading, else after those that ORDER puts first."""
    parts = re.split(r"(?m)^(?=#{1,3} )", text)
    headings = [part.split("\n", 1)[0] for part in parts]
    heading = section.split("\n", 1)[0]
    section = section.strip() + "\n"
    if heading in headings:
        at = headings.index(heading)
        section += "\n" * (at + 1 < len(parts))
        return "".join([*parts[:at], section, *parts[at + 1 :]])
    before = ORDER[: ORDER.index(heading)]
    at = 1 + max((i for i, each in enumerate(headings) if each in before), default=len(parts) - 1)
    section = "\n" + section if at == len(parts) else section + "\n"
    return "".join([*parts[:at], section, *parts[at:]])
