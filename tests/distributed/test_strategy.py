"""Which launches are refused, and what a run says of its own."""

from pathlib import Path

import pytest
import torch

from halfbyte import distributed
from halfbyte.cli import main
from halfbyte.errors import UserError


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ],
)
def test_an_unproven_strategy_is_refused(variable: str, name: str) -> None:
    for value in ("true", "True", "1"):
        with pytest.raises(UserError, match=rf"launched under {name}.*--config_file launch/ddp\.yaml"):
            distributed.refuse_unsupported({variable: value})
    distributed.refuse_unsupported({variable: "false"})
    distributed.refuse_unsupported({})


def test_a_refused_launch_ends_with_2_and_writes_nothing(
    tmp_path: Path, model_dir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    output = tmp_path / "run"
    options = ("--model_name_or_path", str(model_dir("llama")), "--dataset_name", str(tmp_path))
    assert main(["sft", *options, "--output_dir", str(output)]) == 2
    assert "error: this run was launched under FSDP" in capsys.readouterr().err
    assert not output.exists()


def test_processes_that_do_not_train_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"started 2 processes, but 1 train together.*launch/cpu\.yaml"):
        distributed.strategy_in_force({"WORLD_SIZE": "2"})


def test_one_process_is_single() -> None:
    strategy = distributed.strategy_in_force({})
    assert strategy.as_dict() == {"name": "single", "world_size": 1}
    if not torch.cuda.is_available():
        assert strategy.device == "cpu"


def test_agreements_of_one_rank_are_its_own() -> None:
    assert distributed.agree({"dtype": "float32"}) == {"dtype": "float32"}
    assert distributed.gather(3) == [3]
    with pytest.raises(ZeroDivisionError), distributed.on_every_rank("dividing"):
        1 / 0  # noqa: B018
