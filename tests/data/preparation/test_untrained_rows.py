"""Rows that train nothing are dropped and counted: pairs with equal sides, and rows without a label."""

from typing import Any

import pytest
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from halfbyte.data import PreferencePairs, Text, counted
from halfbyte.data.preparation.counting import PAIRS
from tests import tiny
from tests.data.conftest import dpo, refusal, reward, run_data, sft, turn
from tests.data.preparation.test_prepared import build

CHATTY = tiny.CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['thinking'] }}")


def pairs(rows: int, equal: list[int]) -> list[dict[str, Any]]:
    """Pairs whose sides differ, but for those with the numbers ``equal``."""
    return [
        {"prompt": "a", "chosen": f"b{n}", "rejected": f"b{n}" if n in equal else f"c{n}"}
        for n in range(1, rows + 1)
    ]


def spoken(rows: int, **differing: dict[str, Any]) -> list[dict[str, Any]]:
    """Pairs of conversations; row 7 has one answer twice, the second with the keys ``differing``."""
    asked, said = turn("user", "hi"), turn("assistant", "yes")
    made = [
        {"prompt": [asked], "chosen": [said], "rejected": [turn("assistant", f"no {n}")]} for n in range(rows)
    ]
    made[6]["rejected"] = [{**said, **differing}]
    return made


def prepared(
    path: str, training: Any, trainer_cls: Any = DPOTrainer, format: Any = PreferencePairs, **options: Any
):
    """The training rows as the trainer prepares them, and their report."""
    tokenizer = options.pop("tokenizer", tiny.tokenizer())
    data = run_data(path, training, format, tokenizer=tokenizer, **options)
    trainer = build(counted(trainer_cls, data.report), data, training, tokenizer)
    return trainer.train_dataset, data.report


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_are_equal_when_they_train_the_same_tokens(write, tmp_path, streaming) -> None:
    for differing, template, left in (
        ({"score": 1}, tiny.CHAT_TEMPLATE, 119),  # not rendered
        ({"thinking": "why"}, tiny.CHAT_TEMPLATE, 119),
        ({"thinking": "why"}, CHATTY, 120),
        ({"reasoning_content": "why"}, CHATTY, 120),
    ):
        path = write("a.jsonl", spoken(120, **differing))
        tokenizer = tiny.tokenizer(chat_template=template)
        training = dpo(tmp_path, max_steps=1)
        rows, report = prepared(path, training, tokenizer=tokenizer, dataset_streaming=streaming)
        assert len(list(rows)) == left, differing
        if not streaming:
            assert report.train.equal_rows == ([7] if left == 119 else [])


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("streaming", [False, True])
def test_sides_that_are_equal_after_truncation_are_equal(write, tmp_path, mode, streaming) -> None:
    rows = pairs(250, [])
    rows[3] = {"prompt": " the" * 8, "chosen": " a" * 4 + " fox", "rejected": " a" * 4 + " dog"}
    rows[1]["prompt"] = " the" * 12  # its prompt fills `max_length`
    training = dpo(tmp_path, max_length=10, truncation_mode=mode, max_steps=1)
    kept, report = prepared(write("a.jsonl", rows), training, dataset_streaming=streaming)
    start = mode == "keep_start"
    kept = list(kept)
    assert len(kept) == (248 if start else 250)
    assert "row number" not in kept[0]
    if not streaming:
        found = report.as_dict()
        assert (found["dropped_equal_pairs"], found["dropped_no_label"]) == ((1, 1) if start else (0, 0))
        assert report.train.equal_rows == ([4] if start else [])


def test_the_same_tail_of_other_sides_is_not_equal_where_more_of_it_is_trained() -> None:
    limits = type("Limits", (), {"max_length": 2, "truncation_mode": "keep_end"})
    row = {"prompt_ids": [5, 6], "chosen_ids": [6], "rejected_ids": [6, 6]}
    assert PAIRS.differ(row, limits)  # 6 6, with the loss on one and on both
    assert not PAIRS.differ({**row, "prompt_ids": [6], "chosen_ids": [7, 6, 6]}, limits)


def test_what_is_dropped_is_counted_and_named_by_its_row(write, tmp_path) -> None:
    rows, report = prepared(write("a.jsonl", pairs(400, [3, 90, 400])), dpo(tmp_path))
    assert len(rows) == 397
    found = report.as_dict()
    assert (found["rows"], found["dropped"], found["dropped_equal_pairs"]) == (400, 3, 3)
    assert "3 dropped (equal sides: row 3, 90, 400)" in report.lines()[0]
    scored, report = prepared(write("a.jsonl", pairs(400, [3, 90])), reward(tmp_path), RewardTrainer)
    assert (len(scored), report.train.equal_rows) == (398, [3, 90])


