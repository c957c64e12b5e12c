"""``python -m tests.distributed.preferences MODEL OUTPUT [KILLED]``: DPO on pairs in memory, its reference ahead.

Rank 0 prints what came of it as JSON. With KILLED it is killed (SIGKILL) before it writes that shard.
"""

import json
import os
import signal
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.parts import Parts
from halfbyte.trainer import reference_pass, reference_shard
from tests import tiny
from tests.distributed import gloo_as_gpu

PAIRS = 22
SHARD = 5  # the last has two pairs, and a batch fewer than there are ranks


def main(model: str, output: str, killed: str | None = None) -> None:
    if {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys():
        gloo_as_gpu.install_as_launched()
    reference_shard.PAIRS = SHARD
    forwards: list[int] = []
    stock, add = reference_pass._forward, Parts.add

    def counted(trainer: Any, model: Any, dataset: Any, rows: Any) -> Any:
        forwards.append(len(rows))
        return stock(trainer, model, dataset, rows)

    def add_or_die(self: Parts, name: str, *rest: Any, **given: Any) -> None:
        if name == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, name, *rest, **given)

    reference_pass._forward = counted
    Parts.add = add_or_die  # type: ignore[method-assign]
    rows, evaluated = (Dataset.from_list(tiny.preferences(n)) for n in (PAIRS, 3))
    args = DPOConfig(
        output, use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=2, logging_steps=1,
        per_device_train_batch_size=2, disable_tqdm=True, learning_rate=1e-3, precompute_ref_log_probs=True,
    )  # fmt: skip
    trainer = QLoRAPlugin(dtype="float32").trainer(
        DPOTrainer, model=model, args=args, train_dataset=rows, eval_dataset=evaluated
    )
    ahead = gather_object([list(forwards)])
    trainer.train()
    forwards.clear()
    later = trainer.evaluate(Dataset.from_list(tiny.preferences(40)[35:]))
    told = {
        "forwards": ahead,
        "later": gather_object([list(forwards)]),
        "chosen": list(trainer.train_dataset["ref_chosen_logps"]),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "eval_loss": later["eval_loss"],
    }
    if PartialState().is_main_process:
        print("told", json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
