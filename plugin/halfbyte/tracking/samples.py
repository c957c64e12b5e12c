"""samples.jsonl: what the model made of `sample_prompts` while it was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.terminal.wording import plural, shorten
from halfbyte.tracking.rows import Row, RowsLog, read_rows

COLUMNS = ("step", "number", "prompt", "completion", "reference", "ended")
"""The keys of a row: ``number`` counts prompts from 1, ``ended`` is why the completion ends there.

``reference`` is the completion of a preference run's reference, where there is one.
"""

_SHOWN = 3  # prompts a round in the log
_PROMPT, _COMPLETION = 40, 80  # characters


class SamplesLog:
    """Append rounds of completions to ``samples.jsonl``, a round in one piece."""

    def __init__(self, path: Path) -> None:
        self._log = RowsLog(path)

    @property
    def rows(self) -> list[Row]:
        """All rows, those of the run that this one resumes among them."""
        return self._log.rows or read_rows(self._log.path)

    def append(self, rows: Sequence[Row]) -> None:
        self._log.append(*rows)

    def close(self) -> None:
        self._log.close()


def lines(rows: Sequence[Row], total_steps: int) -> list[str]:
    """What is printed of one round: the first few prompts, with the ends of what was asked."""
    found = []
    for row in rows[:_SHOWN]:
        asked = _quoted(_end(text_of(row["prompt"]), _PROMPT))
        found.append(
            f"step {row['step']}/{total_steps}  sample {row['number']}  {asked} -> "
            f"{_quoted(shorten(_flat(row['completion']), _COMPLETION))}"
        )
        if "reference" in row:
            found.append(f"  reference -> {_quoted(shorten(_flat(row['reference']), _COMPLETION))}")
    if (more := len(rows) - _SHOWN) > 0:
        found.append(f"  {plural(more, 'more sample')} in samples.jsonl")
    return found


def text_of(prompt: Any) -> str:
    """A prompt in one text: of a conversation each message after its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {_content(turn.get('content'))}" for turn in prompt)


def _content(content: Any) -> str:
    if isinstance(content, list):  # of parts
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else str(content)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _end(text: str, width: int) -> str:
    text = _flat(text)
    return text if len(text) <= width else f"...{text[3 - width :]}"


def _quoted(text: str) -> str:
    return f'"{text}"'
