"""Sizes and times, as they are written and read."""

import pytest

from halfbyte.errors import UserError
from halfbyte.export.shards import most_bytes
from halfbyte.terminal.wording import duration, size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 2**30), ("800MB", 800 * 10**6), ("1.5 gb", 1.5e9), ("40KB", 40_000), ("2TiB", 2**41),
        ("12", None), ("12G", None), ("-1GB", None), ("GB", None), ("", None),
    ],
)  # fmt: skip
def test_a_size_has_a_unit(text: str, size: float | None) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("256MiB", 2**28), ("2000000", 2_000_000)])
def test_the_size_of_a_file_may_be_a_plain_number_of_bytes(text: str, size: int) -> None:
    assert most_bytes(text) == size


@pytest.mark.parametrize("text", ["0", "0GB", "-5", "5G", "many", ""])
def test_what_is_no_size_of_a_file(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        most_bytes(text)


@pytest.mark.parametrize(
    ("seconds", "said"), [(12.4, "12 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (7200, "2.0 h")]
)
def test_a_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
