"""Which run is better and why: columns, order, selection, verdicts, differences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import UserError
from halfbyte.tracking.columns import columns
from halfbyte.tracking.comparison import differences, verdicts
from halfbyte.tracking.runs import Run, find
from halfbyte.tracking.selection import ordered, selected
from tests.tracking.written import write_run

PAIRS = [
    {"step": 0, "eval_rewards/accuracies": 0.0, "eval_rewards/chosen": 0.0, "eval_rewards/rejected": 0.0},
    {"step": 10, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.5},
    {"step": 20, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.6},
]
Make = Callable[..., list[Run]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(a={...}, b={...})``: runs of these names, written with these arguments and read."""

    def runs(**each: dict[str, Any]) -> list[Run]:
        for name, given in each.items():
            write_run(tmp_path / name, **given)
        return find([tmp_path]).runs

    return runs


def cells(runs: list[Run]) -> dict[str, list[str]]:
    return {column.name: column.cells for column in columns(runs)}


def test_figures_of_evaluations_come_first_the_best_with_its_step(make: Make) -> None:
    runs = make(a={"losses": (2.0, 1.25, 1.5)}, b={"losses": (2.0,), "record": {"total_steps": None}})
    found = cells(runs)
    assert list(found)[:5] == ["name", "best eval loss", "status", "last eval loss", "steps"]
    assert found["best eval loss"] == ["1.25 @10", "2 @0"]
    assert found["last eval loss"] == ["1.5", "2"]
    assert found["steps"] == ["20/20", "0/20"]
    assert found["peak_memory"] == ["2.00 GiB", "2.00 GiB"]
    assert found["tokens_per_second"] == ["1.23k", "1.23k"]
    assert (found["base"][0], found["data"][0]) == ("owner/base", "chat, 56 rows")


def test_a_recipe_s_own_figures_and_no_others_and_ties_are_no_accuracy(make: Make) -> None:
    token_accuracy = {"step": 10, "eval_mean_token_accuracy": 0.5}
    runs = make(a={"recipe": "dpo", "rows": [*PAIRS, token_accuracy]}, b={"rows": [token_accuracy, *PAIRS]})
    found = cells(runs)
    assert found["best eval accuracy"] == ["0.750 @10", "-"]
    assert found["last eval accuracy"] == ["0.500", "-"]
    assert found["best eval token accuracy"] == ["-", "0.500 @10"]


def test_without_evaluations_the_last_of_training(make: Make) -> None:
    found = cells(make(a={"losses": (), "rows": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 4.0}]}))
    assert found["last train loss"] == ["4"]
    assert not [name for name in found if "best" in name]


def test_a_last_value_that_is_not_finite_is_no_earlier_one(make: Make) -> None:
    diverged = {"losses": (2.0, 1.0), "rows": [{"step": 20, "eval_loss": None}]}
    runs = make(
        a=diverged, b={"losses": (2.0, 1.5)}, c={"losses": (), "rows": [{"step": 0, "eval_loss": None}]}
    )
    found = cells(runs)
    assert found["best eval loss"] == ["1 @10", "1.5 @10", "nan"]
    assert found["last eval loss"] == ["nan", "1.5", "nan"]
    assert verdicts(runs) == ["eval loss: best is a, 1 at step 10, last nan; next b, 1.5 at step 10"]


def test_several_evaluations_have_a_column_each(make: Make) -> None:
    found = cells(
        make(a={"losses": (), "rows": [{"step": 1, "eval_x_loss": 3.0}, {"step": 1, "eval_y_loss": 4.0}]})
    )
    assert (found["last eval x loss"], found["last eval y loss"]) == (["3"], ["4"])


ORDERS = {
    "eval_loss": ("b a c", "by eval_loss, the least first"),
    "loss": ("b a c", "by eval_loss, the least first"),
    "eval_rewards/accuracies": ("a b c", "by eval_rewards/accuracies, the greatest first"),
    "rewards/accuracies": ("a b c", "by eval_rewards/accuracies, the greatest first"),
    "steps": ("a c b", "by steps, the greatest first"),
    "name": ("a b c", "by name, the least first"),
    "warmup_steps": ("b a c", "by warmup_steps, the least first"),
    "learning_rate": ("c b a", "by learning_rate, the least first"),
    "tokens_per_second": ("b a c", "by tokens_per_second, the greatest first"),
    "peak-memory": ("a b c", "by peak_memory, the least first"),
}


@pytest.mark.parametrize("key", ORDERS)
def test_the_best_comes_first_and_what_has_no_value_last(make: Make, key: str) -> None:
    runs = make(
        # What is logged of the learning rate is how it ended.
        a={"recipe": "dpo", "rows": [*PAIRS, {"step": 20, "learning_rate": 0.0}], "learning_rate": 3e-4},
        b={
            "warmup_steps": 0,
            "losses": (2.0, 0.5),
            "learning_rate": 2e-4,
            "record": {"tokens_per_second": 9e9},
        },
        c={
            "losses": (),
            "rows": [{"step": 20, "entropy": 1.0}],
            "record": {"steps": 20, "tokens_per_second": None},
        },
    )
    names, said = ORDERS[key]
    found, order = ordered(runs, key)
    assert ([run.name for run in found], order) == (names.split(), said)


