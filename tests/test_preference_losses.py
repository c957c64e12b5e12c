"""Every DPO loss of TRL on trees: value, gradient and figures of plain TRL on padded batches, in float32."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.fast.pairs import PairsAsTrees
from tests import plain_trl, tiny
from tests.plain_trl import Steps, adapter

__all__ = ["adapter"]

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "label smoothing": {"label_smoothing": 0.2},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"]},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {
        "loss_type": ["discopop"],
        "beta": 0.1,
    },  # it multiplies margins, and their rounding, by beta / 0.05
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "a weighted mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "LD-DPO": {"ld_alpha": 0.3},
    "WPO": {"use_weighting": True},
    "keep_end": {"max_length": 48, "truncation_mode": "keep_end"},
    "precomputed": {"precompute_ref_log_probs": True},
}


class Figures(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.rows.append({k: v for k, v in logs.items() if "/" in k or k in ("entropy", "num_tokens")})


def pairs() -> Dataset:
    """Pairs of unequal length, some whose answers open alike."""
    rows = tiny.preferences(8)
    for row in rows[::2]:
        row["chosen"] = row["rejected"][: len(row["rejected"]) // 2] + row["chosen"]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_loss_gradient_and_figures_equal_trls(
    model_dir: Callable[..., Path], tmp_path: Path, adapter: Path, options: dict[str, Any]
) -> None:
    base, rows = model_dir("llama"), pairs()

    def args(name: str, **changed: Any) -> DPOConfig:
        given = {"max_steps": 2, "beta": 0.5, "optim": "sgd", **options, **changed}
        return plain_trl.arguments(DPOConfig, tmp_path / name, **given)

    model = PeftModel.from_pretrained(plain_trl.base(base), adapter, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Plain TRL always with a live reference: a pass in evaluation mode before training corrupts bitsandbytes' weights
    # on CPUs with AVX512-BF16, and its gradients are wrong ever after.
    live = args("theirs", precompute_ref_log_probs=False)
    theirs = DPOTrainer(model=model, args=live, train_dataset=rows, processing_class=tokenizer)
    plain_trl.keep_adapter_in_float32(theirs)
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter))
    ours = plugin.trainer(DPOTrainer, model=str(base), args=args("ours"), train_dataset=rows)
    assert isinstance(ours.data_collator, PairsAsTrees)
    assert ours.report.fusion.trees
    figures = Figures(), Figures()
    for trainer, each in zip((ours, theirs), figures, strict=True):
        trainer.add_callback(each)
    # The second step has what the first one rounded, and divergences that exponentiate it.
    plain_trl.assert_equal(Steps.of(ours), Steps.of(theirs), gradients=2e-5)
    for mine, trls in zip(figures[0].rows, figures[1].rows, strict=True):
        assert mine.keys() == trls.keys()
        for name, value in trls.items():
            if name == "rewards/accuracies" and abs(trls["rewards/margins"]) < 1e-6:
                continue  # a tie, which the last bit of a cached reference breaks
            # TRL weighs the micro-batches of a step alike, halfbyte by tokens: near zero that shows.
            close = 1e-3 if name in ("entropy", "logits/chosen", "logits/rejected") else 1e-5
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=close), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("continued", [False, True], ids=["new adapter", "continued adapter"])
def test_the_first_loss_is_ln_2(
    model_dir: Callable[..., Path], tmp_path: Path, adapter: Path, dtype: str, continued: bool
) -> None:
    """Policy and reference are one model, computed alike: their log-probabilities are the same numbers."""
    options = {"max_steps": 1, "bf16": dtype == "bfloat16", "eval_on_start": True, "eval_strategy": "steps"}
    plugin = QLoRAPlugin(dtype=dtype, adapter_name_or_path=str(adapter) if continued else None)
    trainer = plugin.trainer(
        DPOTrainer,
        model=str(model_dir("llama")),
        args=plain_trl.arguments(DPOConfig, tmp_path, **options),
        train_dataset=pairs(),
        eval_dataset=pairs().select(range(5)),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    before, first = logged[0], logged[1]
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_rewards/margins"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0
