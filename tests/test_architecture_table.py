"""The table of architectures: what is kept is what the README shows, and no row is a failure or a wrong number."""

import math

import pytest
from transformers import CONFIG_MAPPING

from halfbyte.errors import UserError
from tests import architecture_table as table
from tests import architectures


def test_the_readme_has_the_rows_that_are_kept() -> None:
    rows = table.kept()
    assert list(rows) == [name for name in architectures.DECODERS if name in rows]
    assert len(rows) >= 60
    assert table.README.read_text(encoding="utf-8") == table.written(rows.values())


@pytest.mark.parametrize("name", table.kept())
def test_a_row_trains_as_trl_does_or_says_why_not(name: str) -> None:
    row = table.kept()[name]
    assert name in CONFIG_MAPPING
    if "refused" in row:
        assert not any(word in row["refused"] for word in ("Traceback", "/tmp"))
        return
    assert row["share"] >= 0.95
    assert row["sft"] < 5e-5
    assert row["two"] < 1e-5
    assert isinstance(row["dpo"], str) or row["dpo"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_part_that_crashes_or_hangs_ends_alone() -> None:
    def refuse() -> table.Row:
        raise UserError("is not", option="this")

    assert table.result(table.apart(lambda: {"found": 1})) == {"found": 1}
    assert table.result(table.apart(refuse)) == {"refused": "this: is not"}
    assert "ZeroDivisionError" in table.result(table.apart(lambda: {"never": 1 / 0}))["failed"]
    assert "failed" in table.result(table.apart(lambda: __import__("signal").pause()), limit=0.0)
