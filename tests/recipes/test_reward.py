"""The recipe `reward` from its rows to a scorer: trained, saved with its head, loaded again, continued, refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from tests import plain_trl, tiny
from tests.checkpoint.runs import options, read_rows

ModelDir = Callable[..., Path]
EVALUATED = {
    "max_steps": "3", "eval_strategy": "steps", "eval_steps": "3", "eval_on_start": "true", "save_steps": "1",
}  # fmt: skip
SHORT = {"max_steps": "2", "save_strategy": "no"}
HEAD = "base_model.model.score.weight"
FIGURES = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())


def length(text: str) -> int:
    """Tokens of ``text`` with the end token."""
    return len(tiny.tokenizer()(text)["input_ids"]) + 1


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["prompt"] + row[side] + "<|im_end|>" for row in rows for side in ("chosen", "rejected")]


@torch.no_grad()
def scores(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The scores of both sides of each row, ``[rows, 2]``, in one padded batch."""
    batch = tokenizer(texts(rows), return_tensors="pt", padding=True, padding_side="right")
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.eval()(**ids).logits.view(-1, 2)


def test_a_reward_model(model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the run evaluated is what plain PEFT scores with the directory that it wrote, as the card loads it."""
    rows, output, base = tiny.preferences(16), tmp_path / "run", model_dir("llama")
    data = tiny.write_rows(tmp_path / "rows", rows)
    assert main(["reward", *options(base, data, output, **EVALUATED)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    step = r"step 2/3  loss \S+  lr \d\.\de-\d\d  grad \S+  accuracy \d\.\d{3}  margin \S+  \S+ tok/s"
    assert any(re.fullmatch(step, line) for line in lines), lines
    for figure in ("loss", "accuracy", "margin", "score"):
        assert any(re.fullmatch(rf"eval {figure} +-?\d\S+ -> -?\d\S+", line) for line in lines), figure
    assert "LOAD REPORT" not in printed.out + printed.err

    found = record(output)
    assert (found["status"], found["recipe"], found["steps"]) == ("completed", "reward", 3)
    assert found["config"]["lora_task_type"] == "SEQ_CLS"
    assert found["base"]["four_bit_share"] == 1.0
    assert found["base"]["left_out_bytes"]["head"] == 64 * 4
    assert found["fast"]["layers"] == 2
    tokens = sum(length(row["prompt"] + row[side]) for row in rows[:-4] for side in ("chosen", "rejected"))
    assert (found["data"]["rows"], found["data"]["tokens"], found["data"]["dropped"]) == (12, tokens, 0)
    plots = {path.stem for path in (output / "plots").iterdir()}
    assert plots == {"loss", "learning_rate", "grad_norm", "accuracy", "margin", "scores"}

    assert weights(output)[HEAD].dtype == torch.float32
    assert not torch.equal(weights(output)[HEAD], weights(output / "checkpoint-1")[HEAD]), (
        "the head did not train"
    )
    card = (output / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    assert "num_labels=1" in card
    assert "model.config.get_text_config().pad_token_id = tokenizer.pad_token_id" in card
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = plain_trl.not_repacked(plain_trl.scoring_base(base))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(model, str(output))
    again = scores(model, tokenizer, rows[-4:])
    last = found["metrics"]["eval"]
    assert last["eval_accuracy"] == (again[:, 0] > again[:, 1]).float().mean()
    assert last["eval_margin"] == pytest.approx((again[:, 0] - again[:, 1]).mean().item(), abs=1e-5)
    assert last["eval_min_reward"] == pytest.approx(again.min().item(), abs=1e-5)
    assert last["eval_max_reward"] == pytest.approx(again.max().item(), abs=1e-5)


def test_a_merged_reward_model_needs_no_adapter(model_dir: ModelDir, tmp_path: Path) -> None:
    """The head goes with the merge: what is saved then scores as base, adapter and head do together."""
    rows, output, base = tiny.preferences(16), tmp_path / "run", model_dir("llama")
    data = tiny.write_rows(tmp_path / "rows", rows)
    assert main(["reward", *options(base, data, output, **SHORT)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(model, str(output))
    before = scores(model, tokenizer, rows)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(merged.score.weight, weights(output)[HEAD])
    assert torch.allclose(scores(merged, tokenizer, rows), before, atol=1e-5)


def test_it_is_continued_where_it_ended(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its directory, with the best checkpoint's weights in it; in bfloat16 adapter and head stay float32."""
    rows = tiny.preferences(16)
    data = tiny.write_rows(tmp_path / "rows", rows)
    first, second, half = tmp_path / "first", tmp_path / "second", tmp_path / "half"
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "eval_accuracy", "eval_steps": "1"}
    assert main(["reward", *options(model_dir("llama"), data, first, **{**EVALUATED, **best})]) == 0
    ended = record(first)["metrics"]["eval"]
    words = options(first, data, second, **EVALUATED)
    assert main(["reward", *words]) == 0
    before = read_rows(second)[0]
    for figure in FIGURES:
        assert before[f"eval_{figure}"] == pytest.approx(ended[f"eval_{figure}"], abs=1e-6), figure
    assert not torch.equal(weights(first)[HEAD], weights(second)[HEAD])
    assert main(["reward", *options(first, data, half, **SHORT, dtype="bfloat16")]) == 0
    assert {w.dtype for w in weights(half).values()} == {torch.float32}
    assert record(half)["base"]["left_out_bytes"]["head"] == 64 * 2
    capsys.readouterr()
    assert main(["dpo", *options(first, data, tmp_path / "dpo", **SHORT)]) == 2
    assert "made for sequence classification, and causal language modeling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([{"chosen": "a", "rejected": 1}], {}, ["train row 1: column 'rejected'", "expected a string"]),
        ([{"chosen": "a", "rejected": "b", "margin": "1"}], {}, ["train row 1: column 'margin'", "finite number"]),
        ([{"chosen": "a", "rejected": "b", "margin": None}], {}, ["train row 1: column 'margin'", "found None"]),
        ([{"text": "a"}], {}, ["no columns for scored pairs", "halfbyte sft"]),
        (tiny.preferences(4), {"max_length": "2"}, ["every row is longer than `max_length` 2"]),
        (tiny.preferences(4), {"center_rewards_coefficient": "-1"}, ["center_rewards_coefficient: must be at least 0"]),
    ],
)  # fmt: skip
def test_what_it_cannot_train_is_refused(
    refused: Callable[..., str], rows: list[dict[str, Any]], given: dict[str, str], words: list[str]
) -> None:
    told = refused("reward", rows, **given)
    for word in words:
        assert word in told, told


