"""No secret and no control character on the terminal, whoever prints and however the command ends."""

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.cli import main
from halfbyte.terminal import streams
from halfbyte.terminal.wording import say
from tests import packages, tiny

C = "CANARY9x7q"
URL = f"https://me:{C}@host/x"
FORGED = "\x1b]0;title\x07\x9b31m\x00\u202e\r"


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """``failing(code)``: the command of a recipe whose config class runs ``code`` when it is made."""

    def install(*code: str) -> list[str]:
        lines = [
            *("import dataclasses, logging, warnings, sys, threading", "from halfbyte import Recipe"),
            *("from trl import SFTConfig, SFTTrainer", "@dataclasses.dataclass", "class Config(SFTConfig):"),
            *("    def __post_init__(self):", *(f"        {line}" for line in code)),
            "recipe = Recipe(config=Config, trainer=SFTTrainer, summary='fails')",
        ]
        site = packages.write(
            tmp_path / "site", "leaking", {"leaking": "leaking:recipe"}, code="\n".join(lines)
        )
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "leaking", raising=False)
        return ["leaking", "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "run")]

    return install


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    "code",
    [
        [f"raise ValueError('cannot read {URL}')"],
        ["try:", f"    raise KeyError('{URL}')", "except KeyError as e:", "    raise OSError('hub') from e"],
        ["try:", f"    raise KeyError('{URL}')", "finally:", f"    {{}}['--hub_token={C}']"],
        [f"e = RuntimeError('x'); e.add_note('password={C}'); raise e"],
        [f"raise ExceptionGroup('{URL}', [ValueError('Bearer {C}')])"],
        [
            f"warnings.warn('using {URL}'); logging.getLogger('up.stream').error('using %s', '{URL}'); raise OSError"
        ],
        [f"print('{URL}'); sys.stderr.write('{URL}\\n'); print('{URL}', file=sys.stderr); raise OSError"],
        [f"t = threading.Thread(target=lambda: {{}}['{URL}']); t.start(); t.join(); raise OSError"],
        [f"from halfbyte.errors import UserError; raise UserError('{URL}', option='dataset_name')"],
        [f"from halfbyte.errors import Halted; raise Halted('{URL}')"],
    ],
    ids=range(10),
)
def test_however_a_command_ends(failing, capfd, code: list[str], debug: list[str]) -> None:
    assert main([*failing(*code), *debug]) in (1, 2)
    printed = capfd.readouterr()
    assert C not in printed.out + printed.err
    assert ("Traceback" in printed.err) >= bool(debug)


SECRETS = {
    "--dataset_name": f"https://{C}@host/rows.jsonl",
    "--model_name_or_path": "/nowhere/hf_" + "CANARY9x7q" * 3,
    "--adapter_name_or_path": f"https://host/a?sig={C}",
    "--chat_template_path": f"https://me:{C}@host/t.jinja",
    "--run_name": f"https://host/#access_token={C}",
    "--model_init_kwargs": f'{{"token": "{C}", ',
    "--hub_token": C,
    "--resume_from_checkpoint": f"/nowhere/?api_key={C}",
    "--accelerator_config": f'{{"proxy_password": "{C}"',
}


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize("option", SECRETS)
def test_an_option_with_a_secret_that_cannot_be_used(
    tmp_path: Path, capfd, option: str, debug: list[str]
) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(8))
    places = {
        "--output_dir": str(tmp_path / "run"),
        "--dataset_name": rows,
        "--model_name_or_path": str(tmp_path),
    }
    options = {**places, option: SECRETS[option]}
    assert main(["sft", *(word for pair in options.items() for word in pair), *debug]) != 0
    printed = capfd.readouterr()
    assert C not in printed.out + printed.err, printed.err
    config = tmp_path / "a.yaml"
    config.write_text("".join(f"{key[2:]}: {json.dumps(value)}\n" for key, value in options.items()))
    assert main(["sft", "--config", str(config), *debug]) != 0
    printed = capfd.readouterr()
    assert C not in printed.out + printed.err, printed.err


def test_a_module_run_as_a_command_is_clean_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "halfbyte", "sft", "--config", f"{tmp_path}/{URL}.yaml", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert C not in done.stdout + done.stderr


def test_control_characters_are_seen_and_not_obeyed(capsys, tmp_path: Path) -> None:
    say(f"row 3: {FORGED}")
    out = capsys.readouterr().out
    assert out == "row 3: \\x1b]0;title\\x07\\x9b31m\\x00\\u202e\\r\n"
    (tmp_path / f"checkpoint-1{FORGED[:3]}").mkdir()
    assert main(["verify", str(tmp_path / FORGED.replace("\0", ""))]) == 2
    assert main(["sft", "--config", f"no\x1b[31m{FORGED}.yaml"]) == 2
    assert main([f"sf\x1b[1m\udc80{FORGED}"]) == 2
    printed = capsys.readouterr()
    seen = printed.out + printed.err
    assert seen.count("]0;title") == 3
    assert not {c for c in seen if not c.isprintable()} - {"\n"}


def test_what_upstream_prints_keeps_its_bars_and_colors_only() -> None:
    sink = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", sink)
        patch.setattr(sys, "stderr", sink)
        with streams.clean():
            assert sys.stdout.encoding == sink.encoding
            print(f"\r 10%|# |\x1b[1A {FORGED} {URL}")
            Console(file=sys.stdout, force_terminal=True).print("[bold]loss[/bold]")
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn(URL, stacklevel=1)
            handler = logging.StreamHandler()
            handler.emit(logging.makeLogRecord({"msg": "at %s", "args": (URL,), "levelno": 40}))
        assert sys.stdout is sink
    text = sink.getvalue()
    assert text.startswith("\r 10%|# |\x1b[1A \\x1b]0;title\\x07")
    assert "\x1b[1mloss" in text
    assert C not in text
    assert "at https://***@host/x" in text
