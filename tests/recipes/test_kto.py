"""The recipe `kto` from its rows to its adapter: fresh, from an adapter, over ranks, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import KTOConfig, KTOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from tests import tiny
from tests.checkpoint.runs import options, read_rows
from tests.launch import accelerate

ModelDir = Callable[..., Path]
EVALUATED = {
    "max_steps": "3", "eval_strategy": "steps", "eval_steps": "3", "eval_on_start": "true",
    "save_strategy": "no", "per_device_train_batch_size": "4",
}  # fmt: skip


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())


def length(text: str) -> int:
    """Tokens of ``text`` with the end token."""
    return len(tiny.tokenizer()(text)["input_ids"]) + 1


def assert_starts_at_the_reference(output: Path) -> None:
    """Each loss is 1 - sigmoid(0) where the policy is its reference, and every reward is nothing."""
    first = read_rows(output)[0]
    assert first["step"] == 0
    assert first["eval_loss"] == 0.5
    for figure in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[f"eval_{figure}"] == 0, figure


def assert_trained(output: Path) -> None:
    weights = load_file(output / "adapter_model.safetensors")
    silent = [name for name, w in weights.items() if "lora_B" in name and not w.abs().max() > 0]
    assert not silent, f"these adapters did not train: {silent}"


def test_labelled_answers(model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, output = tiny.labelled(19), tmp_path / "run"
    data = tiny.write_rows(tmp_path / "rows", rows)
    assert main(["kto", *options(model_dir("llama"), data, output, **EVALUATED)]) == 0
    lines = capsys.readouterr().out.splitlines()
    step = r"step 2/3  loss \S+  lr \d\.\de-\d\d  grad \S+  kl \S+  margin \S+  \S+ tok/s"
    assert any(re.fullmatch(step, line) for line in lines), lines
    assert any(re.fullmatch(r"step 0/3  eval  loss 0.5  kl 0  margin 0", line) for line in lines), lines
    assert any(re.fullmatch(r"eval margin +0\.0000 -> -?\d\S+", line) for line in lines)
    assert "eval: 2 desirable, 2 undesirable" in lines
    balance = (
        "train: 6 desirable, 9 undesirable, weighted 1 and 1; balanced with `desirable_weight` from 1.5 to 2"
    )
    assert any(line.startswith(balance) for line in lines), lines
    assert_starts_at_the_reference(output)
    assert_trained(output)
    found = record(output)
    assert (found["status"], found["recipe"], found["steps"]) == ("completed", "kto", 3)
    assert found["base"]["four_bit_share"] == 1.0
    assert found["fast"]["layers"] == 2
    tokens = sum(length(row["prompt"] + row["completion"]) for row in rows[:-4])
    assert (found["data"]["rows"], found["data"]["tokens"], found["data"]["dropped"]) == (15, tokens, 0)
    plots = {path.stem for path in (output / "plots").iterdir()}
    assert plots == {"loss", "learning_rate", "grad_norm", "kl", "margin", "rewards"}
    card = (output / "README.md").read_text()
    assert "| desirable_weight | 1 |" in card
    assert "AutoModelForCausalLM.from_pretrained(" in card


def test_pairs_from_the_adapter_of_an_sft_run(
    model_dir: ModelDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base and the reference come with the adapter, which stays as it was."""
    sft, output = tmp_path / "sft", tmp_path / "run"
    texts = tiny.write_rows(tmp_path / "texts", tiny.texts(12))
    short = {"max_steps": "2", "save_strategy": "no"}
    assert main(["sft", *options(model_dir("llama"), texts, sft, **short)]) == 0
    rows = tiny.preferences(201)
    rows[7]["rejected"] = rows[7]["chosen"]
    data = tiny.write_rows(tmp_path / "rows", rows)
    words = options(Path("unused"), data, output, **EVALUATED)[2:]
    assert main(["kto", *words, "--adapter_name_or_path", str(sft)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("train: 197 rows, ") and line.endswith("; 1 dropped (equal sides: row 8)")
        for line in lines
    ), lines
    assert_starts_at_the_reference(output)
    start, end = (load_file(path / "adapter_model.safetensors") for path in (sft, output))
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start if "lora_B" in name)
    assert sorted(path.name for path in output.glob("*/adapter_model.safetensors")) == []


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([{"prompt": "a", "completion": "b", "label": "true"}], {}, ["train row 1: column 'label'", "true or false"]),
        ([{"prompt": "a", "completion": "b"}], {}, ["no columns for unpaired preferences", "halfbyte sft"]),
        (tiny.labelled(6), {"per_device_train_batch_size": "1"}, ["batch size must be > 1"]),
        (tiny.labelled(6), {"train_sampling_strategy": "random"}, ["train_sampling_strategy", "'sequential'"]),
        (tiny.labelled(6), {"lora_target_modules": "lm_head"}, ["lora_target_modules: ", "lm_head"]),
        (tiny.labelled(6), {"desirable_weight": "-1"}, ["desirable_weight: must be greater than 0"]),
        (tiny.labelled(6), {"max_length": "2"}, ["train: no row has a token to train on"]),
    ],
)  # fmt: skip
def test_what_it_cannot_train_is_refused(
    refused: Callable[..., str], rows: list[dict[str, Any]], given: dict[str, str], words: list[str]
) -> None:
    told = refused("kto", rows, **given)
    for word in words:
        assert word in told, told


def test_through_the_api_with_a_reference_computed_beforehand(model_dir: ModelDir, tmp_path: Path) -> None:
    """The first loss is one half to the last bit, whether the reference is computed beside the policy or before."""
    rows = Dataset.from_list(tiny.labelled(10))
    trained = []
    for precomputed in (False, True):
        args = KTOConfig(
            str(tmp_path), use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=4, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=1e-3,
            precompute_ref_log_probs=precomputed,
        )  # fmt: skip
        trainer = QLoRAPlugin(dtype="float32").trainer(
            KTOTrainer, model=str(model_dir("llama")), args=args, train_dataset=rows
        )
        assert trainer.report.fusion.layers == 2
        trainer.train()
        trained.append([row for row in trainer.state.log_history if "loss" in row])
    for first, second in trained:
        assert (first["loss"], first["kl"]) == (0.5, 0)
        assert second["loss"] != 0.5
    assert trained[0][1]["loss"] == pytest.approx(trained[1][1]["loss"], abs=1e-6)


@pytest.mark.distributed
def test_two_ranks_share_one_kl_estimate(model_dir: ModelDir, tmp_path: Path) -> None:
    """Their steps are those of plain TRL's ranks, which take the mean of both estimates into every loss."""
    data = tiny.write_rows(tmp_path / "rows", tiny.labelled(44))
    given = {
        "per_device_train_batch_size": "2",
        "save_strategy": "no",
        "learning_rate": "3e-2",
        "lora_dropout": "0",
    }
    found = []
    for module in ("halfbyte", "tests.recipes.gathering"):
        output = tmp_path / module
        done = accelerate("kto", *options(model_dir("llama"), data, output, **given), module=module)
        assert done.returncode == 0, done.stderr[-4000:]
        found.append([row for row in read_rows(output) if "loss" in row])
    ours, theirs = found
    assert any(row["kl"] > 0 for row in theirs)
    for here, there in zip(ours, theirs, strict=True):
        for figure in ("loss", "kl", "grad_norm", "rewards/chosen", "rewards/rejected", "num_tokens"):
            assert here.get(figure) == pytest.approx(there.get(figure), rel=1e-5, abs=1e-7), figure
