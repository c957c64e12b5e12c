"""Atomic checkpoints: written aside by every rank, sealed and renamed by rank 0, reported to all.

Upstream's rename-based save raced between ranks and was reverted (transformers #27925, #36076): here all ranks have
written before rank 0 renames, and none continues before it has.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from halfbyte import distributed
from halfbyte.checkpoint import manifest as manifests
from halfbyte.checkpoint.changes import config_hash, relevant
from halfbyte.checkpoint.history import checkpoints, step_of
from halfbyte.checkpoint.manifest import Manifest
from halfbyte.checkpoint.space import SaveError, explain_failure, require_space
from halfbyte.checkpoint.usable import is_usable
from halfbyte.distributed import local_shard
from halfbyte.files import follow_umask, sync
from halfbyte.terminal.redaction import redact
from halfbyte.tracking.record import plain
from halfbyte.trainer.base import Conduct, Mixin
from halfbyte.trainer.upstream import without_pickled_arguments

PENDING = "_pending-checkpoint"


class AtomicSaves(Mixin):
    """Saves checkpoints whole or not at all, with a manifest, and rotates them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._saved_bytes = 0  # of the last checkpoint
        super().__init__(*args, **kwargs)

    @property
    def _pending(self) -> Path:
        return Path(self.args.output_dir) / PENDING

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write checkpoint-N, on every rank.

        Raises :class:`SaveError` on all ranks when one of them could not: the directory, the bytes needed and the
        bytes free, and the checkpoint that is still there.
        """
        step = self.state.global_step
        final = Path(self.args.output_dir) / f"checkpoint-{step}"
        what = f"saving {final}"
        needed = self._checkpoint_bytes()
        try:
            with distributed.on_every_rank(what):
                if self.is_world_process_zero():
                    self._make_room(needed)
            with distributed.on_every_rank(what), without_pickled_arguments():
                super()._save_checkpoint(model, trial)
                self.write_beside_checkpoint(self._pending / final.name)
            finite = all(distributed.gather(self._trained_weights_are_finite()))
            with distributed.on_every_rank(what):
                if self.is_world_process_zero():
                    self._publish(final, finite)
        except Exception as error:
            if self.is_world_process_zero():
                shutil.rmtree(self._pending, ignore_errors=True)
            raise SaveError(explain_failure(final, needed, error)) from error
        self.state.best_model_checkpoint = self._best(step)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _get_output_dir(self, trial: Any = None) -> str:
        """Return where upstream writes checkpoints: aside.

        At the end of training upstream also deletes there what ``save_total_limit: 1`` and a best checkpoint leave
        over, which may be the last good one: it finds none.
        """
        return str(self._pending)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing when upstream asks: a checkpoint has its name only after the rename."""

    def _make_room(self, needed: int) -> None:
        shutil.rmtree(self._pending, ignore_errors=True)
        self._pending.mkdir()  # not its parents: a directory removed in mid-run is not created again
        require_space(self._pending.parent, needed)

    def _publish(self, final: Path, finite: bool) -> None:
        written = self._pending / final.name
        state, args, conduct = self.state, self.args, self.conduct
        assert isinstance(conduct, Conduct)
        self._require_all_ranks(written)
        step = state.global_step
        state.best_model_checkpoint = self._best(step)
        state.save_to_json(str(written / "trainer_state.json"))
        arguments = json.dumps(redact(plain(args.to_dict())), indent=1)
        (written / "training_args.json").write_text(arguments + "\n", encoding="utf-8")
        follow_umask(written)
        manifests.write(
            written,
            Manifest(
                step=step,
                run_id=conduct.tracker.record["run_id"],
                world_size=args.world_size,
                config=relevant(conduct.config),
                config_hash=config_hash(conduct.config),
                inputs=conduct.inputs,
                data_position={
                    "epoch": state.epoch,
                    "batches_per_rank": step * args.gradient_accumulation_steps,
                    "rows_per_batch": args.per_device_train_batch_size,
                    "batches_per_step": args.gradient_accumulation_steps,
                },
                finite=finite,
                resumable=not args.save_only_model,
                best_step=state.best_global_step,
                versions=conduct.tracker.record["versions"],
                decided=dict(self.report.decided),
                wandb_id=conduct.tracker.record.get("wandb_id"),
            ),
        )
        self._saved_bytes = sum((written / name).stat().st_size for name in manifests.names(written))
        if final.exists():  # of a run that was cut back to an earlier step, or damaged
            os.rename(final, self._pending / "replaced")
        os.rename(written, final)
        sync(final.parent)
        self._rotate(final, finite)
        shutil.rmtree(self._pending, ignore_errors=True)

    def _require_all_ranks(self, written: Path) -> None:
        if self.args.world_size > 1 and not self.args.save_only_model:
            for rank in range(self.args.world_size):
                if not (written / f"rng_state_{rank}.pth").is_file():
                    raise OSError(
                        f"rank {rank} has written nothing here: all nodes must share the output directory"
                    )

    def _best(self, step: int) -> str | None:
        best = self.state.best_global_step
        path = Path(self.args.output_dir) / f"checkpoint-{best}"
        return str(path) if best is not None and (best == step or path.is_dir()) else None

    def _rotate(self, newest: Path, finite: bool) -> None:
        """Delete the oldest beyond ``save_total_limit``, but not the best, nor the last that is good."""
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        present = checkpoints(newest.parent)
        protected = {newest, *(path for path in present if str(path) == self._best(-1))}
        if not finite:
            protected.update([path for path in present if is_usable(path)][:1])
        removable = [path for path in reversed(present) if path not in protected]
        for path in removable[: max(0, len(present) - limit)]:
            # Renamed first: a kill leaves a whole checkpoint or none.
            os.rename(path, self._pending / f"old-{step_of(path)}")

    def _checkpoint_bytes(self) -> int:
        """Bytes a checkpoint takes: as the last one, or what is trained and its optimizer state."""
        if self._saved_bytes:
            return self._saved_bytes
        trained = sum(_bytes(p) for p in self.model.parameters() if p.requires_grad)
        states = getattr(self.optimizer, "state", None) or {}
        state = sum(
            _bytes(value)
            for group in list(states.values())
            if isinstance(group, Mapping)
            for value in group.values()
            if isinstance(value, torch.Tensor)
        )
        return trained + (state or 2 * trained)

    def _trained_weights_are_finite(self) -> bool:
        """Whether this rank's shard of every trained weight is finite."""
        shards = (local_shard(p) for p in self.model.parameters() if p.requires_grad)
        return all(bool(torch.isfinite(shard).all()) for shard in shards)


def _bytes(tensor: Any) -> int:
    return int(getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size())
