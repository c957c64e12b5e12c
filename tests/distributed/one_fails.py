"""``python -m tests.distributed.one_fails MODEL OUTPUT``: DPO where the probe of trees fails on the last rank alone.

Rank 0 prints what each rank trains as JSON.
"""

import json
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.fast import batches
from tests import tiny


def main(model: str, output: str) -> None:
    probe = batches._computes_pairs

    def fails_on_the_last(model: Any) -> bool:
        return probe(model) and not PartialState().is_last_process

    batches._computes_pairs = fails_on_the_last
    args = DPOConfig(
        output, use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=1, disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    rows = Dataset.from_list(tiny.preferences(8))
    trainer = QLoRAPlugin(dtype="float32").trainer(DPOTrainer, model=model, args=args, train_dataset=rows)
    trainer.train()
    own = {
        "collator": type(trainer.data_collator).__name__,
        "attention": trainer.model.config._attn_implementation,
        "batches": trainer.report.fusion.batches,
    }
    told = gather_object([own])
    if PartialState().is_main_process:
        print("told", json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
