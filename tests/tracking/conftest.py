"""One real run, tracked from beginning to end, that the tests of this room look into."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import wandb
from datasets import Dataset
from transformers import TrainerCallback

from halfbyte.resilience.signals import Signals
from halfbyte.tracking import RunRecord, Tracker
from halfbyte.trainer.base import Conduct
from halfbyte.trainer.compose import compose
from halfbyte.trainer.run_directory import RunDirectory
from tests import tiny

CANARY = "CANARY"
CONFIG = {
    "learning_rate": 2e-4,
    "model_name_or_path": "/home/somebody/models/tiny-llama",
    "dataset_name": "somebody/text",
    "use_peft": True,
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    "lora_r": 16,
    "eos_token": "<|im_end|>",
    "hub_token": "CANARY-top",
    "model_init_kwargs": {"token": "CANARY-nested", "list": [{"Api_Key": "CANARY-list"}]},
    "dataset_kwargs": '{"auth": {"client_secret": "CANARY-json"}}',
    "accelerator_config": {"proxy": "http://user:CANARY-url@proxy:80/"},
}


@dataclass
class TrackedRun:
    directory: Path
    output: str
    callbacks: list[TrainerCallback]
    rows_of_others: list[dict]
    """What another tracker of ``report_to`` got: each row as the Trainer gives it to its callbacks."""


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.rows.append({"step": state.global_step, **logs})


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[..., Path]) -> TrackedRun:
    """SFT of three steps on the CPU with evaluation and saves, W&B offline, canaries everywhere."""
    from trl import SFTConfig, SFTTrainer

    directory = tmp_path_factory.mktemp("runs") / "sft"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", "CANARY" + "a" * 40)
        patch.setenv("HF_TOKEN", "hf_CANARYenvironment0000000")
        patch.setattr(sys, "argv", [sys.argv[0], "--hub_token=CANARY-argv"])
        wandb.teardown()  # its settings are read once for a process
        args = SFTConfig(
            output_dir=str(directory),
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            eval_on_start=True,
            save_steps=2,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=["wandb"],
        )
        rows = Dataset.from_list(tiny.texts(8))
        record = RunRecord(directory, "sft")
        record.update(
            config=CONFIG,
            base={"name": "/home/somebody/models/tiny-llama", "revision": "0123456789" * 4},
            data={"rows": 8},
            strategy={"name": "single", "world_size": 1},
        )
        tracker = Tracker(record, bar=False)
        signals = Signals(lambda _: None)
        conduct = Conduct(tracker=tracker, signals=signals, config={}, inputs={}, peak_flops=1e12)
        recorder = Recorder()
        trainer = compose(SFTTrainer, (RunDirectory,))(
            model=str(model_dir("llama")),
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            conduct=conduct,
            callbacks=[recorder],
        )
        assert not (directory / "run.json").exists()
        callbacks = list(trainer.callback_handler.callbacks)
        captured = io.StringIO()
        patch.setattr(sys, "stdout", captured)
        trainer.train()
        trainer.save_model()
        tracker.finish("completed", next_command="halfbyte dpo --adapter_name_or_path out/sft")
        wandb.teardown()
    return TrackedRun(directory, captured.getvalue(), callbacks, recorder.rows)
