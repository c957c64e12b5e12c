"""Atomic checkpoints: written aside by every rank, sealed and renamed by rank 0, known to all.

Upstream's rename-based save raced between ranks and was reverted (transformers #27925, #36076): here all
ranks have written before rank 0 renames, and none goes on before it has.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from halfbyte import distributed
from halfbyte.checkpoint import manifest as manifests
from halfbyte.checkpoint.changes import config_hash, relevant
from halfbyte.checkpoint.history import checkpoints, step_of
from halfbyte.checkpoint.manifest import Manifest
from halfbyte.errors import Halted
from halfbyte.tracking.record import plain
from halfbyte.tracking.redaction import redact
from halfbyte.trainer.exact_resume import write_progress

PENDING = "_pending-checkpoint"  # upstream pushes no name that begins with an underscore
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SPACE = 2  # free bytes wanted, in sizes of a checkpoint


class SaveError(Halted):
    """A checkpoint could not be written, and every rank knows; the one before it is as it was."""


@dataclass(frozen=True)
class RunFacts:
    """What every manifest of a run repeats; see :class:`Manifest`."""

    run_id: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    versions: Mapping[str, str]
    decided: Mapping[str, Any]


def keep(trainer: Trainer, facts: RunFacts) -> "Saver":
    """Make ``trainer`` save its checkpoints through a :class:`Saver`; on every rank, before it trains."""
    saver = Saver(trainer, facts)
    trainer._save_checkpoint = saver.save
    # Upstream writes below this directory. At the end of training it also deletes there what
    # `save_total_limit: 1` and a best checkpoint leave over, which may be the last good one: it finds none.
    trainer._get_output_dir = lambda trial=None: str(saver.pending)
    trainer._push_from_checkpoint = saver.push_later
    return saver


class Saver:
    """Saves a trainer's checkpoints whole or not at all, with a manifest, and rotates them."""

    def __init__(self, trainer: Trainer, facts: RunFacts) -> None:
        self.output_dir = Path(trainer.args.output_dir)
        self.pending = self.output_dir / PENDING
        self._trainer, self._facts = trainer, facts
        self._main = trainer.is_world_process_zero()
        self._upstream: Callable[..., None] = trainer._save_checkpoint
        self._push: Callable[[str], None] = trainer._push_from_checkpoint
        self._last_size = 0

    def save(self, model: Any, trial: Any = None) -> None:
        """Write checkpoint-N; takes the place of ``Trainer._save_checkpoint``, on every rank.

        Raises :class:`SaveError` on all ranks when one of them could not: the directory, the bytes needed
        and the bytes free, and the checkpoint that is still there.
        """
        step = self._trainer.state.global_step
        final = self.output_dir / f"checkpoint-{step}"
        what = f"saving {final}"
        needed = self._needed()
        try:
            with distributed.on_every_rank(what):
                if self._main:
                    self._make_room(needed)
            with distributed.on_every_rank(what), without_pickled_arguments():
                self._upstream(model, trial)
                write_progress(self._trainer, self.pending / final.name)
            finite = all(distributed.gather(_finite(self._trainer)))
            with distributed.on_every_rank(what):
                if self._main:
                    self._publish(final, finite)
        except Exception as error:
            raise self._failure(final, needed, error) from error
        self._trainer.state.best_model_checkpoint = self._best(step)
        if self._trainer.args.push_to_hub:
            with without_pickled_arguments():
                self._push(str(final))

    def push_later(self, directory: str) -> None:
        """What upstream calls to push a checkpoint: nothing, for it has its name only after the rename."""

    def _make_room(self, needed: int) -> None:
        shutil.rmtree(self.pending, ignore_errors=True)
        self.pending.mkdir()  # not its parents: a directory taken away in mid-run is not made anew
        free = shutil.disk_usage(self.output_dir).free
        if free < _SPACE * needed:
            raise OSError("too little space")

    def _publish(self, final: Path, finite: bool) -> None:
        trainer, written = self._trainer, self.pending / final.name
        state, args = trainer.state, trainer.args
        self._all_ranks_wrote(written)
        step = state.global_step
        state.best_model_checkpoint = self._best(step)
        state.save_to_json(str(written / "trainer_state.json"))
        arguments = json.dumps(redact(plain(args.to_dict())), indent=1)
        (written / "training_args.json").write_text(arguments + "\n", encoding="utf-8")
        manifests.write(
            written,
            Manifest(
                step=step,
                run_id=self._facts.run_id,
                world_size=args.world_size,
                config=relevant(self._facts.config),
                config_hash=config_hash(self._facts.config),
                inputs=self._facts.inputs,
                data_position={
                    "epoch": state.epoch,
                    "batches_per_rank": step * args.gradient_accumulation_steps,
                    "rows_per_batch": args.per_device_train_batch_size,
                    "batches_per_step": args.gradient_accumulation_steps,
                },
                finite=finite,
                resumable=not args.save_only_model,
                best_step=state.best_global_step,
                versions=self._facts.versions,
                decided=self._facts.decided,
            ),
        )
        self._last_size = _size(written)
        if final.exists():  # of a run that was cut back to an earlier step, or damaged
            os.rename(final, self.pending / "replaced")
        os.rename(written, final)
        manifests.sync(self.output_dir)
        self._rotate(final, finite)
        shutil.rmtree(self.pending, ignore_errors=True)

    def _all_ranks_wrote(self, written: Path) -> None:
        args = self._trainer.args
        if args.world_size > 1 and not args.save_only_model:
            for rank in range(args.world_size):
                if not (written / f"rng_state_{rank}.pth").is_file():
                    raise OSError(
                        f"rank {rank} has written nothing here: all nodes must share the output directory"
                    )

    def _best(self, step: int) -> str | None:
        best = self._trainer.state.best_global_step
        path = self.output_dir / f"checkpoint-{best}"
        return str(path) if best is not None and (best == step or path.is_dir()) else None

    def _rotate(self, newest: Path, finite: bool) -> None:
        """Delete the oldest beyond ``save_total_limit``, but not the best, nor the last that is good."""
        limit = self._trainer.args.save_total_limit
        if not limit or limit < 0:
            return
        present = checkpoints(self.output_dir)
        protected = {newest, *(path for path in present if str(path) == self._best(-1))}
        if not finite:
            protected.update([path for path in present if _good(path)][:1])
        removable = [path for path in reversed(present) if path not in protected]
        for path in removable[: max(0, len(present) - limit)]:
            # Renamed first: a kill leaves a whole checkpoint or none.
            os.rename(path, self.pending / f"old-{step_of(path)}")

    def _needed(self) -> int:
        """Bytes a checkpoint takes: as the last one, or what is trained and its optimizer state."""
        if self._last_size:
            return self._last_size
        trained = sum(_bytes(p) for p in self._trainer.model.parameters() if p.requires_grad)
        states = getattr(self._trainer.optimizer, "state", None) or {}
        state = sum(
            _bytes(value)
            for group in list(states.values())
            if isinstance(group, Mapping)
            for value in group.values()
            if isinstance(value, torch.Tensor)
        )
        return trained + (state or 2 * trained)

    def _failure(self, final: Path, needed: int, error: Exception) -> SaveError:
        if self._main:
            shutil.rmtree(self.pending, ignore_errors=True)
        last = next((path for path in checkpoints(self.output_dir) if path != final and _good(path)), None)
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.output_dir).free
            if free < _SPACE * needed or _full(error):
                reason += f"; it needs {_SPACE * needed:,} bytes free (twice its size), and {free:,} are"
        left = (
            f"{last} is whole, `--resume_from_checkpoint auto` goes on from it"
            if last
            else "there is none yet"
        )
        return SaveError(f"cannot save {final}: {reason}. The last good checkpoint: {left}")


