"""Options of one of CPO's losses that another would ignore, or fail on."""

import re
from pathlib import Path

import pytest
import torch

from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte_recipes.cpo import CPOArguments, CPOTrainer


@pytest.mark.parametrize(
    ("given", "option", "reason"),
    [
        ({"alpha": 0.5}, "alpha", "which is 0 in float32"),
        ({"alpha": 0.5, "loss_type": "hinge"}, "alpha", "loss_type: alphapo"),
        ({"loss_type": "alphapo"}, "loss_type", "is SimPO"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing", "has none"),
        ({"simpo_gamma": 1.0}, "simpo_gamma", "only `loss_type: simpo`"),
    ],
)
def test_options_that_do_not_fit_the_loss_are_refused(
    given: dict, option: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        CPOArguments(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, **given)
    assert caught.value.option == option
    written = {"model_name_or_path": "x", "dataset_name": "y", "output_dir": str(tmp_path / "run"), **given}
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in written.items()))
    assert main(["cpo", "--config", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert re.search(rf"run.yaml:\d+: {option}: ", said), said
    assert not (tmp_path / "run").exists()


def test_what_is_refused_of_alpha_is_not_a_number() -> None:
    """TRL's own loss of answers of forty tokens, under the loss that sums their log-probabilities."""

    class Bare:
        alpha, beta, loss_type, label_smoothing = 0.5, 0.1, "sigmoid", 0.0
        accelerator = type("A", (), {"device": torch.device("cpu")})

    losses = CPOTrainer.cpo_loss(Bare(), torch.tensor([-240.0]), torch.tensor([-250.0]))[0]
    assert not losses.isfinite().any()


def test_alphapo_is_simpo_with_alpha(tmp_path: Path) -> None:
    args = CPOArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type="alphapo", alpha=0.25)
    assert (args.loss_type, args.cpo_alpha, args.alpha) == ("simpo", 0.0, 0.25)
