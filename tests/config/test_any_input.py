"""Whatever the input, it is read or refused with a short UserError, and no file is made."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import ModelConfig, SFTConfig
from trl.scripts.utils import DatasetMixtureConfig

from halfbyte.config import RunArguments, read
from halfbyte.errors import UserError

CLASSES = (RunArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
KEYS = [
    *(
        "seed",
        "learning_rate",
        "lora_target_modules",
        "model_init_kwargs",
        "datasets",
        "report_to",
        "packing",
    ),
    *(
        "debug",
        "parallelism_config",
        "deepspeed",
        "liger_kernel_config",
        "optim",
        "max_length",
        "config",
        "env",
    ),
]
SCALARS = st.one_of(
    st.sampled_from(
        ["null", "~", "true", "no", "1", "-1", "2e-4", ".nan", "1e999", "0x1F", "{", "[", "1:30"]
    ),
    st.sampled_from(['{"a":1}', "'", '"', "[1,[2]]", "&a", "*a", "!!int", "|", "%"]),
    st.sampled_from(["{a: {b: ~}}", "- path: x", "&a 1", "!!int 1", "? a", ""]),
    st.text(max_size=20),
)
LINES = st.lists(
    st.tuples(st.sampled_from(KEYS), st.sampled_from([": ", ":\n  ", ": - "]), SCALARS), max_size=4
)
YAML = st.one_of(st.text(max_size=80), LINES.map(lambda rows: "\n".join("".join(row) for row in rows)))
OPTIONS = [*(f"--{key}" for key in KEYS), "--seed=3", "--", "-h", "--no_packing", "--=", "-1", "--config=."]
WORDS = st.lists(st.one_of(st.sampled_from(OPTIONS), SCALARS), max_size=5)
QUIET = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(*argv: str) -> str:
    """The words of a refusal, or nothing where the input was read or the help printed."""
    try:
        json.dumps(read(argv, CLASSES, prog="halfbyte sft").resolved())
    except UserError as error:
        return str(error)
    except SystemExit as stop:
        return "" if stop.code == 0 else "stopped"
    return ""


@QUIET
@given(YAML)
def test_any_yaml_is_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    message = outcome("--config", "run.yaml")
    assert not message or message.startswith("run.yaml")
    assert len(message.splitlines()) <= 10
    assert os.listdir() == ["run.yaml"]


@QUIET
@given(WORDS)
def test_any_command_line_is_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = outcome(*argv)
    assert message != "stopped"
    assert len(message.splitlines()) <= 10
    assert os.listdir() == []
