"""A base is quantized once: what is loaded from the store is what quantizing gives, and nothing half-made is used."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte import identity, quantization, store
from halfbyte.quantization import stored
from halfbyte.task import CAUSAL_LM, SEQ2SEQ, SEQUENCE_CLASSIFICATION, Task
from tests import launch, plain_trl, tiny
from tests.store.bases import CPU, assert_equal, directly, keys, load, release


@pytest.mark.parametrize("arch", ["llama", "opt", "qwen3", "gemma"])
def test_the_bytes_are_those_of_quantizing(arch: str, model_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_dir(arch)
    first, again, plain = load(base), load(base), directly(base, monkeypatch)
    assert len(keys()) == 1
    assert_equal(first, plain)
    assert_equal(again, plain)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, plain(ids).logits)
    assert again.name_or_path == again.config._name_or_path == str(base)
    assert again.config.use_cache is False


def test_an_existing_entry_is_loaded_without_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_model(tmp_path / "base")
    first = load(base)
    known = identity.sha256(base / "model.safetensors")
    (base / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(stored, "content", lambda path: known)
    assert_equal(load(base), first)


def test_an_edited_checkpoint_is_another_base_whatever_its_times(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    load(base)
    weights = base / "model.safetensors"
    before, sha = weights.stat(), quantization.fingerprint(str(base))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert quantization.fingerprint(str(base)) != sha
    load(base)
    assert len(set(keys())) == 2


def test_a_copy_of_a_checkpoint_is_the_same_base(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    load(base)
    load(Path(shutil.copytree(base, tmp_path / "copy")))
    assert len(set(keys())) == 1


def test_what_decides_the_bytes_decides_the_entry(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    load(base)
    load(base, dtype=torch.float32)
    load(base, nested=False)
    assert len(set(keys())) == 3
    tiny.save_model(base, seed=1)
    load(base)
    assert len(set(keys())) == 4
    load(base, task=SEQUENCE_CLASSIFICATION)
    load(base, tie_word_embeddings=False)
    assert len(set(keys())) == 4, "what other options change is not kept"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no manifest"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str, cache: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    first = load(base)
    release()
    entry = cache / keys()[0]
    weights = entry / "model.safetensors"
    content = bytearray(weights.read_bytes())
    weights.unlink()  # a new file: the loaded model still has the old one mapped
    if damage == "flipped":
        content[-7] ^= 1
        weights.write_bytes(content)
    elif damage == "truncated":
        weights.write_bytes(content[:-100])
    elif damage == "no manifest":
        weights.write_bytes(content)
        (entry / "manifest.json").unlink()
    assert_equal(load(base), first)
    assert store._is_sound(cache / keys()[0])


def test_an_entry_is_never_written_again(tmp_path: Path, cache: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    load(base)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (cache / keys()[0]).iterdir()}
    load(base)
    assert before == {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (cache / keys()[0]).iterdir()
    }


def test_a_store_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_model(tmp_path / "base")
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = load(base)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "is not kept" in line] == [said[-1]]
    assert "Not a directory" in said[-1]
    assert_equal(model, directly(base, monkeypatch))


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    base = tiny.save_model(tmp_path / "base")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    load(base)
    assert "No space left on device" in capsys.readouterr().err
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_base_that_would_load_as_another_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_model(tmp_path / "base")
    monkeypatch.setattr(stored, "same_bytes", lambda *_: False)
    load(base)
    assert "is not the same" in capsys.readouterr().err
    assert keys() == []


def test_the_least_recently_used_go_and_none_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    bases = [tiny.save_model(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    load(bases[0])
    first = keys()[0]
    load(bases[1])
    second = next(key for key in keys() if key != first)
    release()
    os.utime(cache / f"{first}.lock", (1, 1))
    size = store.entries()[0].size
    monkeypatch.setattr(store, "BOUND", int(2.5 * size))
    load(bases[2])
    assert first not in keys()
    assert second in keys()
    monkeypatch.setattr(store, "BOUND", 1)
    load(bases[1])
    assert len(keys()) == 2, "the newest and the one in use stay"


def test_one_of_many_processes_quantizes(tmp_path: Path, cache: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    code = (
        "import sys, torch, hashlib; from pathlib import Path\n"
        "from halfbyte import store; from halfbyte.quantization import load\n"
        "from transformers import BitsAndBytesConfig\n"
        "publish = store._publish\n"
        "def counted(*a): print('quantized'); publish(*a)\n"
        "store._publish = counted\n"
        "q = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)\n"
        "m = load.load_base(sys.argv[1], quantization=q, dtype=torch.bfloat16, device=torch.device('cpu'))\n"
        "print(hashlib.sha256(b''.join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() "
        "for t in m.state_dict().values())).hexdigest())\n"
    )
    environment = launch.environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(base)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    # DeepSpeed, where it is installed, prints lines of its own.
    said = [process.communicate(timeout=240)[0].splitlines() for process in started]
    assert sum(lines.count("quantized") for lines in said) == 1
    assert len({lines[-1] for lines in said}) == 1, "one hash for all"
    assert len(keys()) == 1
    assert not list(cache.glob("*.tmp-*"))


_GROWTH = """
import sys, torch
from halfbyte.quantization import load
from tests.benchmarks.watched import Watched
from tests.plain_trl import nf4
from transformers import LlamaForCausalLM
with Watched(0.005) as watched:
    m = load.load_base(sys.argv[1], quantization=nf4(), dtype=torch.bfloat16, device=torch.device("cpu"))
