import json
from pathlib import Path

import pytest

from halfbyte.tracking import redact


@pytest.mark.parametrize(
    "name", ["hub_token", "WANDB_API_KEY", "clientSecret", "password", "push-to-hub-token", "tokenizer_key"]
)
def test_secret_names_at_any_depth(name: str) -> None:
    value = {"a": [{"b": {name: "CANARY"}}], name: {"deep": ["CANARY", 3]}}
    assert redact(value) == {"a": [{"b": {name: "***"}}], name: {"deep": ["***", 3]}}


def test_harmless_values_are_kept() -> None:
    value = {
        "eos_token": "<|im_end|>",
        "tokenizer_name_or_path": "base",
        "include_num_input_tokens_seen": "no",
        "max_tokens_per_batch": 4096,
        "average_tokens_across_devices": True,
        "hub_token": None,
        "token": "",
        "tokens_per_second": 12.5,
        "learning_rate": 2e-4,
    }
    assert redact(value) == value


def test_json_in_a_string() -> None:
    assert json.loads(redact({"kwargs": json.dumps({"x": {"token": "CANARY"}})})["kwargs"]) == {
        "x": {"token": "***"}
    }
    untouched = '{"a":  1}'
    assert redact({"kwargs": untouched}) == {"kwargs": untouched}


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 11,
        "sk-" + "aB3" * 11,
        "0a" * 20,
        "wandb_v1_" + "aB3" * 11,
        "ghp_" + "aB3" * 12,
    ],
)
def test_shapes_of_secrets_in_any_string(secret: str) -> None:
    clean = redact({"notes": [f"use {secret}."], secret: 1})
    assert secret not in json.dumps(clean)
    assert clean["notes"] == ["use ***."]


def test_hashes_are_kept_where_a_hash_belongs() -> None:
    value = {"model_revision": "0a" * 20, "sha": "0a" * 32, "commit": "0a" * 20}
    assert redact(value) == value
    assert redact({"sha": "hf_" + "a" * 30}) == {"sha": "***"}


def test_urls_lose_their_passwords() -> None:
    assert redact("https://me:CANARY@host/x?api_key=CANARY&n=1") == "https://***@host/x?api_key=***&n=1"


def test_objects_become_their_strings() -> None:
    assert redact({"path": Path("a/b")}) == {"path": str(Path("a/b"))}
