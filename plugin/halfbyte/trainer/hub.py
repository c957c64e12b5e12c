"""What is pushed to the hub: weights, tokenizer and model card by name, and a checkpoint where it is asked for.

Upstream uploads the whole output directory: W&B's files with the host's name, run.json, logs.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from halfbyte.checkpoint import manifest as manifests
from halfbyte.terminal.wording import first_line, say
from halfbyte.trainer.base import Mixin
from halfbyte.trainer.upstream import without_pickled_arguments

STAGED = "_hub"
_WEIGHTS = re.compile(
    r"(?:adapter_|generation_)?config\.json|adapter_model\.safetensors"
    r"|model(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
# Of a checkpoint that is pushed whole: PEFT's card and the arguments name this machine's directories.
_NOT_OF_A_CHECKPOINT = ("README.md", "training_args.json")
_CARD = "README.md"


class HubPush(Mixin):
    """Pushes named files: everything else in the output directory stays on this machine.

    They are put together in ``_hub`` first, as links where the file system has them, so that a checkpoint may be
    deleted while it is uploaded. Absolute paths in the JSON files become their last names.
    """

    push_in_progress: Any
    _pushed = 0

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the final weights, the tokenizer and the card; arguments and result are upstream's."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        stage = self._stage("final")
        final = self.conduct.tracker.record.get("files") if self.conduct is not None else None
        if final is None:  # not saved by a run; a collective where ranks hold shards
            with without_pickled_arguments():
                self.save_model(str(stage), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        if final is not None:
            _link(Path(self.args.output_dir), list(final), stage)
        self._add_card(stage, kwargs)
        self._finish_current_push()
        return self._upload(stage, commit_message, blocking=blocking, token=token, revision=revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the weights of a checkpoint that was saved, and itself, as ``hub_strategy`` says."""
        strategy, checkpoint = self.args.hub_strategy, Path(checkpoint_folder)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        pending = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pending and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        self._pushed += 1
        stage = self._stage(f"{checkpoint.name}.{self._pushed}")
        _link(checkpoint, [name for name in manifests.names(checkpoint) if _WEIGHTS.fullmatch(name)], stage)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(stage)
        self._add_card(stage, {})
        jobs = [self._upload(stage, message, blocking=False)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            whole = self._stage(f"{stage.name}.whole")
            _seal(checkpoint, whole)
            jobs.append(self._upload(whole, f"{message}, checkpoint", blocking=False, path_in_repo=place))
        if pending:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _stage(self, name: str) -> Path:
        """The directory in which a push is put together, empty."""
        stage = Path(self.args.output_dir) / STAGED / name
        if self.is_world_process_zero():
            shutil.rmtree(stage, ignore_errors=True)
        return stage

    def _add_card(self, stage: Path, kwargs: dict[str, Any]) -> None:
        """Put the card beside the weights: it loads them from the hub."""
        stage.mkdir(parents=True, exist_ok=True)
        if self.conduct is not None:
            card = self.conduct.tracker.card(where=self.hub_model_id)
            (stage / _CARD).write_text(card, encoding="utf-8")
            return
        self.create_model_card(model_name=str(self.hub_model_id).rpartition("/")[2], **kwargs)
        if (Path(self.args.output_dir) / _CARD).is_file():
            _link(Path(self.args.output_dir), [_CARD], stage)

    def _upload(
        self,
        stage: Path,
        message: str | None,
        *,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
        path_in_repo: str | None = None,
    ) -> Any:
        """Upload a staged directory and delete it; a failure in the background is printed, and ends nothing."""
        for name in ("adapter_config.json", "config.json", "tokenizer_config.json"):
            _without_paths(stage / name)
        options = {
            "repo_id": self.hub_model_id,
            "folder_path": str(stage),
            "commit_message": message,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "path_in_repo": path_in_repo,
        }
        if blocking:
            try:
                return hf_api().upload_folder(**options)
            finally:
                _delete(stage)
        job = hf_api().upload_folder(**options, run_as_future=True)
        job.add_done_callback(lambda done: _uploaded(done, stage))
        return job


def _uploaded(job: Any, stage: Path) -> None:
    _delete(stage)
    if not job.cancelled() and (error := job.exception()) is not None:
        say(f"hub: {stage.name} was not pushed: {first_line(error)}", error=True)


def _link(source: Path, names: list[str], stage: Path) -> None:
    for name in names:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, stage / name)
        except OSError:  # a file system without hard links
            shutil.copy(source / name, stage / name)


def _seal(checkpoint: Path, stage: Path) -> None:
    """A checkpoint that can be resumed from, without this machine's paths."""
    _link(checkpoint, [n for n in manifests.names(checkpoint) if n not in _NOT_OF_A_CHECKPOINT], stage)
    for name in ("adapter_config.json", "config.json", "tokenizer_config.json", "trainer_state.json"):
        _without_paths(stage / name)
    found = manifests.read(checkpoint)
    manifests.write(stage, replace(found, config=_public(found.config)))


def _without_paths(path: Path) -> None:
    """Rewrite a JSON file whose values are absolute paths; the file it is linked to stays as it is."""
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if (clean := _public(found)) != found:
        path.unlink()
        path.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")


def _public(value: Any, key: str = "") -> Any:
    """``value`` with the last name in place of each absolute path; below the root only under a name of a place."""
    if isinstance(value, dict):
        return {name: _public(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item, key) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~", "file:/")):
        return value
    named = re.search(r"path|file|dir|dataset|deepspeed|best_model_checkpoint", key) is not None
    deep = value.startswith("~/") or len(PurePath(value).parts) > 2
    return PurePath(value).name if named or deep else value


def _delete(stage: Path) -> None:
    shutil.rmtree(stage, ignore_errors=True)
    if stage.parent.is_dir() and not any(stage.parent.iterdir()):
        stage.parent.rmdir()
