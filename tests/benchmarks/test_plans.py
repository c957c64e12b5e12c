"""The table of launch/README.md is what the memory model says."""

from tests.benchmarks import plans


def test_the_table_is_current() -> None:
    text = plans.README.read_text(encoding="utf-8")
    shape = plans.SHAPES[0]
    model = plans.planned(shape)
    for cells in (plans.cells(model), plans.durations(model)):
        assert f"| {shape.name} | {' | '.join(cells)} |" in text
    assert all(text.count(f"| {each.name} |") == 2 for each in plans.SHAPES)
