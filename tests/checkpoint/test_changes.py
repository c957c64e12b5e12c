"""What `allow_config_change` allows takes effect from the first resumed step on; what cannot is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DatasetMixtureConfig, DPOConfig, SFTConfig

from halfbyte.checkpoint import changes
from halfbyte.config import RunArguments
from halfbyte.errors import UserError
from halfbyte.plugin import QLoRAPlugin
from tests.checkpoint.runs import STEPS, Finished, options, read_rows, run
from tests.checkpoint.test_manifest import recorded

OPTIONS = {
    field.name
    for cls in (SFTConfig, DPOConfig, RunArguments, QLoRAPlugin, DatasetMixtureConfig)
    for field in dataclasses.fields(cls)
}
RESUMED = 5  # the first step of a session that resumes from checkpoint-4

# The learning rates that the options give to steps 5 and 6 of a run that had them from the start: 0.01 * (6 - step) / 6
# and so on, each logged after the step that it belongs to is done.
RATES: dict[str, tuple[dict[str, str], Callable[[int], float]]] = {
    "learning_rate": ({"learning_rate": "1e-3"}, lambda done: 1e-3 * (STEPS - done) / STEPS),
    "lr_scheduler_type": ({"lr_scheduler_type": "constant"}, lambda done: 1e-2),
    "warmup_steps": ({"warmup_steps": "5"}, lambda done: 1e-2 if done == 5 else 1e-2 * done / 5),
    "max_steps": ({"max_steps": "8"}, lambda done: 1e-2 * (8 - done) / 8),
}
GROUPS = {"weight_decay": 0.25, "adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 1e-3}


@pytest.fixture
def resumed(finished: Finished, tmp_path: Path) -> Callable[..., int]:
    """``resumed(output, learning_rate=...)``: resume a copy of the finished run with changes, all of them allowed."""

    def start(output: Path, **given: str) -> int:
        again = ("--resume_from_checkpoint", "auto", "--allow_config_change", *given)
        return run("sft", finished.options(finished.cut(output), **given), *again)

    return start


@pytest.mark.parametrize("change", RATES)
def test_a_learning_rate_that_is_changed_trains_from_the_first_step(
    resumed: Callable[..., int], tmp_path: Path, change: str, capsys: pytest.CaptureFixture
) -> None:
    given, rate = RATES[change]
    assert resumed(tmp_path / "parts", **given) == 0
    assert f"changed by allow_config_change from step {RESUMED} on: {change}: " in capsys.readouterr().out
    rows = [row for row in read_rows(tmp_path / "parts") if "loss" in row and row["step"] >= RESUMED]
    assert [row["learning_rate"] for row in rows[:2]] == pytest.approx([rate(4), rate(5)], rel=1e-12)


def test_what_the_optimizer_keeps_is_changed_in_all_of_its_groups(
    finished: Finished, resumed: Callable[..., int], tmp_path: Path
) -> None:
    output = tmp_path / "parts"
    assert resumed(output, **{name: str(value) for name, value in GROUPS.items()}) == 0
    for group in _groups(output):
        assert group["betas"] == (GROUPS["adam_beta1"], GROUPS["adam_beta2"])
        assert group["eps"] == GROUPS["adam_epsilon"]
    assert {group["weight_decay"] for group in _groups(output)} == {0.0, GROUPS["weight_decay"]}
    weights = "adapter_model.safetensors"
    assert (output / weights).read_bytes() != (finished.output / weights).read_bytes()


@pytest.mark.faults
def test_epochs_decide_the_schedule_again(finished: Finished, resumed, tmp_path: Path) -> None:
    """Eight rows, two a step: with three epochs instead of six steps, the schedule has twelve steps."""
    assert resumed(tmp_path / "parts", max_steps="-1", num_train_epochs="3") == 0
    rows = [row for row in read_rows(tmp_path / "parts") if "loss" in row and row["step"] >= RESUMED]
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [1e-2 * (12 - n) / 12 for n in range(4, 12)]
    )


def test_how_often_is_logged_and_saved_may_change_freely(finished: Finished, tmp_path: Path) -> None:
    output = finished.cut(tmp_path / "parts")
    words = options(finished.model, finished.rows, output, logging_steps="2", save_steps="1")
    assert run("sft", words, "--resume_from_checkpoint", "auto") == 0
    assert [row["step"] for row in read_rows(output) if "loss" in row] == [1, 2, 3, 4, 6]
    assert (output / "checkpoint-5").is_dir()


REFUSED = {
    "lora_r": {"lora_r": "8"},
    "lora_target_modules": {"lora_target_modules": "q_proj"},
    "optim": {"optim": "sgd"},
    "loraplus_lr_ratio": {"loraplus_lr_ratio": "4"},
    "use_dora": {"use_dora": "true"},
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_no_resume_can_change_is_refused_before_anything_moves(
    finished: Finished,
    resumed: Callable[..., int],
    tmp_path: Path,
    change: str,
    capsys: pytest.CaptureFixture,
) -> None:
    output = tmp_path / "parts"
    assert resumed(output, **REFUSED[change]) == 2
    told = capsys.readouterr().err
    assert "cannot be resumed with other values of these, not even by allow_config_change" in told
    assert f"  {change}: " in told
    left = {path.relative_to(output) for path in output.rglob("*")}
    assert left == {
        path.relative_to(tmp_path / "again") for path in finished.cut(tmp_path / "again").rglob("*")
    }


def test_every_option_with_a_rule_exists() -> None:
    found = {*changes.fixed("zero3", {"lr_scheduler_type": "greedy"}, None)} - OPTIONS
    assert not found


@pytest.mark.parametrize(
    ("strategy", "config", "key", "why"),
    [
        ("zero3", {"learning_rate": 1e-4}, "learning_rate", "DeepSpeed"),
        ("zero3", {"weight_decay": 0.0}, "weight_decay", "DeepSpeed"),
        ("ddp", {"learning_rate": 1e-4, "lr_scheduler_type": "greedy"}, "learning_rate", "greedy depends"),
    ],
)
def test_states_that_cannot_be_written_over_are_named(
    strategy: str, config: dict[str, Any], key: str, why: str
) -> None:
    then, now = recorded(config=config), {**config, key: 0.5}
    with pytest.raises(UserError, match=why):
        changes.compare(then, "checkpoint-3", [key], now, changes.fixed(strategy, now, then))


def _groups(output: Path) -> list[dict[str, Any]]:
    return torch.load(output / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["param_groups"]
