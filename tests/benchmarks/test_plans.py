"""The table of launch/README.md is what the memory model says."""

from tests.benchmarks import plans


def test_the_table_is_current() -> None:
    text = plans.README.read_text(encoding="utf-8")
    shape = plans.SHAPES[0]
    assert f"| {shape.name} | {' | '.join(plans.cells(shape))} |" in text
    assert all(f"| {each.name} |" in text for each in plans.SHAPES)
