"""The Python API as a script of one's own: an Accelerator loop, then a TRL trainer, on every rank.

``accelerate launch --config_file launch/cpu.yaml -m tests.distributed.loop MODEL DIRECTORY`` writes what
each rank saw and ended with to ``DIRECTORY/rank-N.json``.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from tests import tiny

GLOBAL_BATCH = 4
STEPS = 3


def rows(model: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Token rows of one length, so that every rank's mean weighs as much."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(tiny.text(n) * 3)["input_ids"][:16] for n in range(count)]
    return [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids]


def steps(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, count: int) -> list[float]:
    """Take ``count`` steps over ``loader`` and return their losses, averaged over the ranks."""
    losses: list[float] = []
    model.train()
    while len(losses) < count:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses[:count]


def adapter_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def run(model_dir: str, directory: str, *, processes: int) -> dict[str, Any]:
    """Run both and return the losses and the hashes of the adapters of this rank."""
    accelerator = Accelerator(cpu=True)
    qlora = QLoRAPlugin(lora_r=4, dtype="float32")
    torch.manual_seed(0)
    model = qlora.load(model_dir)
    optimizer = qlora.optimizer(model, lr=1e-2)
    loader = DataLoader(rows(model_dir, 2 * GLOBAL_BATCH), batch_size=GLOBAL_BATCH // processes)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = steps(accelerator, prepared, optimizer, loader, STEPS)

    args = SFTConfig(
        output_dir=directory,
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list(tiny.texts(16))
    trainer = qlora.trainer(SFTTrainer, model=model_dir, args=args, train_dataset=data)
    trainer.train()
    return {
        "world_size": PartialState().num_processes,
        "loop": losses,
        "trainer": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "adapters": [adapter_hash(model), adapter_hash(trainer.accelerator.unwrap_model(trainer.model))],
    }


if __name__ == "__main__":
    state = PartialState(cpu=True)
    seen = run(*sys.argv[1:], processes=state.num_processes)
    (Path(sys.argv[2]) / f"rank-{state.process_index}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