def test_greater_is_better_of_the_run_decides(make: Make) -> None:
    given = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    runs = make(a={"losses": (3.0, 1.0), **given}, b={"losses": (2.0, 1.5), **given})
    assert [run.name for run in ordered(runs, "eval_loss")[0]] == ["a", "b"]
    assert cells(runs)["best eval loss"] == ["3 @0", "2 @0"]


CHOSEN = {
    "status=completed": "ab",
    "status=failed": "c",
    "recipe=dpo": "c",
    "learning_rate=3e-4": "b",
    "learning-rate=0.0001": "ac",
    "use_dora=true": "b",
    "warmup_ratio=null": "abc",
    'lora_target_modules=["all-linear"]': "abc",
    "data=chat": "ab",
    "dataset_name=/data/chat": "ab",
    "dataset_name=pairs": "c",
    "base=owner/base": "abc",
    "lora_r=many": "",
}


@pytest.mark.parametrize("condition", CHOSEN)
def test_conditions_choose(make: Make, condition: str) -> None:
    runs = make(
        a={"warmup_ratio": None},
        b={"learning_rate": 3e-4, "use_dora": True, "warmup_ratio": None},
        c={
            "recipe": "dpo",
            "record": {"status": "failed"},
            "dataset_name": "/data/pairs",
            "warmup_ratio": None,
        },
    )
    assert "".join(run.name for run in selected(runs, [condition])) == CHOSEN[condition]


def test_unknown_keys_are_answered_with_the_nearest(make: Make) -> None:
    runs = make(a={})
    with pytest.raises(
        UserError, match=r"--where: no column or option is named 'lora_rr'; did you mean lora_r\?"
    ):
        selected(runs, ["lora_rr=16"])
    with pytest.raises(UserError, match=r"--where: 'status' is not written key=value"):
        selected(runs, ["status"])
    with pytest.raises(
        UserError, match=r"--sort: .* named 'eval_los'; did you mean eval_loss\?\n  columns: name"
    ):
        ordered(runs, "eval_los")


def test_the_verdict_names_the_best_and_the_next(make: Make) -> None:
    runs = make(a={"losses": (2.0, 1.25, 1.5)}, b={"losses": (2.0, 1.5, 1.0)}, c={"losses": (2.0, 1.75)})
    assert verdicts(runs) == ["eval loss: best is b, 1 at step 20; next a, 1.25 at step 10, last 1.5; 1 more"]


def test_equal_runs_are_equal_and_close_ones_are_told_apart(make: Make) -> None:
    assert verdicts(make(a={}, b={})) == ["eval loss: equal at best, 1"]
    close = make(a={"losses": (1.00001,)}, b={"losses": (1.00002,)})
    assert verdicts(close) == ["eval loss: best is a, 1.00001 at step 0; next b, 1.00002 at step 0"]


NOT_COMPARED = "eval loss: not compared, its scale depends on what differs: "


def test_a_loss_of_another_objective_or_tokenizer_is_not_compared(make: Make) -> None:
    runs = make(
        a={"recipe": "dpo", "rows": PAIRS, "beta": 0.1, "record": {"tokenizer": {"sha": "t"}}},
        b={"recipe": "dpo", "rows": PAIRS[:2], "beta": 0.3, "record": {"tokenizer": {"sha": "u"}}},
    )
    assert verdicts(runs) == [
        f"{NOT_COMPARED}beta, the tokenizer",
        "eval accuracy: equal at best, 0.750",
        f"{NOT_COMPARED.replace('loss', 'margin')}beta, the tokenizer",
    ]


def test_runs_that_evaluated_on_other_rows_are_not_compared(make: Make) -> None:
    other = {"data": {"eval": {"sha": "f" * 64}}}
    assert verdicts(make(a={}, b={"record": other})) == [
        "not compared with each other: runs of different evaluation rows"
    ]
    assert verdicts(make(a={}, b={"recipe": "dpo"})) == [
        "not compared with each other: runs of different recipes"
    ]


def test_what_differs_and_only_that(make: Make) -> None:
    runs = make(
        a={"lora_target_modules": ["q_proj"]},
        b={"learning_rate": 2e-4, "only_here": 1, "record": {"strategy": {"name": "ddp", "world_size": 2}}},
    )
    found = differences(runs)
    assert found.values == {
        "learning_rate": ["0.0001", "0.0002"],
        "lora_target_modules": ['["q_proj"]', '["all-linear"]'],
        "strategy": ["single", "ddp"],
        "processes": ["1", "2"],
    }
    assert found.not_shared == 1


def test_rows_that_changed_under_one_name_differ(make: Make) -> None:
    runs = make(a={}, b={"record": {"data": {"sha": "c" * 64}, "versions": {"torch": "2.14.0"}}})
    assert differences(runs).values == {
        "data": ["d" * 12, "c" * 12],
        "evaluation rows": ["e" * 12, "null"],
        "version of torch": ["2.13.0", "2.14.0"],
    }
