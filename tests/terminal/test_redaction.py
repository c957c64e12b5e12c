"""No secret survives, wherever it stands; what users need to read does."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.terminal.redaction import redact, redact_text
from tests import tiny

C = "CANARY9x7q"

# Each with the secret between braces: what must not survive.
KINDS = {
    "hugging face": "{hf_" + "aB3" * 11 + "}",
    "openai": "{sk-" + "aB3" * 11 + "}",
    "anthropic": "{sk-ant-api03-" + "aB3-_" * 8 + "}",
    "wandb, old": "{" + "0a" * 20 + "}",
    "wandb": "{wandb_v1_" + "aB3" * 11 + "}",
    "github": "{ghp_" + "aB3" * 12 + "}",
    "gitlab": "{glpat-" + "aB3_" * 5 + "}",
    "gitlab, runner": "{glrt-" + "aB3_" * 5 + "}",
    "npm": "{npm_" + "aB3" * 12 + "}",
    "aws": "{AKIA" + "A1B2" * 4 + "}",
    "aws, session": "{ASIA" + "A1B2" * 4 + "}",
    "google": "{AIza" + "aB3-_" * 7 + "}",
    "slack": "{xoxb-123456789012-123456789012-" + "aB3" * 8 + "}",
    "slack, user": "{xoxp-1234567890-" + "aB3" * 8 + "}",
    "jwt": "{eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3-jVmNHl0w5_XgL0n3I}",
    "pem": "{-----BEGIN RSA PRIVATE KEY-----\nMIIE" + "aB3/+" * 9 + "\n-----END RSA PRIVATE KEY-----}",
    "pem, cut off": "{-----BEGIN OPENSSH PRIVATE KEY-----\\nMIIE" + "aB3/+" * 9 + "}",
    "token in a URL": f"https://{{{C}}}@host/data.jsonl",
    "password in a URL": f"postgresql://me:{{{C}}}@host:5432/db",
    "password with marks": f"https://me:{{p@ss/{C}}}@host/x",
    "user beside it": f"s3://{{KEY{C}}}:secret@bucket/x",
    "sig": f"https://host/rows.parquet?sv=2024&sig={{{C}%2F%3D}}&se=1",
    "amz": f"https://host/x?X-Amz-Expires=60&X-Amz-Signature={{{C}}}",
    "amz credential": f"https://host/x?X-Amz-Credential={{{C}/2024}}&n=1",
    "auth": f"https://host/x?auth={{{C}}}",
    "fragment": f"https://host/x#access_token={{{C}}}",
    "encoded name": f"https://host/x?acc%65ss_t%6Fken={{{C}}}",
    "bearer": f"Bearer {{{C}.-_~+/=}}",
    "header": f"Authorization: Basic {{{C}==}}",
    "cookie": f"Cookie: a={{{C}}}; b=1",
    "option": f"halfbyte sft --hub_token {{{C}}}",
    "option with =": f"--wandb-api-key='{{{C} with spaces}}'",
    "assigned": f"password={{{C}}}",
    "a scheme assigned": f"Authorization=Basic {{{C}==}}",
    "an argument list": f"['--hub_token', '{{{C}}}', '--seed', '1']",
    "bytes": f"hub_token=b'{{{C}}}'",
    "a list of one": f"hub_token=['{{{C}}}']",
    "an object": f"hub_token=SecretStr('{{{C}}}')",
    "three quotes": f"hub_token='''{{{C}}}'''",
    "an arrow": f"token => {{{C}}}",
    "backticks": f"`hub_token`: `{{{C}}}`",
    "a block of YAML": f"hub_token: |\n  {{{C}}}",
    "letters alone": "hub_token: {" + "canary" * 4 + "}",
    "marks in a password": f"password=a&b'c\\{{{C}}}",
    "encoded assignment": f"next=x%3Ftoken%3D{{{C}}}",
    "session": f"https://host/x?session_id={{{C}}}",
    "no scheme": f"//me:{{{C}}}@host/x",
    "slack webhook": "https://hooks.slack.com/services/{T0A/B0B/" + "aB3" * 8 + "}",
    "discord webhook": "https://discord.com/api/webhooks/{1234567890/" + "aB3-_" * 8 + "}",
    "telegram": "{123456789:AA" + "aB3" * 11 + "}",
    "neptune": "{eyJhcGlfYWRkcmVzcyI6Imh0dHBzOi8vYXBwLm5lcHR1bmUuYWkiLCJhcGlfdXJsIjoi}",
    "databricks": "{dapi" + "0a" * 16 + "}",
    "together": "{tgp_v1_" + "aB3" * 8 + "}",
    "runpod": "{rpa_" + "AB3" * 8 + "}",
    "a line of YAML": f"db_password: {{{C}}}",
    "a dict": f"{{'hub_token': '{{{C}}}', 'n': 1}}".replace("{'", "{{'", 1)[1:],
    "broken JSON": f'"token": "{{{C}}}", ',
    "broken JSON, open": f'"token": "{{{C}}}',
    "JSON in JSON": f'\\"api_key\\": \\"{{{C}}}\\"',
}


def split(kind: str) -> tuple[str, str]:
    """The text of a kind, and the secret in it."""
    before, _, rest = KINDS[kind].rpartition("{") if kind == "a dict" else KINDS[kind].partition("{")
    secret, _, after = rest.partition("}")
    return before + secret + after, secret


NAMES = [
    *("hub_token", "WANDB_API_KEY", "clientSecret", "password", "push-to-hub-token", "tokenizer_key", "auth"),
    *(
        "authorization",
        "credential",
        "credentials",
        "passwd",
        "db_pwd",
        "passphrase",
        "cookie",
        "session_cookies",
    ),
    *("SENTRY_DSN", "oauth", "apikey", "authToken", "aws_secret_access_key", "X-Auth-Token", "privateKey"),
]


@pytest.mark.parametrize("name", NAMES)
def test_secret_names_at_any_depth(name: str) -> None:
    value = {"a": [{"b": {name: "CANARY"}}], name: {"deep": ["CANARY", None, True]}}
    assert redact(value) == {"a": [{"b": {name: "***"}}], name: {"deep": ["***", None, True]}}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_secret_in_a_sentence(kind: str) -> None:
    text, secret = split(kind)
    for said in (text, f"cannot read {text}", f"error: {text}\n  then advice", f"a/{text}"):
        if kind in ("cookie", "header", "db") and said.startswith("/home"):
            continue
        clean = redact_text(said)
        assert secret not in clean
        assert C not in clean
        assert redact_text(clean) == clean


def nested(leaf: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Configurations with ``leaf`` somewhere: below keys, in lists, in JSON within strings, between other words."""
    words = st.sampled_from(["", "see ", "x=1, ", "[", "(", "model: ", '"', "\n", "a/"])
    placed = st.builds(
        lambda before, text, after: f"{before}{text}{after}",
        words,
        leaf,
        st.sampled_from(["", " b", "\n", ", c"]),
    )
    return st.recursive(
        placed,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.dictionaries(
                st.sampled_from(["notes", "path", "r", "kwargs", "learning_rate"]),
                inner,
                min_size=1,
                max_size=3,
            ),
            inner.map(json.dumps),
        ),
        max_leaves=5,
    )


