"""The counting trainers train on exactly what TRL's own would, and say what was lost."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from halfbyte.data import DataFormat, PreferencePairs, Text, UnpairedPreferences, check_labels, counted
from halfbyte.data.preparation.counting import Counts, Prepared
from halfbyte.data.report import DataReport
from halfbyte.errors import UserError
from tests import tiny
from tests.data.conftest import dpo, kto, plain, refusal, reward, run_data, sft, turn

SHAPE = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}


def model(trainer_cls=SFTTrainer):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_attention_heads=2, eos_token_id=2, pad_token_id=3)
    if issubclass(trainer_cls, RewardTrainer):
        config.num_labels = 1
        return LlamaForSequenceClassification(config)
    return LlamaForCausalLM(config)


def build(trainer_cls, data, training, tokenizer=None):
    # A whole second model is the reference here: these trainers have no adapter to switch off.
    reference = {"ref_model": model()} if issubclass(trainer_cls, DPOTrainer | KTOTrainer) else {}
    return trainer_cls(
        model(trainer_cls),
        **reference,
        args=training,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer or tiny.tokenizer(),
    )


def trained(path, training, format=Text, tokenizer=None, trainer_cls=SFTTrainer, **options):
    data = run_data(path, training, format, tokenizer=tokenizer, **options)
    trainer = build(counted(trainer_cls, data.report), data, training, tokenizer)
    check_labels(trainer, data.report)
    return trainer, data.report


TALKS = [
    {
        "messages": [
            turn("system", "be the fox"),
            turn("user", tiny.text(n)),
            turn("assistant", tiny.text(n + 1)),
            turn("user", tiny.text(n + 2)),
            turn("assistant", tiny.text(n + 3)),
        ]
    }
    for n in range(30)
]
COMPLETIONS = [
    {"prompt": tiny.text(n), "completion": " " + " ".join(tiny.text(m) for m in range(n % 4 + 1))}
    for n in range(30)
]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (tiny.texts(30), {}),
        (tiny.texts(30), {"max_length": 8}),
        (tiny.texts(30), {"max_length": 8, "truncation_mode": "keep_end"}),
        (tiny.texts(30), {"max_length": None}),
        (tiny.texts(30), {"shuffle_dataset": True}),
        (tiny.texts(30), {"packing": True, "max_length": 32}),
        (tiny.texts(30), {"packing": True, "max_length": 32, "shuffle_dataset": True}),
        (tiny.texts(30), {"packing": True, "max_length": 9, "packing_strategy": "bfd_split"}),
        (tiny.texts(30), {"packing": True, "max_length": 32, "packing_strategy": "wrapped"}),
        (COMPLETIONS, {"max_length": 24}),
        (COMPLETIONS, {"max_length": 24, "packing": True}),
        (TALKS, {"assistant_only_loss": True, "max_length": 48}),
        (TALKS, {"assistant_only_loss": True, "max_length": 48, "shuffle_dataset": True}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_sft_rows_equal_plain_trl(write, tmp_path, rows, options):
    path = write("a.jsonl", rows)
    training = sft(tmp_path, **options)
    trainer, report = trained(path, training)
    data = run_data(path, training)
    same = build(SFTTrainer, data, training).train_dataset
    assert trainer.train_dataset["input_ids"][:] == same["input_ids"][:]
    assert trainer.train_dataset["labels"][:] == same["labels"][:]
    assert trainer.train_dataset.column_names == same.column_names
    assert report.train.tokens == sum(map(len, same["input_ids"]))
    if options.get("packing"):
        assert report.train.packed == len(same)
    else:
        assert report.train.dropped == len(rows) - len(same)


def ids(text: str) -> list[int]:
    return tiny.tokenizer()(text)["input_ids"]


def test_what_is_dropped_and_truncated_is_counted(write, tmp_path):
    assert len(ids(" the" * 10)) == 10
    rows = [
        {"prompt": " the" * 3, "completion": " the"},  # 5 tokens with its end: whole
        {"prompt": " the" * 3, "completion": " the" * 9},  # 13: cut
        {"prompt": " the" * 10, "completion": " the"},  # its prompt fills max_length: dropped
        {"prompt": " the" * 9, "completion": " the"},  # 11: only one label left
    ]
    path = write("a.jsonl", rows)
    _, report = trained(path, sft(tmp_path, max_length=10))
    expected = {"rows": 4, "tokens": 25, "dropped": 1, "dropped_no_label": 1, "truncated": 2, "packed": None}
    assert {key: report.as_dict()[key] for key in expected} == expected
    assert report.lines() == [
        "train: 4 rows, 25 tokens; 2 truncated at max_length 10; 1 dropped (no label left)"
    ]
    _, report = trained(path, sft(tmp_path, max_length=10, truncation_mode="keep_end"))
    assert (report.train.tokens, report.train.dropped, report.train.truncated) == (35, 0, 3)
    _, report = trained(path, sft(tmp_path, max_length=10, packing=True))
    assert (report.train.tokens, report.train.dropped, report.train.truncated) == (25, 1, 2)
    assert "packed into 3 sequences" in report.lines()[0]
    _, report = trained(path, sft(tmp_path, max_length=10, packing=True, packing_strategy="wrapped"))
    assert (report.train.tokens, report.train.truncated) == (41, 0)


def test_the_test_split_has_a_report_of_its_own(write, tmp_path):
    write("d/train.jsonl", tiny.texts(6))
    write("d/test.jsonl", tiny.texts(3))
    trainer, report = trained(str(tmp_path / "d"), sft(tmp_path, max_length=8, eval_strategy="steps"))
    assert report.as_dict()["eval"]["rows"] == 3
    longer = sum(len(ids(row["text"])) + 1 > 8 for row in tiny.texts(3))
    assert report.as_dict()["eval"]["truncated"] == longer > 0
    assert len(report.lines()) == 2
    before = report.as_dict()
    trainer.evaluate()
    trainer.evaluate(trainer.eval_dataset)
    assert report.as_dict() == before


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_dpo_rows_equal_plain_trl_and_are_counted(write, tmp_path, mode):
    rows = [{"prompt": " the" * (n + 1), "chosen": " a a", "rejected": " fox" * (n + 1)} for n in range(12)]
    rows[1]["rejected"] = " a"
    path = write("a.jsonl", rows)
    training = dpo(tmp_path, max_length=10, truncation_mode=mode)
    trainer, report = trained(path, training, PreferencePairs, trainer_cls=DPOTrainer)
    same = build(DPOTrainer, run_data(path, training, PreferencePairs), training).train_dataset
    assert trainer.train_dataset[:] == same[:]
    batch = DataCollatorForPreference(pad_token_id=3, max_length=10, truncation_mode=mode)(list(same))
    whole = DataCollatorForPreference(pad_token_id=3)(list(same))
    lengths, full = batch["attention_mask"].sum(1), whole["attention_mask"].sum(1)
    cut = (lengths < full).view(2, -1).any(0).sum().item()
    assert cut > 0
    assert report.train.tokens == lengths.sum().item()
    assert report.train.truncated == cut
    assert report.train.dropped == 12 - len(same) == (3 if mode == "keep_start" else 0)
    assert batch["completion_mask"].sum(1).min() > 0


def test_kto_rows_equal_plain_trl_and_are_counted(write, tmp_path):
    rows = [
        {"prompt": " the" * (n + 1), "completion": " a" * (n % 3 + 1), "label": n % 2 == 0} for n in range(12)
    ]
    path = write("a.jsonl", rows)
    training = kto(tmp_path, max_length=10)
    trainer, report = trained(path, training, UnpairedPreferences, trainer_cls=KTOTrainer)
    same = build(KTOTrainer, run_data(path, training, UnpairedPreferences), training).train_dataset
    assert trainer.train_dataset[:] == same[:]
    batch = DataCollatorForUnpairedPreference(pad_token_id=3, max_length=10)(list(same))
    whole = DataCollatorForUnpairedPreference(pad_token_id=3)(list(same))
    lengths, full = batch["attention_mask"].sum(1), whole["attention_mask"].sum(1)
    assert report.train.tokens == lengths.sum().item()
    assert report.train.truncated == (lengths < full).sum().item() > 0
    assert report.train.dropped == report.train.lost_rows == 12 - len(same) == 3
    refused(
        "no row trains an end", path=write("b.jsonl", rows[4:8]), training=kto(tmp_path, max_length=6),
        format=UnpairedPreferences, trainer_cls=KTOTrainer,
    )  # fmt: skip


def test_reward_rows_equal_plain_trl_and_are_counted(write, tmp_path):
    rows = [{"prompt": " the" * (n + 1), "chosen": " a a", "rejected": " a" * (n + 3)} for n in range(6)]
    path = write("a.jsonl", rows)
    training = reward(tmp_path, max_length=10)
    trainer, report = trained(path, training, PreferencePairs, trainer_cls=RewardTrainer)
    same = build(RewardTrainer, run_data(path, training, PreferencePairs), training).train_dataset
    assert trainer.train_dataset[:] == same[:]
    assert report.train.tokens == sum(
        len(row[side]) for row in same for side in ("chosen_ids", "rejected_ids")
    )
    found = report.as_dict()
    assert (found["truncated"], found["dropped"], found["dropped_no_label"]) == (0, 6 - len(same), 0)
    assert found["dropped_too_long"] == 6 - len(same) == 3
    assert report.lines()[0].endswith("; 3 dropped (longer than max_length 10)")
    refused(
        "train: every row is longer than `max_length` 3", path=path, training=reward(tmp_path, max_length=3),
        format=PreferencePairs, trainer_cls=RewardTrainer,
    )  # fmt: skip


def test_a_third_party_format_counts_its_own_columns(write, tmp_path):
    class Doubling(DPOTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            ready = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            return ready.map(lambda row: {"both": row["chosen_ids"] + row["rejected_ids"]})

    both = Prepared(("both",), lambda dataset, args: Counts(sum(map(len, dataset["both"])), truncated=1))
    format = DataFormat("both sides", PreferencePairs.layouts, prepared=(both,))
    trainer, report = trained(
        write("a.jsonl", tiny.preferences(4)), dpo(tmp_path), format, trainer_cls=Doubling
    )
    assert report.train.tokens == sum(map(len, trainer.train_dataset["both"]))
    assert report.train.truncated == 1


def labels_of(trainer, row: int) -> list[tuple[str, bool]]:
    tokenizer = trainer.processing_class
    example = trainer.train_dataset[row]
    return [
        (tokenizer.decode([token]), label != -100)
        for token, label in zip(example["input_ids"], example["labels"], strict=True)
    ]


def spoken(marked: list[tuple[str, bool]]) -> list[str]:
    """The stretches of text that are labels."""
    spans, open_ = [], False
    for text, label in marked:
        if label:
            spans = [*spans[:-1], spans[-1] + text] if open_ else [*spans, text]
        open_ = label
    return spans


def test_assistant_only_labels_are_every_answer_with_its_end(write, tmp_path):
    trainer, _ = trained(write("a.jsonl", TALKS), sft(tmp_path, assistant_only_loss=True))
    for row in (0, 7):
        answers = [m["content"] + "<|im_end|>" for m in TALKS[row]["messages"] if m["role"] == "assistant"]
        assert spoken(labels_of(trainer, row)) == answers


def test_completion_only_labels_are_the_completion_with_its_end(write, tmp_path):
    rows = [{"prompt": talk["messages"][:4], "completion": talk["messages"][4:]} for talk in TALKS]
    path = write("a.jsonl", rows)
    trainer, _ = trained(path, sft(tmp_path))  # prompt + completion: the default
    last = TALKS[3]["messages"][4]["content"]
    assert spoken(labels_of(trainer, 3)) == [last + "<|im_end|>"]
    trainer, _ = trained(path, sft(tmp_path, completion_only_loss=False))
    assert len(spoken(labels_of(trainer, 3))) == 1
    assert all(label for _, label in labels_of(trainer, 3))
    trainer, _ = trained(path, sft(tmp_path, assistant_only_loss=True))  # both masks: the last answer alone
    assert spoken(labels_of(trainer, 3)) == [last + "<|im_end|>"]
    trainer, _ = trained(write("b.jsonl", COMPLETIONS), sft(tmp_path))
    assert spoken(labels_of(trainer, 0)) == [COMPLETIONS[0]["completion"] + "<|im_end|>"]


@pytest.mark.parametrize("rows", [tiny.texts(4), tiny.conversations(4), COMPLETIONS[:4]])
def test_the_end_is_a_label_also_when_it_pads(write, tmp_path, rows):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer, report = trained(write("a.jsonl", rows), sft(tmp_path), tokenizer=tokenizer)
    batch = trainer.data_collator([{k: r[k] for k in ("input_ids", "labels")} for r in trainer.train_dataset])
    assert (batch["attention_mask"] == 0).any()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert (ends >= 1).all()
    assert "padding with the end token <|im_end|>" in report.lines()[-1]


def test_dpo_trains_the_end_on_both_sides(write, tmp_path):
    talk = [
        {"prompt": t["messages"][:2], "chosen": t["messages"][2:3], "rejected": t["messages"][4:]}
        for t in TALKS
    ]
    for name, rows in (("a.jsonl", tiny.preferences(6)), ("b.jsonl", talk)):
        trainer, _ = trained(write(name, rows), dpo(tmp_path), PreferencePairs, trainer_cls=DPOTrainer)
        for side in ("chosen_ids", "rejected_ids"):
            assert all(2 in row[-2:] for row in trainer.train_dataset[side])


def refused(*words: str, **options) -> None:
    with refusal(*words):
        trained(**options)


def test_no_label_left_is_refused(write, tmp_path):
    path = write("a.jsonl", COMPLETIONS)
    refused("train: no row has a token", "max_length 3", path=path, training=sft(tmp_path, max_length=3))
    packed = sft(tmp_path, max_length=3, packing=True)
    refused("train: no row has a token", path=path, training=packed)
    pairs = write("b.jsonl", tiny.preferences(6))
    refused(
        "no row has a token", path=pairs, training=dpo(tmp_path, max_length=3),
        format=PreferencePairs, trainer_cls=DPOTrainer,
    )  # fmt: skip
    masked = write("c.jsonl", [{"input_ids": [5, 6, 2], "labels": [-100] * 3}] * 3)
    refused("no row has a token", path=masked, training=sft(tmp_path, max_length=None))


def test_no_end_token_is_refused(write, tmp_path):
    path = write("a.jsonl", tiny.texts(20))
    refused("no row trains an end token (<|im_end|>)", "(4)", path=path, training=sft(tmp_path, max_length=4))
    outside = tiny.CHAT_TEMPLATE.replace(
        "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )  # the mark closes too early
    options = {"path": write("b.jsonl", TALKS), "tokenizer": tiny.tokenizer(chat_template=outside)}
    refused("no row trains an end", "generation", training=sft(tmp_path, assistant_only_loss=True), **options)
    trained(training=sft(tmp_path), **options)  # all tokens are labels
    endless = tiny.tokenizer(chat_template=tiny.CHAT_TEMPLATE.replace("<|im_end|>", ""))
    talk = [
        {"prompt": t["messages"][:2], "chosen": t["messages"][2:3], "rejected": t["messages"][4:]}
        for t in TALKS
    ]
    refused(
        "no row trains an end", path=write("c.jsonl", talk), training=dpo(tmp_path), tokenizer=endless,
        format=PreferencePairs, trainer_cls=DPOTrainer,
    )  # fmt: skip
    refused(
        "no row trains an end", path=write("d.jsonl", tiny.preferences(6)),
        training=dpo(tmp_path, max_length=8), format=PreferencePairs, trainer_cls=DPOTrainer,
    )  # fmt: skip


def test_an_end_token_that_opens_a_row_is_not_trained(write, tmp_path):
    """OPT begins every row with its end token, which no position predicts."""
    path = write("a.jsonl", [{"input_ids": [2, 5, 6]}] * 4)
    refused("no row trains an end", path=path, training=sft(tmp_path))
    refused("no row trains an end", path=path, training=sft(tmp_path, packing=True, max_length=8))


def test_the_turn_end_of_the_template_counts(write, tmp_path):
    """The end of sequence of many base models is not what ends a turn."""
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    trained(write("a.jsonl", TALKS), sft(tmp_path), tokenizer=tokenizer)


def test_a_row_that_only_tokenization_reaches_is_named(write, tmp_path, monkeypatch):
    monkeypatch.setattr("halfbyte.data.rows.RENDERED", 2)
    template = tiny.CHAT_TEMPLATE.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad') }}{% endif %}",
    )
    tokenizer = tiny.tokenizer(chat_template=template)
    path = write("a.jsonl", [*TALKS, {"messages": [turn("user", "bad")]}])
    refused("train row 31", "no bad", path=path, training=sft(tmp_path), tokenizer=tokenizer)
    pair = {
        "prompt": [turn("user", "a")],
        "chosen": [turn("assistant", "b")],
        "rejected": [turn("assistant", "c")],
    }
    rows = [pair] * 198 + [{**pair, "rejected": [turn("assistant", "bad")]}, pair]
    rows[5] = {**pair, "rejected": pair["chosen"]}
    refused(
        "train row 199", "no bad", path=write("b.jsonl", rows), training=dpo(tmp_path),
        tokenizer=tokenizer, format=PreferencePairs, trainer_cls=DPOTrainer,
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_trains_and_its_counts_are_unknown(write, tmp_path, packing):
    path = write("a.jsonl", tiny.texts(8))
    training = sft(tmp_path, max_steps=2, per_device_train_batch_size=2, packing=packing, max_length=64)
    trainer, report = trained(path, training, dataset_streaming=True)
    assert np.isfinite(trainer.train().training_loss)
    nulls = ("rows", "tokens", "sha", "dropped", "truncated")
    assert [report.as_dict()[key] for key in nulls] == [None] * 5
    refused(
        "no row trains an end", path=path, training=sft(tmp_path, max_steps=2, max_length=4),
        dataset_streaming=True,
    )  # fmt: skip


def test_a_bad_row_of_a_stream_stops_training_with_its_number(write, tmp_path):
    path = write("a.jsonl", [*tiny.texts(30), {"text": None}])
    training = sft(tmp_path, max_steps=40, per_device_train_batch_size=1)
    data = run_data(path, training, dataset_streaming=True)
    trainer = build(counted(SFTTrainer, data.report), data, training)
    with pytest.raises(UserError, match="train row 31: column 'text'"):
        trainer.train()


def test_trainers_that_prepare_nothing_are_returned_unchanged():
    class Mine:
        pass

    assert counted(Mine, DataReport()) is Mine
    assert counted(RewardTrainer, DataReport()).__name__ == "RewardTrainer"


def test_a_skipped_preparation_is_left_alone(write, tmp_path):
    path = write("a.jsonl", [{"input_ids": [5, 6, 2], "labels": [5, 6, 2]}] * 3)
    training = sft(tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
    _, report = trained(path, training)
    assert (report.train.rows, report.train.tokens) == (3, None)
    assert report.lines() == ["train: 3 rows"]
    data = run_data(path, plain())
    assert data.train.column_names == ["input_ids", "labels"]
