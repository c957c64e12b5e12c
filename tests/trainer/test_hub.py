"""What a push uploads: named files, whatever lies beside them, and nothing of this machine."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from halfbyte.checkpoint import usable
from halfbyte.cli import main
from halfbyte.trainer.hub import STAGED, _public
from tests import tiny

REPOSITORY = "me/tuned"
TOP = {
    *("adapter_config.json", "adapter_model.safetensors", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}
STATE = {
    *(
        "manifest.json",
        "optimizer.pt",
        "progress_0.json",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ),
}


class Hub:
    """What was uploaded: by commit message, the contents of each path in the repository."""

    def __init__(self, fails: int = 0) -> None:
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.fails = fails

    def upload_folder(self, *, folder_path: str, commit_message: str, **options: Any) -> Any:
        assert options["repo_id"] == REPOSITORY
        if self.fails:
            self.fails -= 1
            failed: Future[None] = Future()
            failed.set_exception(OSError("https://hf_CANARYCANARYCANARY@host is down"))
            return failed
        ignored = tuple(pattern.strip("*-") for pattern in options.get("ignore_patterns") or ())
        root, place = Path(folder_path), options.get("path_in_repo")
        found = {
            "/".join(filter(None, (place, path.relative_to(root).as_posix()))): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and not (ignored and path.relative_to(root).parts[0].startswith(ignored))
        }
        self.commits.append((commit_message, found))
        done: Future[str] = Future()
        done.set_result(commit_message)
        return done if options.get("run_as_future") else commit_message

    @property
    def files(self) -> dict[str, bytes]:
        return {name: content for _, found in self.commits for name, content in found.items()}


class Url(str):
    repo_id = REPOSITORY


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    made = Hub()

    def create(*args: Any, **options: Any) -> Url:
        # As W&B writes it, and other programs that find a directory.
        (tmp_path / "out" / "wandb").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "wandb" / "wandb-metadata.json").write_text("host CANARY")
        return Url(REPOSITORY)

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: made.upload_folder(**options))
    monkeypatch.setenv("HF_TOKEN", "")  # restored afterwards: a run puts its token there
    return made


@pytest.fixture
def pushed(hub: Hub, model_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Train two steps with a save after each, pushing; return the output directory."""

    def train(strategy: str, *more: str) -> Path:
        rows = tiny.write_rows(tmp_path / "rows", tiny.conversations(8))
        output = tmp_path / "out"
        options = {
            **{
                "--model_name_or_path": str(model_dir("llama")),
                "--dataset_name": rows,
                "--output_dir": str(output),
            },
            **{"--max_steps": "2", "--save_steps": "1", "--save_total_limit": "1", "--dtype": "float32"},
            **{"--report_to": "none", "--hub_strategy": strategy, "--hub_token": "hf_CANARYCANARYCANARY"},
            **{"--push_to_hub": "true", "--run_name": "hf_CANARYCANARYCANARY"},
        }
        assert main(["sft", *(word for pair in options.items() for word in pair), *more]) == 0
        return output

    return train


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_each_strategy_pushes_named_files_only(
    hub: Hub, pushed: Callable[..., Path], strategy: str, tmp_path: Path
) -> None:
    output = pushed(strategy)
    whole = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}.get(
        strategy, set()
    )
    expected = TOP | {f"{place}/{name}" for place in whole for name in (TOP - {"README.md"}) | STATE}
    assert hub.files.keys() == expected
    assert len(hub.commits) == {"end": 1, "every_save": 3}.get(strategy, 5)
    assert hub.commits[-1][0] == "End of training"
    for name, content in hub.files.items():
        for told in ("CANARY", str(tmp_path)):
            assert told.encode() not in content, (name, told)
    assert f'PeftModel.from_pretrained(model, "{REPOSITORY}")' in hub.files["README.md"].decode()
    assert hub.files["adapter_model.safetensors"] == (output / "adapter_model.safetensors").read_bytes()
    assert not (output / STAGED).exists()
    # The run itself keeps what it wrote.
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"].startswith("/")
    for place in whole:
        copy = tmp_path / "clone" / ("checkpoint-2" if place == "last-checkpoint" else place)
        for name, content in hub.files.items():
            if name.startswith(f"{place}/"):
                (copy / name.partition("/")[2]).parent.mkdir(parents=True, exist_ok=True)
                (copy / name.partition("/")[2]).write_bytes(content)
        assert usable.check(copy)[1] == []


def test_a_push_that_fails_in_the_background_is_said(hub: Hub, pushed: Callable[..., Path], capsys) -> None:
    hub.fails = 1
    output = pushed("every_save")
    assert "hub: checkpoint-1.1 was not pushed: https://***@host is down" in capsys.readouterr().err
    assert len(hub.commits) == 2
    assert not (output / STAGED).exists()


def test_the_library_pushes_named_files_too(hub: Hub, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    from datasets import Dataset

    output = tmp_path / "out"
    args = SFTConfig(
        **{"output_dir": str(output), "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"},
        **{"push_to_hub": True, "hub_strategy": "end", "save_strategy": "no"},
    )
    trainer = QLoRAPlugin(dtype="float32").trainer(
        SFTTrainer, model=str(model_dir("llama")), args=args, train_dataset=Dataset.from_list(tiny.texts(4))
    )
    trainer.push_to_hub()
    assert hub.files.keys() == TOP
    (tmp_path / "clone").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "clone" / name).write_bytes(content)
    base = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    assert PeftModel.from_pretrained(base, tmp_path / "clone").peft_config


def test_absolute_paths_are_public_by_their_last_names_wherever_they_stand() -> None:
    private = {
        "data_files": {"train": "/home/me/a.jsonl", "test": ["~/b.jsonl"]},
        "fsdp_config": "/home/me/c.json",
        "model_init_kwargs": {"offload_folder": "/home/me/d"},
        "model_name_or_path": "file:///home/me/e",
        "output_dir": "/f",
    }
    kept = {"pad_token": "/", "chat_template": "{{ m }}/a/b", "hub_model_id": "a/b", "sep": "/x"}
    public = _public({**private, **kept})
    assert {key: public[key] for key in kept} == kept
    assert public["data_files"] == {"train": "a.jsonl", "test": ["b.jsonl"]}
    assert (public["model_name_or_path"], public["output_dir"]) == ("e", "f")