@given(st.sampled_from(sorted(KINDS)).flatmap(lambda kind: nested(st.just(split(kind)[0]))))
def test_no_kind_survives_anywhere(value: Any) -> None:
    clean = redact({"config": value})
    text = json.dumps(clean)
    for kind in KINDS:
        secret = split(kind)[1]
        assert secret not in text, kind
        assert json.dumps(secret)[1:-1] not in text, kind
    assert C not in text
    assert redact(clean) == clean


@given(st.sampled_from(NAMES), st.text(min_size=1), st.integers(0, 3))
def test_any_value_under_a_secret_name(name: str, value: str, depth: int) -> None:
    held: Any = {name: f"canary{value}"}
    for _ in range(depth):
        held = {"a": [held]}
    assert "canary" not in json.dumps(redact(held))
    assert "canary" not in redact(json.dumps(held))


@given(st.text())
def test_any_text_is_redacted_once_for_all(text: str) -> None:
    clean = redact(text)
    assert redact(clean) == clean


HARMLESS = {
    "eos_token": "<|im_end|>",
    "boi_token": "<start_of_image>",
    "tokenizer_name_or_path": "base",
    "include_num_input_tokens_seen": "no",
    "max_tokens_per_batch": 4096,
    "num_tokens": "4096",
    "average_tokens_across_devices": True,
    "hub_token": None,
    "token": "",
    "tokens_per_second": 12.5,
    "learning_rate": 2e-4,
    "additional_special_tokens": ["<think>", "plain"],
    "user_special_tokens": "escape",
    "keyword": "value",
    "monkey": "george",
    "author": "someone",
    "pad_token_id": "2",
    "special_tokens_map": {"eos_token": "</s>"},
    "stop_tokens": ["</s>", "User:"],
    "keys_to_save": ["lm_head"],
    "embed_tokens": "float32",
    "token_budget": "1k",
    "past_key_values": "dynamic",
    "model_name_or_path": "Qwen/Qwen3-8B",
    "chat_template": tiny.CHAT_TEMPLATE,
}


