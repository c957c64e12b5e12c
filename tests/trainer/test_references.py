"""Reference log-probabilities computed once: their numbers, what they belong to, and when the pass is taken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, load_from_disk
from transformers import Trainer
from trl import DPOTrainer, KTOConfig, KTOTrainer

from halfbyte import QLoRAPlugin, store
from halfbyte.checkpoint import manifest
from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.resilience.memory import advised
from halfbyte_recipes.dpo import DPOArguments
from tests import tiny
from tests.checkpoint.runs import assert_equal, interrupted, options, run
from tests.trainer.preferences import (
    LN2,
    PAIRS,
    ModelDir,
    Passes,
    assert_live,
    cache,
    columns,
    dpo,
    first_loss,
    passes,
    small,
)

__all__ = ["cache", "dpo", "passes", "small"]


@pytest.mark.parametrize("fast", ["auto", "none"])
@pytest.mark.parametrize("ld_alpha", [None, 0.4])
def test_the_columns_are_what_a_live_reference_computes(
    dpo: Callable[..., Trainer], fast: str, ld_alpha: float | None
) -> None:
    trainer = dpo(fast=fast, ld_alpha=ld_alpha)
    assert_live(trainer, trainer.train_dataset)
    assert first_loss(trainer) == pytest.approx(LN2, abs=1e-6)


def test_in_bfloat16_the_first_loss_is_as_near_as_its_rounding(dpo: Callable[..., Trainer]) -> None:
    assert first_loss(dpo(dtype="bfloat16")) == pytest.approx(LN2, abs=2e-4)


def test_truncated_pairs_are_those_of_the_step(dpo: Callable[..., Trainer]) -> None:
    for mode in ("keep_start", "keep_end"):
        trainer = dpo(max_length=40, truncation_mode=mode)
        assert_live(trainer, trainer.train_dataset)
    assert len(store.entries()) == 1 + 2  # the base


def test_another_policy_has_the_same_references(dpo: Callable[..., Trainer], passes: Passes, capsys) -> None:
    first = dpo()
    assert passes.taken() == len(PAIRS)
    assert "(train): 12 pairs computed in " in capsys.readouterr().err
    options = {"seed": 7, "lora_r": 4, "beta": 0.5, "loss_type": ["ipo"], "learning_rate": 1e-3}
    second = dpo(**options, per_device_train_batch_size=2)
    assert passes.taken() == 0
    assert "12 pairs read from the cache, no reference pass" in capsys.readouterr().err
    for one, other in zip(columns(first.train_dataset), columns(second.train_dataset), strict=True):
        assert torch.equal(one, other)


def test_another_ld_alpha_takes_no_pass(dpo: Callable[..., Trainer], passes: Passes) -> None:
    plain = columns(dpo().train_dataset)
    assert passes.taken() == len(PAIRS)
    trainer = dpo(ld_alpha=0.25)
    assert passes.taken() == 0
    assert not torch.equal(plain[0], columns(trainer.train_dataset)[0])
    assert_live(trainer, trainer.train_dataset)


def test_what_decides_the_references_makes_another_entry(
    dpo: Callable[..., Trainer], model_dir: ModelDir, tmp_path: Path, passes: Passes
) -> None:
    trainer = dpo()
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer.model.save_pretrained(tmp_path / "one")
    assert passes.taken() == len(PAIRS)
    changes = (
        {"fast": "none"},
        {"max_length": 40},
        {"dtype": "bfloat16"},
        {"rows": PAIRS[:-1]},
        {"rows": PAIRS[::-1]},
        {"adapter_name_or_path": str(tmp_path / "one")},
    )
    for change in changes:
        dpo(**change)
        assert passes.taken() >= len(PAIRS) - 1, change
        dpo(**change, seed=3)
        assert passes.taken() == 0, change
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    dpo(adapter_name_or_path=str(tmp_path / "one"))
    assert passes.taken() == len(PAIRS)


def test_each_evaluation_set_has_its_own_and_so_has_one_that_comes_later(
    dpo: Callable[..., Trainer], passes: Passes, small: None
) -> None:
    sets = {
        "one": Dataset.from_list(tiny.preferences(3)),
        "two": Dataset.from_list(tiny.preferences(20)[15:]),
    }
    trainer = dpo(evaluated=sets, max_steps=2, learning_rate=1e-2)
    assert passes.taken() == len(PAIRS) + 3 + 5
    assert_live(trainer, trainer.eval_dataset["two"])
    trainer.train()
    assert {"eval_one_loss", "eval_two_loss"} <= trainer.evaluate().keys()
    assert passes.taken() == 0
    later = tiny.preferences(30)[24:]
    adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    found = trainer.evaluate(Dataset.from_list(later))
    assert passes.taken() == 6
    assert all(torch.equal(p, adapter[n]) for n, p in trainer.model.named_parameters() if n in adapter)
    trainer.precompute_ref_logps = False
    live = trainer.evaluate(Dataset.from_list(later))
    assert found["eval_loss"] == pytest.approx(live["eval_loss"], abs=1e-6)
    assert found["eval_loss"] != pytest.approx(LN2, abs=1e-4)


AUTOMATIC = {"config": DPOArguments, "precompute_ref_log_probs": None, "max_steps": -1, "num_train_epochs": 1}


def test_by_default_more_than_one_epoch_is_computed_ahead(
    dpo: Callable[..., Trainer], passes: Passes, capsys
) -> None:
    trainer = dpo(**AUTOMATIC)
    assert passes.taken() == 0
    assert not trainer.args.precompute_ref_log_probs
    assert trainer.report.decided["precompute_ref_log_probs"] is False
    line = "reference log-probabilities: computed in every step (one epoch at most, and not cached)"
    assert line in capsys.readouterr().err.splitlines()
    assert first_loss(trainer) == pytest.approx(LN2, abs=1e-6)
    trainer = dpo(**{**AUTOMATIC, "max_steps": 5, "num_train_epochs": 1})  # 15 pairs
    assert passes.taken() == len(PAIRS)
    assert trainer.args.precompute_ref_log_probs
    assert "computed once, before training (1.25 epochs)" in capsys.readouterr().err
    trainer = dpo(**AUTOMATIC, lora_r=4)
    assert passes.taken() == 0
    assert trainer.report.decided["precompute_ref_log_probs"] is True
    assert "computed once, before training (cached)" in capsys.readouterr().err
    assert first_loss(trainer) == pytest.approx(LN2, abs=1e-6)
    assert (
        "ref_chosen_logps"
        not in dpo(**{**AUTOMATIC, "precompute_ref_log_probs": False}).train_dataset.column_names
    )


def test_a_stream_is_never_gone_through_ahead(dpo: Callable[..., Trainer], capsys) -> None:
    stream: IterableDataset = Dataset.from_list(PAIRS).to_iterable_dataset()
    trainer = dpo(rows=stream, **{**AUTOMATIC, "max_steps": 20})
    assert not trainer.precompute_ref_logps
    assert "computed in every step (the data is a stream)" in capsys.readouterr().err
    with pytest.raises(
        UserError, match="a stream, and cannot be gone through ahead of training; write false"
    ) as raised:
        dpo(rows=stream)
    assert raised.value.option == "precompute_ref_log_probs"


def test_a_resumed_run_keeps_what_it_decided_bit_for_bit(
    model_dir: ModelDir, tmp_path: Path, passes: Passes
) -> None:
    """Eight rows, two a step: four steps are one epoch, six are more."""
    rows = tiny.write_rows(tmp_path / "rows", tiny.preferences(12))

    def arguments(output: Path, **given: str) -> list[str]:
        return options(model_dir("llama"), rows, output, **given)

    live = {"max_steps": "4", "save_steps": "2"}
    assert run("dpo", arguments(tmp_path / "live", **live)) == 0
    assert passes.taken() == 0
    assert run("dpo", arguments(tmp_path / "ahead", eval_strategy="steps", eval_steps="3")) == 0
    assert passes.taken() == 8 + 4
    assert manifest.read(tmp_path / "ahead" / "checkpoint-3").decided["precompute_ref_log_probs"] is True
    # What would be computed ahead now is computed beside the policy still, and what is lost is computed again.
    parts_of = interrupted(tmp_path / "live", tmp_path / "parts" / "live", 2)
    assert run("dpo", arguments(parts_of, **live), "--resume_from_checkpoint", "auto") == 0
    assert passes.taken() == 0
    assert_equal(tmp_path / "live", parts_of, 4)
    kept = [each.key for each in store.entries() if each.kind == "references"]
    assert main(["cache", "rm", *kept]) == 0
    for name, pairs in (("one", 8 + 4), ("other", 0)):
        parts_of = interrupted(tmp_path / "ahead", tmp_path / "parts" / name)
        again = arguments(parts_of, eval_strategy="steps", eval_steps="3")
        assert run("dpo", again, "--resume_from_checkpoint", "auto") == 0
        assert passes.taken() == pairs
        assert_equal(tmp_path / "ahead", parts_of, 6)


def test_all_weights_are_trained_against_what_they_were(
    model_dir: ModelDir, tmp_path: Path, passes: Passes, capsys
) -> None:
    """Without adapters TRL's constructor runs the policy, and keeps no reference model."""
    plugin = QLoRAPlugin(
        dtype="float32", load_in_4bit=False, use_peft=False, model_name_or_path=str(model_dir("llama"))
    )
    for pairs, seed in ((len(PAIRS), 1), (0, 2)):
        args = DPOArguments(
            str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", seed=seed,
            disable_tqdm=True, logging_steps=1, per_device_train_batch_size=3, num_train_epochs=2,
        )  # fmt: skip
        trainer = plugin.trainer(DPOTrainer, args=args, train_dataset=Dataset.from_list(PAIRS))
        assert passes.taken() == pairs
        assert trainer.ref_model is None
        assert first_loss(trainer) == pytest.approx(LN2, abs=1e-6)
        assert "computed once, before training (2 epochs)" in capsys.readouterr().err


