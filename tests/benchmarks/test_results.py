"""RESULTS.md: what a run rewrites, and what it leaves."""

from pathlib import Path

import pytest

from tests.benchmarks import report, results, steps
from tests.benchmarks.variants import Step
from tests.benchmarks.workload import Case

PAGE = """\
# SFT steps

By hand,   with odd  spaces.

## The machine

- here

## The cases

### lognormal

old

### by hand

| kept |

### fixed 512

old too

## Outside the steps

by hand

## What this does not show

- much
"""


def test_a_section_replaces_its_like_and_no_other() -> None:
    text = results.replaced(PAGE, "### lognormal\n\nnew\n\n\n")
    assert text == PAGE.replace("old\n", "new\n", 1)
    assert results.replaced(text, "### lognormal\n\nnew") == text
    assert results.replaced(PAGE, results.OVERHEAD + "\n\nnew") == PAGE.replace("\nby hand\n", "\nnew\n")
    last = "### fixed 512\n\nold too\n"
    cut = PAGE[: PAGE.index(last) + len(last)]
    assert results.replaced(cut, "### fixed 512\n\nnew") == cut.replace("old too", "new")


def test_a_new_section_lands_in_order() -> None:
    emulated = f"### lognormal{results.EMULATED}\n\nnew\n"
    new = "### lognormal, H 1024\n\nnew\n"
    text = results.replaced(results.replaced(PAGE, emulated), new)
    assert text == PAGE.replace("## Outside", f"{new}\n{emulated}\n## Outside")
    empty = PAGE.replace("### lognormal\n\nold\n\n", "").replace("### fixed 512\n\nold too\n\n", "")
    assert results.replaced(empty, new) == empty.replace("### by hand", f"{new}\n### by hand")
    assert results.replaced("# Title\n", new) == f"# Title\n\n{new}"


def test_a_cut_run_leaves_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text(PAGE, encoding="utf-8")

    def measure(case: Case, *rest: object) -> list[report.Line]:
        if case.name == "fixed 512":
            raise KeyboardInterrupt
        names = ("TRL float32, checkpointing", "halfbyte float32")
        return [report.Line(name, [Step(1.0, 1.0, 10)], 0.0, 0.0, 1.0, "") for name in names]

    monkeypatch.setattr(results, "FILE", file)
    monkeypatch.setattr(steps, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["--quick", "--repeats", "1", "--write"]
    with pytest.raises(KeyboardInterrupt):
        steps.run(steps.parse(words), words, tmp_path)
    text = file.read_text(encoding="utf-8")
    begin, end = text.index("### lognormal"), text.index("### by hand")
    assert f"By `python -m tests.benchmarks.sft {' '.join(words)}` at " in text[begin:end]
    rest = text[:begin] + text[end:]
    assert rest == PAGE.replace("### lognormal\n\nold\n\n", "")
