"""Odd files: the value that was written, or a refusal that names the line; never another value, never a traceback."""

from pathlib import Path

import pytest

from halfbyte.config import Settings
from halfbyte.config.sources import MAX_DEPTH
from halfbyte.plugin import QLoRAPlugin
from tests.config.reading import CLASSES, refusal

OURS = (*CLASSES[:2], QLoRAPlugin, CLASSES[3])


class Refused(str):
    """Words of the refusal, after the line it names."""


VALUES = [
    ("seed: 1_000", 1000),
    ("seed: '3'", 3),
    ("seed: +3", 3),
    ("seed: 0x10", Refused("run.yaml:1: seed: must be a whole number, is '0x10'")),
    ("seed: 0o10", Refused("run.yaml:1: seed: must be a whole number")),
    ("seed: 010", Refused("run.yaml:1: seed: must be a whole number")),
    ("seed: 3.0", Refused("run.yaml:1: seed: must be a whole number")),
    ("seed: 1e3", Refused("run.yaml:1: seed: must be a whole number")),
    ("seed: \uff13", Refused("run.yaml:1: seed: must be a whole number")),
    ("seed: 1:30", Refused("run.yaml:1: seed: must be a whole number")),
    ("seed: ${SEED}", Refused("run.yaml:1: seed: must be a whole number")),
    ("seed: {{seed}}", Refused("run.yaml:1: a key must be a name")),
    ("seed: ~", Refused("run.yaml:1: seed: must be a whole number, is null")),
    ("seed:", Refused("run.yaml:1: seed: must be a whole number, is null")),
    ("learning_rate: .5", 0.5),
    ("learning_rate: 5.", 5.0),
    ("learning_rate: 1e5", 1e5),
    ("learning_rate: 1E-5", 1e-5),
    ("learning_rate: 1_000.5", 1000.5),
    ("learning_rate: 010", Refused("run.yaml:1: learning_rate: must be a number, is '010'")),
    ("learning_rate: 00.5", Refused("run.yaml:1: learning_rate: must be a number")),
    ("learning_rate: 0x1p3", Refused("run.yaml:1: learning_rate: must be a number")),
    ("learning_rate: 1,000", Refused("run.yaml:1: learning_rate: must be a number")),
    ("learning_rate: nan", Refused("run.yaml:1: learning_rate: must be a finite number")),
    ("learning_rate: -.inf", Refused("run.yaml:1: learning_rate: must be a finite number")),
    ("learning_rate: 1e300000", Refused("run.yaml:1: learning_rate: must be a finite number")),
    ("packing: off", False),
    ("packing: \"no\"", False),
    ("packing: TRUE", True),
    ("packing: 1.0", Refused("run.yaml:1: packing: must be true or false")),
    ("fast: off", Refused("run.yaml:1: fast: 'off' is not supported; write one of auto, none")),
    ("fast: false", Refused("run.yaml:1: fast: 'false' is not supported")),
    ("fast: none", "none"),
    ("memory_budget: 20", "20"),
    ("warmup_steps: 10.0", 10),
    ("warmup_steps: 10.5", Refused("run.yaml:1: warmup_steps: must be a whole number of steps, or a share")),
    ("save_steps: 1.5", Refused("run.yaml:1: save_steps: must be a whole number of steps, or a share")),
    ("logging_steps: 2.5", Refused("run.yaml:1: logging_steps: must be a whole number of steps")),
    *((f"run_name: {text}", text) for text in ("2026-01-01", "010", "1e5", "0x10", "yes", "off", "None", "1:30")),
    ("run_name: 'null'", "null"),
    ("run_name: ~", None),
    ("run_name: a#b", "a#b"),
    ("run_name: a # b", "a"),
    ("run_name: 'it''s'", "it's"),
    ("run_name: |\n  a\n  b\n", "a\nb\n"),
    ("run_name: " + "x" * 300_000, "x" * 300_000),
    ("run_name: a\u2028b: c", Refused("run.yaml:")),
    ("run_name: a: b", Refused("run.yaml:1: not valid YAML")),
    ("run_name: @x", Refused("run.yaml:1: not valid YAML")),
    ("run_name: [a, b]", Refused("run.yaml:1: run_name: must be text or null, is a list of 2")),
    ("run_name: ${USER}-1", Refused("run.yaml:1: run_name: '${USER}-1': variables are not expanded in a file")),
    ("output_dir: ${HOME}/x", Refused("run.yaml:1: output_dir: '${HOME}/x': variables are not expanded")),
    ("output_dir: $HOME/x", Refused("run.yaml:1: output_dir: '$HOME/x': variables are not expanded")),
    ("datasets:\n- path: ${DATA}", Refused("run.yaml:2: datasets[0].path: '${DATA}': variables")),
    ("output_dir: a$5", "a$5"),
    ("model_init_kwargs: {a: 1_0, b: .5, c: off, d: 'off', e: n, f: 2026-01-01, g: '010'}",
     {"a": 10, "b": 0.5, "c": False, "d": "off", "e": "n", "f": "2026-01-01", "g": "010"}),
    ("model_init_kwargs: {a: 010}", Refused("run.yaml:1: model_init_kwargs.a: '010': write a decimal number")),
    ("model_init_kwargs:\n  a:\n    b: 0x10", Refused("run.yaml:3: model_init_kwargs.a.b: '0x10': write a decimal")),
    ("additional_special_tokens: [<doc>,</doc>]", ["<doc>", "</doc>"]),
    ("additional_special_tokens: [yes, 010, 1.10]", ["yes", "010", "1.10"]),
    ("additional_special_tokens: '[INST]'", ["[INST]"]),
    ("additional_special_tokens: [a, null]", Refused("run.yaml:1: additional_special_tokens[1]: must be text")),
    ("lora_target_modules:\n- q\n- v", ["q", "v"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES, ids=[text[:40] for text, _ in VALUES])
def test_a_value(config, text: str, value: object) -> None:
    key = text.partition(":")[0]
    if isinstance(value, Refused):
        assert refusal(config, text, classes=OURS).startswith(value)
    else:
        got = config(text, classes=OURS)[key]
        assert (got, type(got)) == (value, type(value))


FILES = [
    (b"\xef\xbb\xbfseed: 3", 3),
    (b"seed: 3\r\nlora_r: 2\r\n", 3),
    (b"seed: 3\rlora_r: 2\r", 3),
    (b"seed: 3\n...\n", 3),
    (b"%YAML 1.1\n---\nseed: 3", 3),
    (b'{"seed": 3, "lora_r": 2}', 3),
    (b"seed: &x 3", 3),
    (b"'seed' : 3", 3),
    (b"", 42),
    (b"null", 42),
    (b"\n# nothing\n", 42),
    (b"lora_r: 2\n\tseed: 3", "run.yaml:2: not valid YAML: a tab; indent with spaces"),
    (b"seed: 3\t", "run.yaml:1: not valid YAML: a tab"),
    ("seed: 3\n".encode("utf-16"), "run.yaml:1: not UTF-8 text"),
    ("lora_r: 2\nseed: 3\n".encode("utf-16-le"), "run.yaml:1: not valid YAML: the character U+0000"),
    ("seed: 3\n".encode("utf-32"), "run.yaml:1: not UTF-8 text"),
    ("seed: 3\nrun_name: é".encode("latin-1"), "run.yaml:2: not UTF-8 text"),
    (b"seed: 3\nrun_name: a\0b", "run.yaml:2: not valid YAML: the character U+0000"),
    (b"seed: 3\n\nrun_name: a\x7fb", "run.yaml:3: not valid YAML: the character U+007F"),
    (b"<<: {seed: 1}", "run.yaml:1: <<: unknown option"),
    (b"lora_r: &x 1\n<<: *x", "run.yaml:2: aliases (*name) are not supported"),
    (b"a: &a [1]\nb: &b [*a,*a]\nc: &c [*b,*b]", "run.yaml:2: aliases (*name) are not supported"),
    (b"seed: 1\n---\nseed: 2", "run.yaml:2: not valid YAML"),
    (b"- seed: 1", "run.yaml:1: must be a list of `key: value` lines, is a list"),
    (b"seed = 3", "run.yaml:1: must be a list of `key: value` lines, is a single value"),
    (b"seed:3", "run.yaml:1: must be a list of `key: value` lines"),
    (b"[training]\nseed = 3", "run.yaml:2: not valid YAML"),
    (b"training:\n  seed: 3", "run.yaml:1: training: unknown option"),
    (b"1: 2", "run.yaml:1: 1: unknown option"),
    (b"true: 2", "run.yaml:1: true: unknown option"),
    (b"? [a, b]\n: 1", "run.yaml:1: a key must be a name, is a list"),
    (b"SEED: 3", "run.yaml:1: SEED: unknown option; did you mean seed?"),
    (b"--seed: 3", "run.yaml:1: --seed: unknown option"),
    (b"seed: !!int '3'", "run.yaml:1: tag:yaml.org,2002:int: tags are not supported"),
    (b"!!python/object/apply:os.system [ls]", "run.yaml:1: tag:yaml.org,2002:python/object/apply:os.system: tags"),
    (b"seed: !include x.yaml", "run.yaml:1: !include: tags are not supported"),
    (b"model_init_kwargs:\n  a:\n    b: 1\n    b: 2", "run.yaml:4: b: given twice (first at run.yaml:3)"),
    (b"datasets:\n  - path: a\n    columns: [x]\n    columns: [y]", "run.yaml:4: columns: given twice"),
    (b"a: " + b"{a: " * 3000, f"run.yaml:1: nested more than {MAX_DEPTH} levels"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "outcome"), FILES, ids=[repr(content)[:40] for content, _ in FILES])
def test_a_file(config, content: bytes, outcome: int | str) -> None:
    if isinstance(outcome, str):
        assert refusal(config, content, classes=OURS).startswith(outcome)
        return
    got: Settings = config(content, classes=OURS)
    assert got["seed"] == outcome
    assert Path("run.yaml").read_bytes() == content
