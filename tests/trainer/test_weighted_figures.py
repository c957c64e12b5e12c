"""Figures are those of all rows or tokens, whatever batches, ranks and micro-batches these come in."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from halfbyte import QLoRAPlugin
from tests import tiny
from tests.checkpoint.runs import options, read_rows, run
from tests.launch import accelerate

PAIRS = 7
# Of a row of the log, what time and progress say.
_NO_FIGURES = ("runtime", "per_second", "epoch", "num_tokens", "preparation_time", "step", "time")
CLASSES = {
    "sft": (SFTTrainer, SFTConfig, tiny.texts),
    "dpo": (DPOTrainer, DPOConfig, tiny.preferences),
    "kto": (KTOTrainer, KTOConfig, tiny.labelled),
    "reward": (RewardTrainer, RewardConfig, tiny.preferences),
}
# The KL term of KTO's loss is of a batch, by its definition.
OPTIONS = {"kto": {"loss_type": "apo_zero_unpaired"}}


@pytest.fixture(scope="module")
def adapter(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = QLoRAPlugin(dtype="float32").load(str(model_dir("llama")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory)
    return directory


def build(recipe: str, adapter: Path, output: Path, **given: Any) -> Trainer:
    """A trainer that moves nothing, over pairs whose reference differs from the policy."""
    trainer_cls, config, rows = CLASSES[recipe]
    args = config(
        str(output), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        learning_rate=1e-30, num_train_epochs=1, lr_scheduler_type="constant", **OPTIONS.get(recipe, {}), **given,
    )  # fmt: skip
    data = Dataset.from_list(rows(PAIRS))
    start = {"adapter_name_or_path": str(adapter)}
    if recipe == "reward":  # another task than the adapter's
        start = {
            "model_name_or_path": json.loads((adapter / "adapter_config.json").read_text())[
                "base_model_name_or_path"
            ]
        }
    plugin = QLoRAPlugin(dtype="float32", **start)
    trainer = plugin.trainer(trainer_cls, args=args, train_dataset=data, eval_dataset=data)
    for name, parameter in trainer.model.named_parameters():
        if ".ref." in name and "lora_B" in name:
            parameter.data.zero_()
    return trainer


def test_the_least_and_the_largest_score_are_those_of_all_rows(adapter: Path, tmp_path: Path) -> None:
    trainer = build("reward", adapter, tmp_path, per_device_eval_batch_size=2)
    found = trainer.evaluate()
    inputs = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        scores = trainer.model(**inputs).logits
    for figure, of in (("min", torch.min), ("mean", torch.mean), ("max", torch.max)):
        assert found[f"eval_{figure}_reward"] == pytest.approx(of(scores).item(), rel=1e-4), figure


def figures(row: dict[str, Any]) -> dict[str, float]:
    return {
        key.removeprefix("eval_"): value
        for key, value in row.items()
        if not any(word in key for word in _NO_FIGURES)
    }


@pytest.mark.parametrize("recipe", CLASSES)
def test_an_evaluation_does_not_depend_on_its_batches(recipe: str, adapter: Path, tmp_path: Path) -> None:
    trainer = build(recipe, adapter, tmp_path)
    found = []
    for rows in (PAIRS, 1, 2, 4, 5):
        trainer.args.per_device_eval_batch_size = rows
        found.append(figures(trainer.evaluate()))
    expected = {
        "sft": {"loss", "entropy", "mean_token_accuracy"},
        "dpo": {"loss", "entropy", "mean_token_accuracy"},
        "kto": {"loss", "entropy"},
        "reward": {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"},
    }
    assert expected[recipe] <= found[0].keys()
    if recipe == "dpo":
        assert {"rewards/accuracies", "rewards/margins", "logps/chosen", "logits/rejected"} <= found[0].keys()
        assert found[0]["rewards/accuracies"] * PAIRS == pytest.approx(
            round(found[0]["rewards/accuracies"] * PAIRS)
        )
        assert 0 < found[0]["rewards/accuracies"] < 1
    if recipe == "kto":
        sides = [
            f"{figure}/{side}" for figure in ("rewards", "logps", "logits") for side in ("chosen", "rejected")
        ]
        assert {*sides, "rewards/margins"} <= found[0].keys()
        margin = found[0]["rewards/chosen"] - found[0]["rewards/rejected"]
        assert found[0]["rewards/margins"] == pytest.approx(margin) != 0
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert trainer.state.log_history[-1]["eval_loss"] == found[-1]["loss"]


@pytest.mark.parametrize("recipe", CLASSES)
@pytest.mark.parametrize(("rows", "accumulated"), [(4, 1), (2, 2), (3, 3)])
def test_training_rows_weigh_micro_batches(
    recipe: str, adapter: Path, tmp_path: Path, rows: int, accumulated: int
) -> None:
    """One row of the log over an epoch of unequal micro-batches, while nothing moves, is the evaluation's."""
    steps = math.ceil(PAIRS / rows / accumulated)
    trainer = build(
        recipe, adapter, tmp_path, per_device_train_batch_size=rows, logging_steps=steps,
        gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    ignored = ("loss", "grad_norm", "learning_rate")  # `loss` is what was trained: the mean over steps
    trained = {key: value for key, value in figures(row).items() if key not in ignored}
    expected = figures(trainer.evaluate())
    assert len(trained) >= 2
    assert trained == pytest.approx({key: expected[key] for key in trained}, rel=1e-4, abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", CLASSES)
def test_two_ranks_log_what_one_process_logs(
    model_dir: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    """Seven rows are evaluated by two ranks in batches of three: of the last ones, one rank has a single row of its
    own and the other none; the rows that fill up do not count.
    """
    rows = tiny.write_rows(tmp_path / "rows", CLASSES[recipe][2](12 + PAIRS), held_out=PAIRS)
    common = {
        "max_steps": "3", "logging_steps": "3", "eval_strategy": "steps", "eval_steps": "3", "lora_dropout": "0",
        "save_strategy": "no", **OPTIONS.get(recipe, {}),
    }  # fmt: skip

    def logged(name: str, processes: int, **given: str) -> list[dict[str, float]]:
        words = options(model_dir("llama"), rows, tmp_path / name, **common, **given)
        if processes == 1:
            assert run(recipe, words) == 0
        else:
            done = accelerate(recipe, *words, processes=processes)
            assert done.returncode == 0, done.stderr[-4000:]
        found = [row for row in read_rows(tmp_path / name) if "train_runtime" not in row]
        return [{**figures(row), "num_tokens": row.get("num_tokens", 0)} for row in found]

    one = logged("one", 1, per_device_train_batch_size="4", per_device_eval_batch_size=str(PAIRS))
    assert len(one) == 2
    two = logged("two", 2, per_device_train_batch_size="2", per_device_eval_batch_size="3")
    for here, there in zip(two, one, strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5)
