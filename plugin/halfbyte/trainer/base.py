"""What all mixins of a trainer share: the values of the run, and the Trainer's events in the mixins' own order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from halfbyte.checkpoint.manifest import Manifest
from halfbyte.data import Prompts
from halfbyte.data.batching import Batching
from halfbyte.data.lengths import Lengths
from halfbyte.fast import FusionReport
from halfbyte.memory import Memory, Workload
from halfbyte.quantization import Coverage

if TYPE_CHECKING:
    from halfbyte.resilience.signals import Signals
    from halfbyte.tracking import Tracker


@dataclass(frozen=True)
class Sampling:
    """The prompts to complete: every ``steps`` steps, or at each evaluation; at most ``max_new_tokens`` for each."""

    prompts: Prompts
    steps: int | None
    max_new_tokens: int

    @classmethod
    def of(cls, prompts: Prompts, script: Any) -> Sampling | None:
        """What the options ``script`` say of ``prompts``; None without any."""
        return cls(prompts, script.sample_steps, script.sample_max_new_tokens) if prompts.prompts else None


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """The values of one run that its trainer's mixins read; all are made before the trainer is.

    ``checkpoint`` is where the run resumes from, with its ``manifest``; None begins at step 0. ``config`` and
    ``inputs`` are repeated in the manifest of every checkpoint. ``samples`` is what to complete while training,
    ``peak_flops`` what one device can compute in a second.
    """

    tracker: Tracker
    signals: Signals
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    on_nonfinite: str = "stop"
    on_oom: str = "stop"
    samples: Sampling | None = None
    peak_flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What building a trainer found: how much of the base is in four bits, and what of the step is fused.

    ``precomputed`` is whether references are computed before training, where that was to be decided; ``batching`` the
    micro-batches of ``max_tokens_per_batch``; ``memory`` what a step of ``workload`` is predicted to hold; ``lengths``
    those of the training rows, where they say, and ``evaluated`` those of the rows of evaluations.
    """

    coverage: Coverage = field(default_factory=Coverage)
    fusion: FusionReport = field(default_factory=FusionReport)
    precomputed: bool | None = None
    batching: Batching | None = None
    workload: Workload | None = None
    lengths: Lengths | None = None
    evaluated: Lengths | None = None
    memory: Memory | None = None

    def lines(self) -> list[str]:
        """What of the step is fused, and how its batches are made, to print before the first."""
        return [self.fusion.line(), *(self.batching.lines() if self.batching is not None else [])]

    @property
    def decided(self) -> Mapping[str, Any]:
        """What this machine decided, for a resume to take over."""
        found: dict[str, Any] = {"save_level": self.fusion.level}
        if self.precomputed is not None:
            found["precompute_ref_log_probs"] = self.precomputed
        return MappingProxyType(found)


class Mixin(TrainerCallback):
    """The base of all mixins: it keeps their values, and makes the trainer its own last callback.

    Each event of the Trainer then runs through the mixins by ``super()``, so that the order of the mixins is the
    order of methods and of events alike. ``recipe_class`` is the class below the mixins. ``ready`` is called with the
    trainer once, when its constructor is done with the model and before anything runs it.
    """

    recipe_class: type[Trainer]
    conduct: Conduct | None = None
    report: BuildReport = BuildReport()

    def __init__(
        self,
        *args: Any,
        conduct: Conduct | None = None,
        ready: Callable[[Any], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.conduct = conduct
        self._ready, self._is_ready = ready, False
        super().__init__(*args, **kwargs)
        self._make_ready_once()
        if conduct is not None:
            self.add_callback(self)

    def make_ready(self) -> None:
        """Finish the model that the constructor below has made; called once, before anything runs it."""
        if self._ready is not None:
            self._ready(self)

    def _make_ready_once(self) -> None:
        """Later calls come from evaluations in the middle of training."""
        if not self._is_ready:
            self._is_ready = True
            self.make_ready()

    def write_beside_checkpoint(self, directory: Path) -> None:
        """Write into ``directory``, on every rank, what a resume needs beside upstream's files."""