@pytest.mark.parametrize("streaming", [False, True])
def test_more_than_one_percent_is_an_error(write, tmp_path, streaming) -> None:
    rows = pairs(1100, [])
    for number in range(1, 30):
        rows[number]["rejected"] = rows[number]["chosen"] + " and" * 20
        rows[number]["chosen"] += " and" * 30
    path, training = write("a.jsonl", rows), dpo(tmp_path, max_length=12, max_steps=1)
    seen = "29 of 1,000 rows" if streaming else "29 of 1,100 rows"
    with refusal("train: ", seen, "row 2, 3, 4, 5, 6, ...", "max_length 12"):
        list(prepared(path, training, dataset_streaming=streaming)[0])


def test_a_second_epoch_of_a_stream_counts_anew(write, tmp_path) -> None:
    path = write("a.jsonl", pairs(1200, range(1, 9)))
    rows, _ = prepared(path, dpo(tmp_path, max_steps=1), dataset_streaming=True)
    assert [len(list(rows)) for _ in range(3)] == [1192] * 3


ROWS = [{"prompt": " the" * 3, "completion": " fox"}, {"prompt": " the" * 12, "completion": " dog"}] * 6


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_packing_keeps_no_sequence_without_a_label(write, tmp_path, strategy, streaming, shuffled) -> None:
    training = sft(
        tmp_path, packing=True, packing_strategy=strategy, max_length=6, max_steps=1, shuffle_dataset=shuffled
    )
    path = write("a.jsonl", ROWS)
    rows, report = prepared(path, training, SFTTrainer, Text, dataset_streaming=streaming)
    rows = list(rows)
    assert all(any(label != -100 for label in row["labels"]) for row in rows)
    fox, dog = tiny.tokenizer()(" fox dog")["input_ids"]
    trained_ids = [token for row in rows for token in row["labels"] if token in (fox, dog)]
    assert trained_ids.count(fox) == 6
    assert trained_ids.count(dog) == (0 if strategy == "bfd" else 6)
    if not streaming:
        assert report.train.packed == len(rows)
        assert report.train.lost_rows == (6 if strategy == "bfd" else 0)
        if strategy == "bfd":
            assert report.train.tokens == sum(len(row["labels"]) for row in rows)


@pytest.mark.parametrize("options", [{}, {"packing": True}, {"max_length": None}])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_rows_that_came_without_a_label_are_dropped(write, tmp_path, options, streaming) -> None:
    rows = [{"input_ids": [5, 6, 2], "labels": [-100] * 3}, {"input_ids": [5, 7, 2], "labels": [5, 7, 2]}] * 4
    training = sft(tmp_path, max_steps=1, **options)
    found, report = prepared(write("a.jsonl", rows), training, SFTTrainer, Text, dataset_streaming=streaming)
    ids = [token for row in found for token in row["input_ids"]]
    assert ids == [5, 7, 2] * 4
    if not streaming:
        assert (report.train.lost_rows, report.train.tokens) == (4, 12)


@pytest.mark.parametrize("recipe", ["sft", "packed", "dpo", "reward"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_stream_that_dropping_empties_is_an_error(write, tmp_path, recipe, split) -> None:
    long, short = {"prompt": " the" * 12}, {"prompt": " the"}
    sides = {"completion": " fox", "chosen": " fox", "rejected": " dog"}
    columns = ("prompt", "completion") if recipe in ("sft", "packed") else ("prompt", "chosen", "rejected")

    def rows(prompt: dict[str, str]) -> list[dict[str, str]]:
        return [{column: {**prompt, **sides}[column] for column in columns}] * 4

    write("d/train.jsonl", rows(long if split == "train" else short))
    write("d/test.jsonl", rows(long if split == "eval" else short))
    options = {"max_length": 8, "max_steps": 1, "eval_strategy": "steps"}
    training = {
        "sft": lambda: sft(tmp_path, **options),
        "packed": lambda: sft(tmp_path, **options, packing=True),
        "dpo": lambda: dpo(tmp_path, **options),
        "reward": lambda: reward(tmp_path, **options),
    }[recipe]()
    trainer_cls = {"dpo": DPOTrainer, "reward": RewardTrainer}.get(recipe, SFTTrainer)
    format = Text if trainer_cls is SFTTrainer else PreferencePairs
    with refusal(f"{split}: ", "max_length", "8"):
        prepared(str(tmp_path / "d"), training, trainer_cls, format, dataset_streaming=True)


def test_a_stream_of_equal_pairs_is_an_error(write, tmp_path) -> None:
    path = write("a.jsonl", pairs(8, range(1, 9)))
    with refusal("train: ", "no row is left", "chosen and rejected train the same tokens"):
        prepared(path, dpo(tmp_path, max_steps=1), dataset_streaming=True)


def test_plain_trl_keeps_packs_without_a_label(write, tmp_path) -> None:
    """When this fails the packs need no second look."""
    training = sft(tmp_path, packing=True, max_length=6)
    rows = build(SFTTrainer, run_data(write("a.jsonl", ROWS), training), training).train_dataset
    assert any(all(label == -100 for label in row["labels"]) for row in rows)