def test_the_adapter_of_a_language_model_is_refused(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, sft = model_dir("llama"), tmp_path / "sft"
    assert (
        main(["sft", *options(base, tiny.write_rows(tmp_path / "texts", tiny.texts(12)), sft, **SHORT)]) == 0
    )
    data = tiny.write_rows(tmp_path / "rows", tiny.preferences(12))
    assert main(["reward", *options(sft, data, tmp_path / "run", **SHORT)]) == 2
    told = capsys.readouterr().err
    assert "was made for causal language modeling, and sequence classification has another head" in told
    assert f"start a fresh adapter on its base: `model_name_or_path: {base}`" in told


def test_sides_without_a_prompt_margins_and_equal_sides(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sides need not begin alike; a margin is subtracted in the loss; equal sides are dropped and counted."""
    rows = [{"chosen": tiny.text(n), "rejected": tiny.text(n + 2), "margin": n % 3} for n in range(120)]
    rows[4]["rejected"] = rows[4]["chosen"]
    losses = []
    for name in ("with", "without"):
        given = rows if name == "with" else [{**row, "margin": 0.0} for row in rows]
        data = tiny.write_rows(tmp_path / name / "rows", given)
        output = tmp_path / name / "run"
        assert main(["reward", *options(model_dir("llama"), data, output, **SHORT)]) == 0
        assert record(output)["data"]["dropped_equal_pairs"] == 1
        losses.append(read_rows(output)[0]["loss"])
    assert "; 1 dropped (equal sides: row 5)" in capsys.readouterr().out
    assert losses[0] > losses[1]


def test_padding_with_the_end_token_is_told(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_rows(tmp_path / "rows", tiny.preferences(12))
    words = options(model_dir("llama"), data, tmp_path / "run", **SHORT, pad_token="<|im_end|>")
    assert main(["reward", *words]) == 0
    line = "padding with the end token <|im_end|>: a sequence is scored at its last token before that"
    assert line in capsys.readouterr().out.splitlines()


def test_through_the_api(model_dir: ModelDir, tmp_path: Path) -> None:
    """Checkpointing, a base in four bits and a new head that is not, over conversations."""
    rows = [
        {
            "chosen": [
                {"role": "user", "content": tiny.text(n)},
                {"role": "assistant", "content": "the fox"},
            ],
            "rejected": [
                {"role": "user", "content": tiny.text(n)},
                {"role": "assistant", "content": "a sea"},
            ],
        }
        for n in range(12)
    ]
    args = RewardConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_steps=8, per_device_train_batch_size=4, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=1e-2, gradient_checkpointing=True,
    )  # fmt: skip
    plugin = QLoRAPlugin(dtype="float32")
    trainer = plugin.trainer(
        RewardTrainer, model=str(model_dir("qwen3")), args=args, train_dataset=Dataset.from_list(rows)
    )
    assert plugin.lora_task_type == "CAUSAL_LM", "the plugin is left as it was"
    assert trainer.report.fusion.layers == 2
    assert trainer.report.coverage.four_bit_share == 1.0
    trainer.train()
    found = [row for row in trainer.state.log_history if "loss" in row]
    assert found[-1]["accuracy"] == 1.0
    assert found[-1]["loss"] < found[0]["loss"]
