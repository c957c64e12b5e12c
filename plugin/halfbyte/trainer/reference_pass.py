"""One pass of the reference over a set of pairs: shared by all ranks, kept by the first, read where it is cached."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from halfbyte import distributed, store
from halfbyte.checkpoint.generators import generators_kept
from halfbyte.parts import Parts
from halfbyte.resilience.memory import advised, reference_advice
from halfbyte.terminal import passes
from halfbyte.terminal.wording import plural, say
from halfbyte.trainer import reference_shard
from halfbyte.trainer.reference_shard import Shard, Side, Sides

_WAIT = 1.0  # seconds between two looks at what another process has computed


def sums(
    trainer: Any,
    model: Callable[[], Any],
    dataset: Any,
    batch_sizes: Sequence[int],
    shards: Sequence[np.ndarray],
    description: Mapping[str, Any] | None,
    *,
    name: str,
    label: str,
) -> Sides:
    """Return the log-probabilities of both sides of each pair, float32 ``[n]``, on every rank; a collective.

    ``shards`` are the rows that are computed and stored together. The first rank reads what the store has under
    ``description``; None leaves the store alone. All ranks compute the rest by ``model()``, in batches of
    ``batch_sizes`` pairs, for each shard, whose rows do not depend on the number of ranks.
    """
    first, begun = trainer.args.process_index == 0, time.monotonic()
    what = f"reference log-probabilities ({name})"
    with _Kept(description if first else None, label, shards, trainer.ld_alpha) as kept:
        missing = _missing(kept, first)
        computed = sum(len(shards[number]) for number in missing)
        if missing:
            with (
                generators_kept(),
                _mode(reference := model(), _is_training(trainer)),
                passes.shown(bar=not trainer.args.disable_tqdm),
                passes.Pass(
                    what, len(dataset), done=len(dataset) - computed, unit="pairs", summed_up=False
                ) as progress,
            ):
                for number in missing:
                    rows, size = shards[number], min(batch_sizes[number], len(shards[number]))
                    with advised(partial(reference_advice, trainer.args, size)):
                        shard = _compute(trainer, reference, dataset, rows, size)
                    if first:
                        kept.add(number, shard)
                    progress.advance(len(rows))
        own = kept.columns()
        if first:
            seconds = time.monotonic() - begun
            say(
                f"{what}: {_done(len(dataset), computed, seconds, kept.is_kept)}",
                error=trainer.conduct is None,
            )
    return distributed.agree(own)


def _done(pairs: int, computed: int, seconds: float, is_kept: bool) -> str:
    if not computed:
        return f"{plural(pairs, 'pair')} read from the cache, no reference pass"
    read = f", {pairs - computed:,} read from the cache" if computed < pairs else ""
    return f"{plural(computed, 'pair')} computed in {seconds:.1f} s{', cached' if is_kept else ''}{read}"


class _Kept:
    """The shards that the first rank has, summed: read from the store, or computed and written to it."""

    def __init__(
        self,
        description: Mapping[str, Any] | None,
        label: str,
        rows: Sequence[np.ndarray],
        ld_alpha: float | None,
    ) -> None:
        self._rows, self._ld_alpha = rows, ld_alpha
        self._sums: dict[int, Sides] = {}
        self._parts: Parts | None = None
        self._waits = False
        if description is not None:
            try:
                self._parts = Parts(store.REFERENCES, description, label)
            except OSError as error:
                store.not_kept(store.REFERENCES, error, None)

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        if self._parts is not None:
            self._parts.close()

    @property
    def is_kept(self) -> bool:
        return self._parts is not None

    def look(self) -> tuple[list[int], bool]:
        """Return the shards that are not there, and whether this process may compute them now."""
        self._read()
        if self._parts is None or not (missing := self._missing()):
            return self._missing(), True
        try:
            if self._parts.try_to_build():
                self._read()  # what another process wrote before it left
                return self._missing(), True
        except OSError as error:
            self._leave(error)
            return missing, True
        if not self._waits:
            self._waits = True
            say(
                "reference log-probabilities: another process is computing the same; waiting for it",
                error=True,
            )
        time.sleep(_WAIT)
        return missing, False

    def add(self, number: int, shard: Shard) -> None:
        self._sums[number] = shard.sums(self._ld_alpha)
        if self._parts is not None:
            try:
                self._parts.add(reference_shard.name(number), shard.content(), total=len(self._rows))
            except OSError as error:
                self._leave(error)

    def columns(self) -> Sides:
        """Return the sums of all pairs, in the order of the rows."""
        if not self._sums:
            return np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.float32)
        order = np.argsort(np.concatenate(self._rows))
        chosen, rejected = (
            np.concatenate([self._sums[number][side] for number in range(len(self._rows))])[order]
            for side in (0, 1)
        )
        return chosen, rejected

    def _missing(self) -> list[int]:
        return [number for number in range(len(self._rows)) if number not in self._sums]

    def _read(self) -> None:
        """Sum what the store has of the missing shards."""
        if self._parts is None:
            return
        for number in self._missing():
            content = self._parts.read(reference_shard.name(number))
            if content is not None:
                self._sums[number] = Shard.read(content).sums(self._ld_alpha)

    def _leave(self, error: OSError) -> None:
        """Go on without the store: what is computed is in memory."""
        assert self._parts is not None
        self._parts.close()
        self._parts = store.not_kept(store.REFERENCES, error, None)


def _missing(kept: _Kept, first: bool) -> list[int]:
    """Return the shards to compute, the same on every rank, once no other process computes them."""
    while True:
        # Broadcast at each look, so that no rank waits in a collective for longer than it may.
        missing, may_compute = distributed.agree(kept.look() if first else ([], False))
        if may_compute or not missing:
            return list(missing)


def _compute(trainer: Any, model: Any, dataset: Any, rows: np.ndarray, batch_size: int) -> Shard:
    """Compute a shard, batch by batch in turn over the ranks; complete on every rank."""
    rank, ranks = trainer.args.process_index, trainer.args.world_size
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    own = []
    for start in range(0, len(batches), ranks):
        # Each rank runs as many forwards, which are collectives where the model is sharded.
        at = min(start + rank, len(batches) - 1)
        found = _forward(trainer, model, dataset, batches[at])
        if at == start + rank:
            own.append((at, *found))
    ordered = sorted((each for rank in distributed.gather(own) for each in rank), key=lambda each: each[0])
    chosen, rejected = (Side.of([row for found in ordered for row in found[side]]) for side in (1, 2))
    return Shard(rows, chosen, rejected)


def _forward(
    trainer: Any, model: Any, dataset: Any, rows: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Run TRL's own forward of the reference; return the log-probabilities of each pair's scored tokens, by side."""
    columns = dataset[rows.tolist()]
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batch = send_to_device(trainer.data_collator(examples), trainer.accelerator.device)
    seen: list[torch.Tensor] = []

    def recorded(**given: Any) -> Any:
        output = model(**given)
        seen.append(output.log_probs)
        return output

    trainer.compute_ref_log_probs(recorded, batch)
    scored = batch["completion_mask"][..., 1:].bool().cpu().numpy()
    found = seen[0][:, -scored.shape[1] :].float().cpu().numpy()
    sides = [values[mask] for values, mask in zip(found, scored, strict=True)]
    return sides[: len(rows)], sides[len(rows) :]


def _is_training(trainer: Any) -> bool:
    """Whether the reference runs in training mode, as in a step: that has no dropout, unless it is asked for."""
    return bool(trainer.args.disable_dropout) and not trainer.is_deepspeed_enabled


@contextmanager
def _mode(model: Any, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