def kto(model_dir: ModelDir, tmp_path: Path, fast: str) -> Trainer:
    """A trainer whose references are computed ahead, over rows on disk, which TRL requires."""
    rows = [
        {"prompt": each["prompt"], "completion": each[side], "label": side == "chosen"}
        for each in tiny.preferences(4)
        for side in ("chosen", "rejected")
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / fast)
    args = KTOConfig(
        str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=1,
        disable_tqdm=True, precompute_ref_log_probs=True, per_device_train_batch_size=4,
    )  # fmt: skip
    return QLoRAPlugin(dtype="float32", fast=fast).trainer(
        KTOTrainer,
        model=str(model_dir("llama")),
        args=args,
        train_dataset=load_from_disk(str(tmp_path / fast)),
    )


def test_kto_computes_its_own_by_the_forward_that_trains(model_dir: ModelDir, tmp_path: Path) -> None:
    hashes = set()
    for fast in ("auto", "none"):
        trainer = kto(model_dir, tmp_path, fast)
        assert "ref_logps" in trainer.train_dataset.column_names
        trainer.train()
        hashes.add(trainer._precompute_model_hash)
    assert len(hashes) == 2


def test_a_pass_that_runs_out_of_memory_ends_with_advice(
    dpo: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a set which comes while the trainer is in a step says the same."""

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer = dpo(per_device_eval_batch_size=4, max_length=64)
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", run_out)
    told = "out of memory in the reference pass: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    with pytest.raises(torch.OutOfMemoryError) as error:
        dpo(per_device_train_batch_size=6, rows=PAIRS[:-1], max_length=64)
    smaller = (
        "  the same pass in less: `precompute_ref_batch_size: {}`\n  or shorter rows: `max_length` is 64"
    )
    assert str(error.value) == told + smaller.format(3)
    with pytest.raises(torch.OutOfMemoryError) as error, advised(lambda reason: f"in a step: {reason}"):
        trainer.evaluate(Dataset.from_list(tiny.preferences(30)[24:]))
    assert str(error.value) == told + smaller.format(2)


def test_so_does_kto_s(model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(KTOTrainer, "compute_ref_log_probs", run_out)
    with pytest.raises(torch.OutOfMemoryError, match=r"reference pass.*\n.*precompute_ref_batch_size: 2`"):
        kto(model_dir, tmp_path, "auto")
