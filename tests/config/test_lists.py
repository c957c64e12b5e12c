"""Lists and mappings on the command line mean what they say, and the advice about them works when it is pasted."""

import json
import re
import subprocess
import sys

import pytest

from halfbyte.data.chat.template import _to_add
from halfbyte.plugin import QLoRAPlugin
from tests.config.reading import CLASSES, parse, refusal

OURS = (*CLASSES[:2], QLoRAPlugin, CLASSES[3])
TOKENS = "--additional_special_tokens"


def pasted(line: str) -> list[str]:
    """The words that bash makes of ``line``."""
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    script = f'run() {{ "{sys.executable}" -c \'{code}\' "$@"; }}\nrun {line}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        (f"{TOKENS} '[<doc>,</doc>]'", "additional_special_tokens", ["<doc>", "</doc>"]),
        (f"{TOKENS} '[<doc>, </doc>]'", "additional_special_tokens", ["<doc>", "</doc>"]),
        (f"{TOKENS}='[<doc>, </doc>]'", "additional_special_tokens", ["<doc>", "</doc>"]),
        (f"""{TOKENS} '["<doc>", "</doc>"]'""", "additional_special_tokens", ["<doc>", "</doc>"]),
        (f"""{TOKENS} "['<doc>', '</doc>']" """, "additional_special_tokens", ["<doc>", "</doc>"]),
        (f"{TOKENS} '<doc>' '</doc>'", "additional_special_tokens", ["<doc>", "</doc>"]),
        (f"{TOKENS} '[INST]' '[/INST]'", "additional_special_tokens", ["[INST]", "[/INST]"]),
        (f"{TOKENS} '[\"[INST]\"]'", "additional_special_tokens", ["[INST]"]),
        (f"{TOKENS} '[]'", "additional_special_tokens", []),
        (f"{TOKENS} '<doc>'", "additional_special_tokens", ["<doc>"]),
        (f"{TOKENS} null", "additional_special_tokens", None),
        (f"{TOKENS} '[yes,010]'", "additional_special_tokens", ["yes", "010"]),
        ("--lora_target_modules [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--lora_target_modules [q_proj,v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--lora_target_modules q_proj v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--lora_target_modules '[qv]_proj'", "lora_target_modules", ["[qv]_proj"]),
        ("--lora_target_modules '[qv]_proj' '[ko]_proj|[x]'", "lora_target_modules", ["[qv]_proj", "[ko]_proj|[x]"]),
        ("--report_to [wandb, tensorboard]", "report_to", ["wandb", "tensorboard"]),
        ("--report_to '[wandb]'", "report_to", ["wandb"]),
        ("--model_init_kwargs '{a: 1, b: [x, ~]}'", "model_init_kwargs", {"a": 1, "b": ["x", None]}),
        ("--model_init_kwargs {a: 1}", "model_init_kwargs", {"a": 1}),
        ("--model_init_kwargs '{\"a\": \"1\"}'", "model_init_kwargs", {"a": "1"}),
    ],
)  # fmt: skip
def test_a_list_or_a_mapping(line: str, key: str, value: object) -> None:
    assert parse(*pasted(line), classes=OURS)[key] == value


@pytest.mark.parametrize(
    "line", ["'[{path: a}, {path: b}]'", "'{path: a}' '{path: b}'", "[{path: a}, {path: b}]"]
)
def test_records(line: str) -> None:
    assert [part.path for part in parse(*pasted(f"--datasets {line}"), classes=OURS)["datasets"]] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{TOKENS} a {TOKENS} b", f"{TOKENS}: given twice"),
        ("--model_init_kwargs a=1", "must be a mapping, on the command line '{name: value}', is 'a=1'"),
        ("--model_init_kwargs '{a: 1, a: 2}'", "not valid JSON"),
        ("--datasets '[{path: a, pth: b}]'", "--datasets[0]: unknown key 'pth'; did you mean path?"),
        ("--report_to '[wandb, wandbb]'", "'wandbb' is not supported; did you mean wandb?"),
    ],
)
def test_refused(line: str, words: str) -> None:
    assert words in refusal(parse, *pasted(line), classes=OURS)


@pytest.mark.parametrize("text", ["[INST]", "[it's]", "[a b]", "[/INST]", "[$x]"])
def test_a_text_in_brackets_is_ambiguous_and_both_forms_of_the_advice_work(text: str) -> None:
    message = refusal(parse, TOKENS, text, classes=OURS)
    found = re.fullmatch(
        rf"{TOKENS}: .* is a text or a list of one; write ({TOKENS} .*) or ({TOKENS} .*)", message
    )
    assert found, message
    got = [parse(*pasted(line), classes=OURS)["additional_special_tokens"] for line in found.groups()]
    assert got == [[text], [text[1:-1]]]


@pytest.mark.parametrize(
    "tokens", [["<|a|>"], ["<doc>", "</doc>"], ["[INST]"], ["it's", 'a"b', "a\\b", "--x", "é"]]
)
def test_the_advice_to_add_tokens_works_in_a_file_and_in_a_shell(config, tokens: list[str]) -> None:
    in_a_file, in_a_shell = (line.strip() for line in _to_add(tokens).splitlines())
    assert config(in_a_file, classes=OURS)["additional_special_tokens"] == tokens
    got = parse(*pasted(in_a_shell.removeprefix("on the command line: ")), classes=OURS)
    assert got["additional_special_tokens"] == tokens
