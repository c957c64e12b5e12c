"""Figures of ORPO and CPO are those of all rows, or tokens of the chosen side, whatever batches they come in."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from halfbyte import QLoRAPlugin
from tests import tiny
from tests.checkpoint.runs import options, read_rows, run
from tests.launch import accelerate

PAIRS = 7
CLASSES = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}
KEYS = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "nll_loss"),
}


@pytest.fixture(scope="module")
def build(model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A trainer that moves nothing."""

    def build(recipe: str, **given: Any) -> Any:
        trainer_cls, config = CLASSES[recipe]
        args = config(
            str(tmp_path_factory.mktemp(recipe)), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            learning_rate=1e-30, num_train_epochs=1, lr_scheduler_type="constant", disable_tqdm=True, **given,
        )  # fmt: skip
        data = Dataset.from_list(tiny.preferences(PAIRS))
        plugin = QLoRAPlugin(dtype="float32")
        return plugin.trainer(
            trainer_cls, model=str(model_dir("llama")), args=args, train_dataset=data, eval_dataset=data
        )

    return build


def figures(row: dict[str, Any]) -> dict[str, float]:
    named = {key.removeprefix("eval_"): value for key, value in row.items()}
    return {key: value for key, value in named.items() if key in KEYS or key.startswith("log_odds")}


@pytest.mark.parametrize("recipe", CLASSES)
def test_an_evaluation_does_not_depend_on_its_batches(build: Callable[..., Any], recipe: str) -> None:
    trainer = build(recipe)
    found = []
    for rows in (PAIRS, 1, 2, 4, 5):
        trainer.args.per_device_eval_batch_size = rows
        found.append(figures(trainer.evaluate()))
    assert found[0].keys() >= KEYS
    assert 0 < found[0]["rewards/accuracies"] < 1
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("recipe", CLASSES)
@pytest.mark.parametrize(("rows", "accumulated"), [(4, 1), (2, 2), (3, 3)])
def test_training_rows_weigh_micro_batches(
    build: Callable[..., Any], recipe: str, rows: int, accumulated: int
) -> None:
    steps = math.ceil(PAIRS / rows / accumulated)
    trainer = build(
        recipe, per_device_train_batch_size=rows, logging_steps=steps, gradient_accumulation_steps=accumulated
    )
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert figures(row) == pytest.approx(figures(trainer.evaluate()), rel=1e-4, abs=1e-6)


def test_eval_loss_weighs_batches_by_rows(build: Callable[..., Any]) -> None:
    trainer = build("orpo")
    losses = []
    data = trainer.eval_dataset
    for part in (range(4), range(4, PAIRS)):
        trainer.args.per_device_eval_batch_size = len(part)
        losses.append(trainer.evaluate(data.select(part))["eval_loss"])
    trainer.args.per_device_eval_batch_size = 4
    expected = (4 * losses[0] + 3 * losses[1]) / PAIRS
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", CLASSES)
def test_two_ranks_log_what_one_process_logs(
    model_dir: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    rows = tiny.write_rows(tmp_path / "rows", tiny.preferences(12 + PAIRS), held_out=PAIRS)
    common = {
        "max_steps": "3", "logging_steps": "3", "eval_strategy": "steps", "eval_steps": "3", "lora_dropout": "0",
        "save_strategy": "no",
    }  # fmt: skip

    def logged(name: str, processes: int, **given: str) -> list[dict[str, float]]:
        words = options(model_dir("llama"), rows, tmp_path / name, **common, **given)
        if processes == 1:
            assert run(recipe, words) == 0
        else:
            done = accelerate(recipe, *words, processes=processes)
            assert done.returncode == 0, done.stderr[-4000:]
        return [figures(row) for row in read_rows(tmp_path / name) if "train_runtime" not in row]

    one = logged("one", 1, per_device_train_batch_size="4", per_device_eval_batch_size=str(PAIRS))
    assert len(one) == 2
    two = logged("two", 2, per_device_train_batch_size="2", per_device_eval_batch_size="3")
    # The loss trains the mean of the ranks' means per token: after a step the weights differ a little.
    for here, there in zip(two, one, strict=True):
        assert here == pytest.approx(there, rel=2e-2, abs=1e-3)
