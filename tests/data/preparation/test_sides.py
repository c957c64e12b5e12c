"""Rows of ORPO and CPO: the tokens of DPO's preparation, counted, cut, and never without an answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from halfbyte.data import DataReport, PreferencePairs, counted
from halfbyte.data.report import SplitReport
from halfbyte.data.rows import RowCheck
from halfbyte.errors import UserError
from tests import tiny

CLASSES = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}
Rows = list[dict[str, Any]]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def build(model_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """``build("orpo", rows)``: the trainer with counted rows; ``plain=True``: TRL's alone."""

    def build(
        recipe: str, rows: Rows, *, plain: bool = False, bos: bool = False, stream: bool = False, **given
    ):
        trainer_cls, config = CLASSES[recipe]
        base = model_dir("llama")
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = CHATML
        if not bos:
            tokenizer.bos_token = None
        report = DataReport(train=SplitReport(streaming=stream), format=PreferencePairs)
        data: Any = Dataset.from_list(rows)
        layout = PreferencePairs.detect(data.column_names, rows[0])
        report.train.check = RowCheck(
            split="train", layout=layout, tokenizer=tokenizer, roles=(), template=None,
            conversational=layout.conversational(rows[0]), assistant_only=False,
        )  # fmt: skip
        args = config(
            str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=len(rows),
            gradient_checkpointing=False, **given,
        )  # fmt: skip
        cls = trainer_cls if plain else counted(trainer_cls, report)
        return cls(
            model=AutoModelForCausalLM.from_pretrained(base),
            args=args,
            train_dataset=data.to_iterable_dataset() if stream else data,
            processing_class=tokenizer,
        )

    return build


def batch(trainer: Any) -> dict[str, torch.Tensor]:
    rows = list(trainer.train_dataset)
    found = trainer.data_collator(rows)
    return {key: value for key, value in found.items() if key.startswith(("chosen_", "rejected_"))}


def answer(trainer: Any, row: int = 0, side: str = "chosen") -> list[int]:
    labels = batch(trainer)[f"{side}_labels"][row]
    return labels[labels != -100].tolist()


@pytest.mark.parametrize("recipe", CLASSES)
@pytest.mark.parametrize("max_length", [1024, 24])
def test_text_is_tokenized_as_trl_does(build: Callable[..., Any], recipe: str, max_length: int) -> None:
    rows = tiny.preferences(8)
    ours = batch(build(recipe, rows, max_length=max_length))
    theirs = batch(build(recipe, rows, max_length=max_length, plain=True))
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert torch.equal(ours[key], expected), key


@pytest.mark.parametrize("recipe", CLASSES)
def test_a_conversation_has_one_end_and_the_beginning_of_its_template(
    build: Callable[..., Any], recipe: str
) -> None:
    turns = [[{"role": "assistant", "content": text}] for text in ("red", "blue sky")]
    rows = [
        {"prompt": [{"role": "user", "content": "the sea"}], "chosen": turns[0], "rejected": turns[1]}
    ] * 2
    ours, theirs = (build(recipe, rows, bos=True, plain=plain) for plain in (False, True))
    tokenizer = ours.processing_class
    assert tokenizer.decode(answer(ours)) == "red<|im_end|>\n"
    assert tokenizer.decode(answer(theirs)) == "red<|im_end|>\n<|im_end|>"
    begins = [tokenizer.decode(batch(each)["chosen_input_ids"][0][0]) for each in (ours, theirs)]
    assert begins == ["<|im_start|>", "<|endoftext|>"]


@pytest.mark.parametrize("recipe", CLASSES)
def test_a_token_across_the_boundary_belongs_to_the_answer(build: Callable[..., Any], recipe: str) -> None:
    """`re` and `d` become one token together."""
    trainer = build(recipe, [{"prompt": "the re", "chosen": "d fox", "rejected": "d dog"}] * 2)
    tokenizer = trainer.processing_class
    whole = tokenizer("the red fox<|im_end|>")["input_ids"]
    ids = batch(trainer)["chosen_input_ids"][0].tolist()
    assert ids[: len(whole)] == whole
    assert tokenizer.decode(answer(trainer)).endswith("red fox<|im_end|>")


@pytest.mark.parametrize("recipe", CLASSES)
def test_a_prompt_that_fills_max_length_is_dropped_and_counted(
    build: Callable[..., Any], recipe: str
) -> None:
    short = {"prompt": "the", "chosen": " red fox", "rejected": " blue dog"}
    long = {"prompt": " ".join(["fox"] * 30), "chosen": " red", "rejected": " blue"}
    trainer = build(recipe, [short, long, short], max_length=12)
    counts = trainer.rows_report.train
    assert (len(trainer.train_dataset), counts.lost_rows, counts.truncated) == (2, 1, 0)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch(trainer))
    assert loss.isfinite()
    theirs = build(recipe, [short, long, short], max_length=12, plain=True)
    loss, _ = theirs.get_batch_loss_metrics(theirs.model, batch(theirs))
    assert loss.isfinite() == (recipe == "cpo"), "TRL's own rows"


@pytest.mark.parametrize("recipe", CLASSES)
def test_rows_are_counted_cut_and_compared(build: Callable[..., Any], recipe: str) -> None:
    rows = tiny.preferences(150)
    rows[3] = {**rows[3], "rejected": rows[3]["chosen"]}
    trainer = build(recipe, rows, max_length=20)
    counts = trainer.rows_report.train
    assert counts.equal_rows == [4]
    assert counts.truncated > 0
    kept = batch(trainer)
    masks = [kept[f"{side}_attention_mask"] for side in ("chosen", "rejected")]
    assert counts.tokens == sum(int(mask.sum()) for mask in masks)
    assert max(mask.shape[1] for mask in masks) == 20


@pytest.mark.parametrize("recipe", CLASSES)
def test_without_max_length_nothing_is_cut(build: Callable[..., Any], recipe: str) -> None:
    """TRL takes 512 for null."""
    rows = [{"prompt": "the", "chosen": " fox" * 600, "rejected": " dog" * 600}] * 2
    trainer = build(recipe, rows, max_length=None)
    assert batch(trainer)["chosen_input_ids"].shape[1] > 600
    assert trainer.args.max_length is None
    assert batch(build(recipe, rows, max_length=None, plain=True))["chosen_input_ids"].shape[1] == 512


def test_a_stream_is_prepared_as_it_arrives(build: Callable[..., Any]) -> None:
    rows = tiny.preferences(6)
    stream = build("orpo", rows, stream=True, max_steps=1)
    assert isinstance(stream.train_dataset, IterableDataset)
    whole = batch(build("orpo", rows))
    for key, value in batch(stream).items():
        assert torch.equal(value, whole[key])


def test_no_row_left_is_an_error(build: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no row has a token to train on"):
        build("orpo", [{"prompt": "fox " * 30, "chosen": " red", "rejected": " blue"}] * 3, max_length=8)
