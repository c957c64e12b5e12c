"""Where DPO keeps padded pairs: what trees or the chunked head would compute otherwise, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from halfbyte import QLoRAPlugin
from halfbyte.fast.forest import ROOT
from halfbyte.fast.pairs import PairsAsTrees
from tests import architectures, plain_trl, tiny


def dpo(
    base: str,
    output: Path,
    *,
    lora_dropout: float = 0.0,
    load_in_4bit: bool = True,
    options: Any = None,
    **given: Any,
) -> Any:
    args = plain_trl.arguments(DPOConfig, output, max_steps=1, **(options or {}))
    rows = Dataset.from_list(tiny.preferences(8))
    plugin = QLoRAPlugin(dtype="float32", lora_dropout=lora_dropout, load_in_4bit=load_in_4bit)
    return plugin.trainer(DPOTrainer, model=base, args=args, train_dataset=rows, eval_dataset=rows, **given)


def test_metrics_of_logits_get_whole_sequences(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    trainer = dpo(str(model_dir("llama")), tmp_path, compute_metrics=lambda prediction: {"seen": 1.0})
    assert isinstance(trainer.data_collator, DataCollatorForPreference)
    assert (
        "not padding-free (compute_metrics gets the logits of padded batches)" in trainer.report.fusion.line()
    )
    assert trainer.evaluate()["eval_seen"] == 1.0


def test_predictions_are_of_whole_sequences(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    trainer = dpo(str(model_dir("llama")), tmp_path)
    assert isinstance(trainer.data_collator, PairsAsTrees)
    found = trainer.predict(trainer.eval_dataset)
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in trainer.eval_dataset
    )
    assert found.predictions.shape[1] == longest
    assert isinstance(trainer.data_collator, PairsAsTrees)


def test_dropout_that_is_on_draws_a_mask_a_side(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    trainer = dpo(str(model_dir("llama")), tmp_path, lora_dropout=0.1, options={"disable_dropout": False})
    assert "dropout" in str(trainer.report.fusion.batches)
    trainer.train()


def test_a_layer_without_a_window_among_such_with_one() -> None:
    """Qwen2-MoE names the kinds in its configuration alone."""
    kinds = ["sliding_attention", "full_attention"]
    model = architectures.model("qwen2_moe", use_sliding_window=True, sliding_window=20, layer_types=kinds)
    architectures.assert_computes_trees(model, [50, 30, 9], [ROOT, 0, 0])


def test_an_unknown_truncation_is_an_error_as_in_trl() -> None:
    trees = PairsAsTrees(
        DataCollatorForPreference(pad_token_id=0, max_length=2, truncation_mode="keep_begin")
    )
    row = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4, 5]}
    with pytest.raises(ValueError, match="keep_begin"):
        trees([row])


def test_a_small_vocabulary_is_probed_with_its_own_tokens() -> None:
    assert architectures.prepare_pairs(architectures.model("llama", vocab_size=20)) is None
