"""The running Python's library, read once, and a very small base that has read its docstrings."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.demo import corpus
from halfbyte.demo.tokenizer import train_tokenizer

STEPS = 200  # of the base
Pairs = list[corpus.Pair]


def arguments(config: type, output: Path, **given: Any) -> Any:
    """Training arguments of class ``config`` for a base this small."""
    return config(
        output_dir=str(output),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        max_length=128,
        gradient_checkpointing=False,
        optim="adamw_torch",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=0,
        **given,
    )


@pytest.fixture(scope="session")
def library() -> corpus.Corpus:
    return corpus.collect()


@pytest.fixture(scope="session")
def sides(library: corpus.Corpus) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs, short ones."""
    short = [pair for pair in library.pairs if len(pair.docstring) < 90 and len(pair.signature) < 60]
    random.Random(0).shuffle(short)
    trained, held_out = ([p for p in short if corpus.held_out(p.module) == side] for side in (False, True))
    return trained, held_out


@pytest.fixture(scope="session")
def base(sides: tuple[Pairs, Pairs], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small Llama that has read the training pairs, but no ChatML."""
    tokenizer = train_tokenizer((f"{p.signature} {p.docstring}" for p in sides[0]), vocabulary=512)
    ends = [tokenizer.eos_token_id]
    ids = [i for p in sides[0] for i in tokenizer(f"{p.signature}\n{p.docstring}").input_ids + ends]
    rows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("base")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
