"""Reference log-probabilities computed once: their numbers, what makes another entry, and what a fault costs."""

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from halfbyte import QLoRAPlugin, locks, parts, store
from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.trainer import reference_pass, reference_shard
from halfbyte_recipes.dpo import DPOArguments
from tests import tiny

ModelDir = Callable[..., Path]
PAIRS = tiny.preferences(12)
LN2 = math.log(2)


@dataclass
class Passes:
    """Forwards of the reference, by the pairs of each."""

    pairs: list[int]

    def taken(self) -> int:
        """The pairs computed since the last call."""
        taken = sum(self.pairs)
        self.pairs.clear()
        return taken


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "halfbyte" / "references"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    found = Passes([])
    stock = reference_pass._forward

    def counted(trainer: Any, model: Any, dataset: Any, rows: np.ndarray) -> Any:
        found.pairs.append(len(rows))
        return stock(trainer, model, dataset, rows)

    monkeypatch.setattr(reference_pass, "_forward", counted)
    return found


@pytest.fixture
def dpo(model_dir: ModelDir, tmp_path: Path) -> Callable[..., Trainer]:
    """``dpo(lora_r=8, beta=0.2)``: a trainer over the tiny base, its reference computed ahead."""

    def build(
        rows: Any = PAIRS,
        dtype: str = "float32",
        config: type = DPOConfig,
        evaluated: Any = None,
        **options: Any,
    ) -> Trainer:
        ours = {key: options.pop(key) for key in ("lora_r", "fast", "adapter_name_or_path") if key in options}
        args = config(
            str(tmp_path / "run"), use_cpu=True, bf16=dtype == "bfloat16", report_to="none", save_strategy="no",
            **{"disable_tqdm": True, "max_steps": 1, "per_device_train_batch_size": 3, "max_grad_norm": 0.0,
               "precompute_ref_log_probs": True, "logging_steps": 1, **options},
        )  # fmt: skip
        model = None if "adapter_name_or_path" in ours else str(model_dir("llama"))
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return QLoRAPlugin(dtype=dtype, **ours).trainer(
            DPOTrainer, model=model, args=args, train_dataset=rows, eval_dataset=evaluated
        )

    return build


