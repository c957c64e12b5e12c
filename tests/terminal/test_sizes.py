"""Sizes and times, as they are written and read."""

import pytest

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


@pytest.mark.parametrize(
    ("seconds", "said"), [(12.4, "12 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (7200, "2.0 h")]
)
def test_a_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