@contextlib.contextmanager
def without_pickled_arguments() -> Iterator[None]:
    """Keep the Trainer from writing training_args.bin: a pickle of every option, tokens in clear among them."""
    save = torch.save

    def selective(value: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(value, TrainingArguments):
            save(value, *args, **kwargs)

    torch.save = selective  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.save = save


def _full(error: Exception) -> bool:
    """Whether a write failed for want of space, in Python's words, Rust's or those of torch's writer."""
    words = ("No space left", "PytorchStreamWriter", "unexpected pos", *(f"os error {n})" for n in _FULL))
    return getattr(error, "errno", None) in _FULL or any(word in str(error) for word in words)


def _good(path: Path) -> bool:
    manifest, problems = manifests.check(path)
    return manifest is not None and manifest.finite and manifest.resumable and not problems


def _finite(trainer: Trainer) -> bool:
    """Whether this rank's part of every trained weight is finite."""
    parts = (_local(p) for p in trainer.model.parameters() if p.requires_grad)
    return all(bool(torch.isfinite(part).all()) for part in parts)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    parameter = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()  # FSDP2


def _bytes(tensor: Any) -> int:
    return int(getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size())


def _size(directory: Path) -> int:
    return sum((directory / name).stat().st_size for name in manifests.names(directory))