def columns(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = dataset.with_format("torch")
    return found["ref_chosen_logps"][:], found["ref_rejected_logps"][:]


def assert_live(trainer: Trainer, dataset: Any, within: float = 1e-6) -> None:
    """The columns are what TRL computes beside the policy, in batches of another size and order."""
    chosen, rejected = columns(dataset)
    for start in range(0, len(dataset), 5):
        batch = trainer.data_collator([dataset[i] for i in range(start, min(start + 5, len(dataset)))])
        live = trainer.compute_ref_log_probs(trainer.model, batch)
        for found, expected in zip((chosen, rejected), live, strict=True):
            torch.testing.assert_close(found[start : start + 5], expected, rtol=within, atol=0)


def first_loss(trainer: Trainer) -> float:
    trainer.train()
    return float(next(row["loss"] for row in trainer.state.log_history if "loss" in row))


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_shard, "PAIRS", 4)


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize("where", ["at the start", "in the middle", "at the end"])
def test_a_flipped_byte_is_found_and_its_shard_computed_again(
    dpo: Callable[..., Trainer], cache: Path, passes: Passes, small: None, where: str, capsys
) -> None:
    expected = columns(dpo().train_dataset)
    assert passes.taken() == len(PAIRS)
    path = shards(cache)[1]
    content = bytearray(path.read_bytes())
    content[{"at the start": 3, "in the middle": len(content) // 2, "at the end": -1}[where]] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    found = columns(dpo(seed=3).train_dataset)
    assert passes.taken() == 4
    told = [line for line in capsys.readouterr().err.splitlines() if "computed again" in line]
    assert told == [f"the reference cache {path} has changed content (sha256); it is computed again"]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    dpo()
    assert passes.taken() == 0


def test_a_pass_that_is_killed_continues_at_its_shard(
    dpo: Callable[..., Trainer],
    cache: Path,
    passes: Passes,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    if (child := os.fork()) == 0:
        stock = parts.Parts.add

        def killed(self: parts.Parts, name: str, *rest: Any, **given: Any) -> None:
            if name == reference_shard.name(2):
                os.kill(os.getpid(), signal.SIGKILL)
            stock(self, name, *rest, **given)

        monkeypatch.setattr(parts.Parts, "add", killed)
        dpo()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(shards(cache)) == 2
    (entry,) = (each for each in store.entries() if each.kind == "references")
    assert (entry.damaged, entry.in_use) == (False, False)
    assert entry.base.endswith("12 pairs (train), 2 of 3 parts")
    trainer = dpo()
    assert passes.taken() == 4
    assert "4 pairs computed in " in (told := capsys.readouterr().err)
    assert "cached, 8 read from the cache" in told
    assert_live(trainer, trainer.train_dataset)


@pytest.mark.parametrize("left", ["a shard that no manifest lists", "half a shard", "no manifest", "a file"])
def test_what_an_interruption_leaves_is_not_taken_for_a_shard(
    dpo: Callable[..., Trainer], cache: Path, passes: Passes, small: None, left: str
) -> None:
    expected = columns(dpo().train_dataset)
    passes.taken()
    entry = shards(cache)[0].parent
    manifest = json.loads((entry / "manifest.json").read_text())
    del manifest["files"][reference_shard.name(2)]
    (entry / "manifest.json").write_text(json.dumps(manifest))
    if left == "half a shard":
        shards(cache)[2].rename(entry / f".{reference_shard.name(2)}.77.tmp")
    elif left == "no manifest":
        (entry / "manifest.json").unlink()
    elif left == "a file":
        for path in entry.iterdir():
            path.unlink()
        entry.rmdir()
        entry.write_text("")
    found = columns(dpo().train_dataset)
    assert passes.taken() == (4 if "shard" in left else len(PAIRS))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert sorted(path.name for path in entry.iterdir()) == [
        *map(reference_shard.name, range(3)),
        "manifest.json",
    ]


def test_a_full_disk_is_said_and_the_run_goes_on(
    dpo: Callable[..., Trainer], cache: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    stock = parts.replace_file

    def full(path: Path, content: bytes) -> None:
        if path.name == reference_shard.name(1):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        stock(path, content)

    monkeypatch.setattr(parts, "replace_file", full)
    trainer = dpo()
    told = capsys.readouterr().err
    place = shards(cache)[0].with_name(reference_shard.name(1))
    assert f"the reference cache is not kept for later runs: No space left on device ({place})" in told
    assert "12 pairs computed in " in told
    assert "cached" not in told.partition("12 pairs computed in ")[2].splitlines()[0]
    assert_live(trainer, trainer.train_dataset)
    assert first_loss(trainer) == pytest.approx(LN2, abs=1e-6)


def test_a_store_that_cannot_be_written_is_read_as_it_is(
    dpo: Callable[..., Trainer], cache: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    dpo()
    passes.taken()
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **given: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(cache.parent)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *rest, **given)

    monkeypatch.setattr(os, "open", read_only)
    capsys.readouterr()
    dpo(seed=3)
    assert passes.taken() == 0
    assert "is not kept" not in capsys.readouterr().err
    dpo(rows=PAIRS[:-2])
    assert passes.taken() == len(PAIRS) - 2
    assert "the reference cache is not kept for later runs: Read-only file system" in capsys.readouterr().err


def test_a_second_process_waits_for_what_the_first_computes(
    dpo: Callable[..., Trainer],
    cache: Path,
    passes: Passes,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    dpo()
    passes.taken()
    entry = shards(cache)[0].parent
    whole = (entry / "manifest.json").read_text()
    manifest = json.loads(whole)
    del manifest["files"][reference_shard.name(2)]
    (entry / "manifest.json").write_text(json.dumps(manifest))
    lock = locks.hold(store.beside(entry, store.BUILD_LOCK))

    def finished(seconds: float) -> None:  # by the process that holds the lock
        (entry / "manifest.json").write_text(whole)

    monkeypatch.setattr(reference_pass.time, "sleep", finished)
    try:
        dpo()
    finally:
        os.close(lock)
    assert passes.taken() == 0
    assert "another process is computing the same; waiting for it" in capsys.readouterr().err


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


def test_the_cache_command_lists_and_removes_them(
    dpo: Callable[..., Trainer], model_dir: ModelDir, capsys
) -> None:
    dpo()
    capsys.readouterr()
    assert main(["cache", "ls", "--json"]) == 0
    (entry,) = (each for each in json.loads(capsys.readouterr().out) if each["kind"] == "references")
    assert entry["base"] == f"{model_dir('llama')}: 12 pairs (train)"
    assert 0 < entry["size"] < 100_000
    assert not entry["in_use"]
    assert not entry["damaged"]
    assert main(["cache", "ls"]) == 0
    assert "1 quantized base and 1 reference cache, " in capsys.readouterr().out
    assert main(["cache", "rm", entry["key"]]) == 0
    assert [each.kind for each in store.entries()] == ["bases"]


AUTOMATIC = {"config": DPOArguments, "precompute_ref_log_probs": None, "max_steps": -1, "num_train_epochs": 1}


def test_by_default_more_than_one_epoch_is_computed_ahead(
    dpo: Callable[..., Trainer], passes: Passes, capsys
) -> None:
    trainer = dpo(**AUTOMATIC)
    assert passes.taken() == 0
    assert not trainer.args.precompute_ref_log_probs
    assert trainer.report.decided["precompute_ref_log_probs"] is False
    line = "reference log-probabilities: computed in every step (one epoch at most, and none are cached)"
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
        UserError, match="a stream cannot be gone through ahead of training; write false"
    ) as raised:
        dpo(rows=stream)
    assert raised.value.option == "precompute_ref_log_probs"
