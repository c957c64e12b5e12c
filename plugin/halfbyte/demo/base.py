"""The demo's base model: a small Llama, and the cache that keeps a trained one for the next demo."""

import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfbyte.caches import is_homeless, place
from halfbyte.demo.corpus import Corpus, held_out
from halfbyte.demo.tokenizer import VOCABULARY, train_tokenizer
from halfbyte.files import LONGEST_TEXT, digest, digest_of, read
from halfbyte.store import cache_directory as user_cache

# 0.9M parameters: small enough to learn English and Python from scratch in a minute and a half.
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
_MANIFEST = "manifest.json"


def write_untrained(corpus: Corpus, directory: Path, *, seed: int = 0) -> None:
    """Write a Llama with random weights, and a tokenizer of the training texts, into ``directory``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as hugging_face

    hugging_face.disable_progress_bar()

    tokenizer = train_tokenizer(text.text for text in corpus.texts if not held_out(text.module))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def cache_key(corpus: Corpus, training: dict[str, Any]) -> str:
    """Names the base that this text, these settings and these versions make."""
    versions = {name: version(name) for name in ("halfbyte", "tokenizers", "torch", "transformers", "trl")}
    made_of = {
        "python": platform.python_version(),
        "corpus": corpus.sha,
        "vocabulary": VOCABULARY,
        "architecture": ARCHITECTURE,
        "training": training,
        "versions": versions,
    }
    return digest_of(made_of)[:16]


def cache_directory() -> Path:
    """Return where bases are kept: ``halfbyte/demo`` in the user's cache directory, or among temporary files."""
    return (place() if is_homeless() else user_cache()) / "demo"


def store(run: Path, entry: Path) -> None:
    """Copy a finished run to the cache: written aside and renamed, so that an entry is whole or absent."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    pending = entry.with_name(f".pending-{os.getpid()}")  # no mkdtemp: only its owner could read it
    try:
        shutil.copytree(run, pending, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))
        files = {path.relative_to(pending).as_posix(): _sha(path) for path in _files(pending)}
        (pending / _MANIFEST).write_text(json.dumps(files, indent=2), encoding="utf-8")
        if entry.exists():  # damaged, or another demo was faster: either way this one is whole
            shutil.rmtree(entry)
        pending.rename(entry)
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def restore(entry: Path, run: Path) -> bool:
    """Copy a cached run to ``run``; False if there is none or a byte of it has changed."""
    try:
        manifest = json.loads(read(entry / _MANIFEST, LONGEST_TEXT))
        intact = manifest == {
            path.relative_to(entry).as_posix(): _sha(path) for path in _files(entry) if path.name != _MANIFEST
        }
    except (OSError, ValueError, RecursionError):
        return False
    if intact:
        shutil.copytree(entry, run, ignore=shutil.ignore_patterns(_MANIFEST))
        record = run / "run.json"
        text = record.read_text(encoding="utf-8")
        trained_in = json.loads(text)["config"]["output_dir"]
        record.write_text(text.replace(trained_in, str(run)), encoding="utf-8")
    return intact


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sha(path: Path) -> str:
    return digest(path)
