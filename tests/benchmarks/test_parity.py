"""The arithmetic of the parity benchmark, and one tiny cell of each of its parts."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte.demo import stages
from halfbyte.export import schemes
from halfbyte.export.findings import PLAIN
from tests import tiny
from tests.benchmarks import methods, scheme_order
from tests.benchmarks.methods import Found, Method
from tests.benchmarks.scheme_order import Losses

ModelDir = Callable[..., Path]


def test_a_paired_standard_error_is_that_of_the_differences() -> None:
    """Texts of one length: the textbook's error of a mean, of differences that are far smaller than the losses."""
    tokens = torch.full((4,), 10.0, dtype=torch.float64)
    before = torch.tensor([20.0, 60.0, 30.0, 50.0], dtype=torch.float64)
    gained = torch.tensor([1.0, 2.0, 2.0, 3.0], dtype=torch.float64)
    losses = {"one": torch.stack([before + gained, tokens], 1), "other": torch.stack([before, tokens], 1)}
    found = Losses(1, 1, losses)
    value, error = found.more("one", "other")
    assert value == pytest.approx(0.2)
    assert error == pytest.approx((gained / 10).std().item() / math.sqrt(4))
    assert found.loss("other")[1] > 10 * error
    assert found.more("other", "one") == pytest.approx((-value, error))


def test_a_difference_under_two_standard_errors_is_unresolved() -> None:
    assert scheme_order.difference((0.02, 0.0101)) == "+0.0200 +- 0.0101, unresolved"
    assert scheme_order.difference((-0.02, 0.0099)) == "-0.0200 +- 0.0099"


def test_rows_are_cut_from_texts_and_none_has_nothing_to_score() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = None
    texts = [tiny.text(1) * 40, "<|im_end|>", "", tiny.text(2)]
    rows, numbers = scheme_order.rows_of(texts, tokenizer, length=16)
    assert sorted(set(numbers.tolist())) == [0, 1], "one token alone is no row, and a text without rows none"
    assert all(2 <= len(row.ids) <= 16 and row.scored.all() for row in rows.sequences)
    ids = torch.cat([row.ids for row, number in zip(rows.sequences, numbers, strict=True) if number == 1])
    assert tokenizer.decode(ids) == texts[-1]
    tokenizer.bos_token = "<|im_start|>"
    rows, _ = scheme_order.rows_of(texts, tokenizer, length=16)
    assert {row.ids[0].item() for row in rows.sequences} == {tokenizer.bos_token_id}
    assert max(len(row.ids) for row in rows.sequences) == 16


def test_schemes_on_a_tiny_model(model_dir: ModelDir) -> None:
    found = scheme_order.losses(model_dir("llama"), [tiny.text(n) * 4 for n in range(3)], length=16)
    assert list(found.by_scheme) == [PLAIN, "bfloat16", *(scheme.name for scheme in scheme_order.ORDER)]
    tokens = {tuple(each[:, 1].tolist()) for each in found.by_scheme.values()}
    assert len(tokens) == 1, "all schemes score the same tokens"
    assert len(tokens.pop()) == 3
    assert 0 < found.packed < found.parameters
    by_size = [abs(found.more(name, PLAIN)[0]) for name in ("bfloat16", schemes.NF4.name)]
    assert 0 < by_size[0] < by_size[1]
    first, *_ = scheme_order.table({"tiny": found})
    assert first.startswith("| model | parameters, in four bits | float32 | bfloat16 | int4 absmax | FP4 |")


def test_methods_on_a_tiny_model(
    model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write_rows(tmp_path / "rows", tiny.conversations(24))
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(
        methods, "METHODS", {"full": Method({"load_in_4bit": False, "use_peft": False}, (1e-2,))}
    )
    before, found = methods.compare(
        model_dir("llama"), Path(data), tmp_path / "runs", size=stages.Size(sft_steps=2), seeds=()
    )
    assert list(found) == ["full"]
    assert before > found["full"].swept[1e-2]


def test_the_best_learning_rate_and_the_spread_are_shown() -> None:
    found = {
        "QLoRA": Found({1e-3: 5.2, 2e-3: 5.1}, [5.0, 5.1, 5.2]),
        "full": Found({1e-4: 5.0, 2e-4: 5.3}, [5.0, 5.0, 5.0]),
    }
    *_, qlora, full = methods.table(6.0, found)
    assert qlora == (
        "| QLoRA | 0.002 | 0.001: 5.2000, 0.002: 5.1000 | 5.1000 | 0.1000 | 5.0000, 5.1000, 5.2000 "
        "| +0.1000, sd 0.1000 |"
    )
    assert full.startswith("| full | 0.0001 |")
