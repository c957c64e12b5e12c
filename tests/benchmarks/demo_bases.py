"""Bases that learnt to read by the demo's means: its base, and others of another seed, size or family."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen3Config

from halfbyte.demo import base, stages
from halfbyte.demo.corpus import Corpus


@dataclass(frozen=True)
class Base:
    """A base by its ``name``: its family and sizes, its seed, and what of the demo's training differs."""

    name: str
    seed: int = 0
    config: type[PreTrainedConfig] = LlamaConfig
    sizes: Mapping[str, int] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def longer(steps: int) -> dict[str, Any]:
    """Training of ``steps`` at the lower learning rate that a larger model needs."""
    return {"max_steps": steps, "eval_steps": steps, "warmup_steps": steps // 20, "learning_rate": 1.5e-3}


BASES = (
    Base("demo"),
    Base("demo, seed 1", seed=1),
    Base(
        "wider Llama",
        seed=2,
        sizes={"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
        training=longer(1200),
    ),
    Base(
        "deeper Qwen3",
        seed=3,
        config=Qwen3Config,
        sizes={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        training=longer(600),
    ),
)


def trained(wanted: Base, source: Corpus, directory: Path) -> Path:
    """The directory of ``wanted``, trained in ``directory`` on two processes as the demo's is, unless it is there.

    Beside it is ``data``, with the demo's rows.
    """
    place = directory / wanted.name.replace(", ", "-").replace(" ", "-")
    run, data = place / "base", place / "data"
    if _is_finished(run):
        return run
    stages.write_data(source, data, stages.Size())
    untrained = data / "untrained"
    base.write_untrained(source, untrained, seed=wanted.seed)
    if wanted.sizes:
        _resized(wanted, untrained)
    training = {
        **stages.base_training(stages.Size()),
        **wanted.training,
        "seed": wanted.seed,
        "model_name_or_path": str(untrained),
        "dataset_name": str(data / "text"),
        "output_dir": str(run),
        "overwrite_output_dir": True,
    }
    stages.train("base", "pretrain", training, place, Console())
    return run


def _is_finished(run: Path) -> bool:
    record = run / "run.json"
    return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["status"] == "completed"


def _resized(wanted: Base, directory: Path) -> None:
    """Put random weights of other sizes into ``directory``, under the same tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = wanted.config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**base.ARCHITECTURE, **wanted.sizes},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wanted.seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
