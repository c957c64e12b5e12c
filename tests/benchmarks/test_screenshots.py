"""The pictures of launch/README.md: small, one for each command, and without a path of the machine they come from."""

import html
import re
from xml.etree import ElementTree

import pytest

from tests.benchmarks import plans, screenshots


@pytest.mark.parametrize("name", screenshots.COMMANDS)
def test_a_picture_is_of_its_command(name: str) -> None:
    path = screenshots.PICTURES / f"{name}.svg"
    text = path.read_text(encoding="utf-8")
    assert len(text) < 60_000
    shown = "".join(ElementTree.fromstring(text).itertext())
    command, _ = screenshots.COMMANDS[name]
    assert f"$ halfbyte {command}" in html.unescape(shown).replace("\xa0", " ")
    assert not re.search(r"/tmp|/home|/root|site-packages|https?://(?!www\.(w3|textualize)\.)", text)
    assert f"tests/benchmarks/pictures/{name}.svg" in plans.README.read_text(encoding="utf-8")


def test_a_picture_of_colored_text(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(screenshots, "PICTURES", tmp_path)
    screenshots.draw("any", "plain \x1b[1;32mgreen\x1b[0m")
    text = (tmp_path / "any.svg").read_text()
    assert "font-face" not in text
    assert "font-weight: bold" in text
