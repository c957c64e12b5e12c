"""The READMEs, their fenced blocks, their commands and their tables."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / folder / "README.md" for folder in ("recipes", "launch", "plugin", "tests")),
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a README, with the line it starts at."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found: list[Block] = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        fences = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
        found += [Block(document, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in fences]
    return [block for block in found if not languages or block.language in languages]


def commands() -> Iterator[tuple[str, str]]:
    """Every command line with its place, continued lines joined."""
    for block in blocks("bash"):
        joined = block.text.replace("\\\n", "")
        yield from ((str(block), line) for line in joined.splitlines() if line and not line.startswith("#"))


def title(block: Block) -> str:
    """The file name that a block's first line gives."""
    found = re.match(r"# (\w+\.yaml)\n", block.text)
    assert found, f"{block}: the first line of a YAML block names its file"
    return found[1]


def prose() -> str:
    """The text of all READMEs without their fenced blocks."""
    texts = (document.read_text(encoding="utf-8") for document in DOCUMENTS)
    return "\n".join(re.sub(r"^```(?:.*\n)*?```$", "", text, flags=re.MULTILINE) for text in texts)


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)
