"""A preview shows the tokens and the mask that the trainer uses, for every chat template and kind of row."""

import json
import re
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from halfbyte.cli import main
from tests import tiny

NAMES = [
    "cohere",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "glm4moe",
    "gptoss",
    "lfm2",
    "llama3",
    "phi3",
    "qwen2_5",
    "qwen3",
]
TEMPLATES = [Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja" for name in NAMES]
CHAT = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five six"},
]


def previewed(capsys: pytest.CaptureFixture[str], recipe: str, *words: str) -> list[dict]:
    capsys.readouterr()
    assert main(["plan", recipe, "--json", "--dtype=float32", "--report_to=none", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_preview_is_what_plain_trl_trains_on(
    model_dir, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: Path
) -> None:
    base = model_dir("llama")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": CHAT}) + "\n")
    shown = previewed(
        capsys, "sft", f"--model_name_or_path={base}", f"--dataset_name={data}", "--assistant_only_loss=true",
        f"--chat_template_path={template}", "--additional_special_tokens=[]", "--row=1",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = tokenizer.apply_chat_template(
        CHAT,
        chat_template=template.read_text(),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    (sequence,) = shown[0]["sequences"]
    assert sequence["ids"] == found["input_ids"]
    assert sequence["trained"] == [bool(flag) for flag in found["assistant_masks"]]
    assert any(sequence["trained"])
    assert not all(sequence["trained"])


def test_pairs_share_their_prompt(model_dir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_rows(tmp_path / "rows", tiny.preferences(8))
    words = (f"--model_name_or_path={model_dir('llama')}", f"--dataset_name={data}")
    first, second = previewed(capsys, "dpo", *words, "--preview=2")
    assert (first["row"], second["row"]) == (1, 2)
    chosen, rejected = first["sequences"]
    assert (chosen["name"], rejected["name"]) == ("chosen", "rejected")
    prompt = chosen["trained"].index(True)
    assert chosen["ids"][:prompt] == rejected["ids"][:prompt]
    assert all(chosen["trained"][prompt:])
    assert chosen["ids"] != rejected["ids"]
    assert main(["plan", "dpo", *words, "--dtype=float32", "--report_to=none", "--row=2"]) == 0
    printed = capsys.readouterr().out
    assert "shared by both sides" in printed
    assert "[[" in printed


@pytest.mark.parametrize("recipe", ["reward", "kto", "pretrain"])
def test_other_recipes(model_dir, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    rows = {"reward": tiny.preferences, "kto": tiny.labelled, "pretrain": tiny.texts}[recipe](8)
    data = tiny.write_rows(tmp_path / "rows", rows)
    (shown,) = previewed(
        capsys, recipe, f"--model_name_or_path={model_dir('llama')}", f"--dataset_name={data}", "--row=3"
    )
    assert [each["name"] for each in shown["sequences"]] == (
        ["chosen", "rejected"] if recipe == "reward" else ["row"]
    )
    assert all(each["ids"] for each in shown["sequences"])


@pytest.mark.parametrize("recipe", ["sft", "reward"])
def test_a_row_is_headed_by_its_tokens(
    model_dir, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    rows = {"sft": tiny.conversations, "reward": tiny.preferences}[recipe](20)
    words = (
        f"--model_name_or_path={model_dir('llama')}",
        f"--dataset_name={tiny.write_rows(tmp_path / 'rows', rows)}",
    )
    assert main(["plan", recipe, "--dtype=float32", "--report_to=none", *words, "--row=3"]) == 0
    each = r"\d+ tokens, \d+ trained"
    head = each if recipe == "sft" else f"chosen {each}, rejected {each}"
    assert re.search(f"^row 3: {head}$", capsys.readouterr().out, re.MULTILINE)


def test_what_is_cut_and_what_is_left_out(
    model_dir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "one two three", "completion": " four five"},
        {"prompt": "one " * 30, "completion": " two"},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    words = (f"--model_name_or_path={model_dir('llama')}", f"--dataset_name={data}")
    (whole,) = previewed(capsys, "sft", *words, "--row=1")
    length = len(whole["sequences"][0]["ids"])
    assert whole["sequences"][0]["cut"] == 0
    (cut,) = previewed(
        capsys,
        "pretrain",
        *words[:1],
        f"--dataset_name={_texts(tmp_path)}",
        "--row=1",
        "--max_length=6",
        "--packing=false",
    )
    assert len(cut["sequences"][0]["ids"]) == 6
    assert cut["sequences"][0]["cut"] > 0
    (left,) = previewed(capsys, "sft", *words, "--row=2", f"--max_length={length}")
    assert left["sequences"] == []
    assert left["left_out"]


def _texts(tmp_path: Path) -> Path:
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "one two three four five six seven eight nine ten"}) + "\n")
    return data