def test_harmless_values_are_kept() -> None:
    assert redact(HARMLESS) == HARMLESS


@pytest.mark.parametrize(
    "text",
    [
        tiny.CHAT_TEMPLATE,
        "{% if key == 'x' %}{{ message['role'] + tokenizer.eos_token }}{% endif %}",
        "a.yaml:3: hub_token: must be a string, not a list",
        "a.yaml:3: duplicate key: learning_rate",
        "unknown key: lr; did you mean learning_rate?",
        "tokens: 1,234  num_tokens=512  max_tokens: 4k",
        "base: Qwen/Qwen3-8B at revision " + "0a" * 20,
        "/cache/models--a--b/snapshots/" + "0a" * 20 + "/config.json",
        "git+https://github.com/huggingface/trl@" + "0a" * 20,
        "ssh://git@github.com/a/b",
        "hf://datasets/a/b@main/rows.jsonl",
        "http://localhost:8080/path@x",
        "sha256 " + "0a" * 32,
        "train: added tokens in messages, trained unchanged: <think> 1, </think> 1",
        "eos_token='<|im_end|>', pad_token='</s>'",
        "https://host/rows.jsonl?download=true&n=3#part",
        "unsloth/Llama-3.3-70B-Instruct-bnb-4bit and sk-learn-text-classification-base",
        "step 12/300  loss 1.23  lr 2e-4  1.2k tok/s",
        "next: halfbyte dpo --adapter_name_or_path runs/a --max_tokens_per_batch 4096",
        "keyword: abc123 keyboard=x12345",
        "glaiveai/glaive-function-calling-v2 and global-mmlu-lite-2024-run",
        "runs/sk-learn-text-classification-v2, xai-explanations-dataset-v2, rk-Finetune-7B-lr2",
        "eval_mean_token_accuracy=0.98 mean_token_accuracy: 9.8765e-05, entropy_per_token=1.2",
        "GenerationConfig(eos_token_id=[1, 2], pad_token_id=3) image_token_index=32000",
        "_IncompatibleKeys(missing_keys=[], unexpected_keys=['model.embed_tokens.weight'])",
        "embed_tokens.weight: float32, embed_tokens=frozen key_states=tensor([1, 2])",
        "tool_token=[TOOL_CALLS] delimiter_token='<<SYS>>' max_new_tokens=all",
        "data/tokens.jsonl:3:12abcd: not JSON",
        f"datasets/a___b/default/0.0.0/{'0a' * 20}/b-train.arrow",
        f"models--a--b/refs/main {'0a' * 20}",
    ],
)
def test_sentences_are_kept(text: str) -> None:
    assert redact_text(text) == text
    assert redact({"notes": text}) == {"notes": text}


def test_numbers_stay_but_where_they_can_only_be_secrets() -> None:
    assert redact({"pwd": 1234, "token": 5, "seed": 6}) == {"pwd": "***", "token": 5, "seed": 6}


def test_json_in_a_string() -> None:
    assert json.loads(redact({"kwargs": json.dumps({"x": {"token": "CANARY"}})})["kwargs"]) == {
        "x": {"token": "***"}
    }
    untouched = '{"a":  1}'
    assert redact({"kwargs": untouched}) == {"kwargs": untouched}
    deep = "[" * 100_000
    assert redact(deep) == deep


def test_a_command_line_in_a_list() -> None:
    assert redact(["--hub_token", "CANARY", "--seed", "1"]) == ["--hub_token", "***", "--seed", "1"]


def test_hashes_are_kept_where_a_hash_belongs() -> None:
    value = {"model_revision": "0a" * 20, "sha": "0a" * 32, "commit": "0a" * 20}
    assert redact(value) == value
    assert redact({"sha": "hf_" + "a" * 30}) == {"sha": "***"}
    assert redact({"shape": "0a" * 20}) == {"shape": "***"}


def test_urls_lose_their_passwords_alone() -> None:
    assert redact("https://me:CANARY@host/x?api_key=CANARY&n=1") == "https://***@host/x?api_key=***&n=1"


def test_objects_become_their_strings() -> None:
    assert redact({"path": Path("a/b")}) == {"path": str(Path("a/b"))}
