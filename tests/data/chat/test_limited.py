"""Templates that would hang a run or take all memory are refused by name before they render anything here."""

import time
from pathlib import Path

import pytest
from trl import SFTConfig

from halfbyte.cli import main
from halfbyte.data import prepare_tokenizer
from halfbyte.data.chat import limited
from halfbyte.errors import UserError
from tests import tiny
from tests.data.chat.test_delimiters import DEEPSEEK, GEMMA, LLAMA2, QWEN3

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": LOOP,
    "loops in a macro": "{% macro f() %}" + LOOP + "{% endmacro %}{{ f() }}",
    "loops in a condition": "{% if messages | length > 3 %}" + LOOP + "{% endif %}",
    "loops over a list": "{% set l = range(99999) | list %}{% for i in l %}{% for j in l %}{% endfor %}{% endfor %}",
    "a power": "{{ (9 ** 387420489) % 7 }}",
}
ENORMOUS = {
    "a product": "{{ 'a' * 10**10 }}",
    "a list": "{{ [0] * 10**9 }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "printed": "{% for i in range(99999) %}{% for j in range(999) %}{{ 'a' * 99 }}{% endfor %}{% endfor %}",
    "printed in marks": "{% generation %}{% for i in range(999) %}{{ 'a' * 99999 }}{% endfor %}{% endgeneration %}",
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 1)
    limited.excess.cache_clear()


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_does_not_end(kind: str) -> None:
    started = time.monotonic()
    assert limited.excess(tiny.CHAT_TEMPLATE + ENDLESS[kind]) == "runs for more than 1 s"
    assert time.monotonic() - started < 12


@pytest.mark.parametrize("kind", ENORMOUS)
def test_a_template_that_takes_all_memory_or_prints_without_end(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow machine takes more than a second to fill the memory, and would name its time.
    monkeypatch.setattr(limited, "SECONDS", 60)
    found = limited.excess(tiny.CHAT_TEMPLATE + ENORMOUS[kind])
    assert found in ("takes more than 1 GiB of memory", "prints more than 16,777,216 characters"), found


@pytest.mark.parametrize(
    "template",
    [tiny.CHAT_TEMPLATE, QWEN3, DEEPSEEK, GEMMA, LLAMA2, "{{ nothing.there }}", "{% if %}", "{{ 1 / 0 }}"],
)
def test_other_templates_pass_whatever_they_say(template: str) -> None:
    assert limited.excess(template) is None


def test_the_template_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "endless.jinja"
    file.write_text(ENORMOUS["a product"])
    tiny.save_model(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(8))
    options = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", rows]
    options += ["--output_dir", str(tmp_path / "out"), "--chat_template_path", str(file)]
    assert main(["sft", *options]) == 2
    assert f"{file}: its chat template takes more than 1 GiB of memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    tiny.tokenizer(chat_template=ENORMOUS["a product"]).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=f"{tmp_path / 'base'}: its chat template takes"):
        prepare_tokenizer(
            str(tmp_path / "base"), training=SFTConfig(str(tmp_path / "o"), use_cpu=True, bf16=False)
        )