print(watched.growth, sum(t.nbytes for t in m.state_dict().values()))
"""


def test_loading_grows_memory_by_less_than_a_shard_and_the_result(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="50MB")
    shards = [path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")]
    assert sum(shards) > 100e6
    environment = launch.environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    for turn in ("quantizing", "from the store"):
        done = subprocess.run(
            [sys.executable, "-c", _GROWTH, str(tmp_path / "base")],
            env=environment, cwd=launch.ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        growth, final = map(int, done.stdout.splitlines()[-1].split())
        print(turn, growth, max(shards), final)
        assert growth < max(shards) + final + 2**29, turn


def test_the_command_lists_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from halfbyte.cli import main

    assert main(["cache", "ls"]) == 0
    base = tiny.save_model(tmp_path / "base")
    load(base)
    capsys.readouterr()
    assert main(["cache", "ls", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["base"], listed["in_use"]) == (str(base), True)
    assert main(["cache", "rm", listed["key"]]) == 2, "in use"
    release()
    assert main(["cache", "rm", "no-such-key"]) == 2
    assert main(["cache", "rm", listed["key"]]) == 0
    assert keys() == []
    load(base)
    release()
    assert main(["cache", "rm", "--all"]) == 0
    assert keys() == []
    shutil.rmtree(base)


@pytest.mark.parametrize("task", [CAUSAL_LM, SEQUENCE_CLASSIFICATION], ids=lambda task: task.peft_type)
def test_loading_leaves_the_random_state_as_it_was(tmp_path: Path, task: Task) -> None:
    """DiffLlama draws while it loads, as a new head is drawn: an adapter's start must depend on the seed alone."""
    import random

    import numpy
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    def state() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]

    base = tmp_path / "base"
    DiffLlamaForCausalLM(DiffLlamaConfig(**tiny._GATED)).save_pretrained(base)
    torch.manual_seed(3)
    before = state()
    DiffLlamaForCausalLM.from_pretrained(base)
    assert state() != before, "loading draws nothing: this test needs another architecture"
    torch.manual_seed(3)
    for _ in range(2):  # quantized now, and from the store
        load(base, task=task)
        assert state() == before


def test_a_seq2seq_base_is_kept_apart_from_a_causal_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=tiny.VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=3,
        decoder_start_token_id=3,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    first, again = (load(tmp_path / "base", task=SEQ2SEQ) for _ in range(2))
    assert len(keys()) == 1
    plain = directly(tmp_path / "base", monkeypatch, task=SEQ2SEQ)
    assert_equal(first, plain)
    assert_equal(again, plain)
    ids = torch.arange(12)[None]
    assert torch.equal(again(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss)


def test_the_callers_quantization_is_left_as_it_was(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    settings = plain_trl.nf4()
    before = settings.to_dict()
    quantization.load_base(
        str(base), quantization=settings, dtype=torch.bfloat16, device=CPU, task=SEQUENCE_CLASSIFICATION
    )
    assert settings.to_dict() == before
