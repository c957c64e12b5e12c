"""What a run would take: memory by part against a device, the step that runs, data, steps, and time."""

from dataclasses import dataclass
from typing import Any

from halfbyte import adapters
from halfbyte.data.sample import LONGEST, Sample
from halfbyte.memory import Memory
from halfbyte.plan.changes import Change, changes
from halfbyte.plan.figures import Figures, figures
from halfbyte.plan.rehearsal import Rehearsal
from halfbyte.plan.target import Target


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that was not started: what it holds at its peak, and what it computes.

    ``lines`` say what of the step is fused and how its data is read; ``trained`` of ``parameters`` parameters are
    trained, in ``modules``. ``tokens_per_second`` are those of one device, measured or stated.
    """

    recipe: str
    base: str
    target: Target
    memory: Memory
    figures: Figures
    lines: tuple[str, ...]
    reference: str | None
    trained: int
    modules: str
    parameters: int
    changes: tuple[Change, ...] = ()
    tokens_per_second: float | None = None

    @property
    def verdict(self) -> str:
        """``fits``, ``tight`` or ``does not fit``."""
        return self.target.verdict(self.memory)

    @property
    def peak(self) -> str:
        """What holds the most memory: ``step`` or ``evaluation``."""
        return "evaluation" if self.memory.evaluating else "step"

    @property
    def seconds_per_epoch(self) -> float | None:
        """The time of one epoch at ``tokens_per_second``; None where that or the tokens are not known."""
        if self.tokens_per_second is None or self.figures.tokens is None:
            return None
        return self.figures.tokens / (self.tokens_per_second * self.target.ranks)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan in JSON's types."""
        return {
            "recipe": self.recipe,
            "base": self.base,
            "verdict": self.verdict,
            "device": {**vars(self.target)},
            "memory": self.memory.as_dict(),
            "peak": self.peak,
            "trained_parameters": self.trained,
            "trained_modules": self.modules,
            "parameters": self.parameters,
            "step": list(self.lines),
            "reference": self.reference,
            "data": self.figures.as_dict(),
            "tokens_per_second": self.tokens_per_second,
            "seconds_per_epoch": self.seconds_per_epoch,
            "changes": [each.as_dict() for each in self.changes],
        }


def plan(rehearsal: Rehearsal, *, full: bool = False, tokens_per_second: float | None = None) -> Plan:
    """Plan the run of ``rehearsal``; ``full`` reads all rows. Raises :class:`UserError` for what a run would refuse."""
    sample = None if full else Sample(longest=0)
    rows = rehearsal.rows(sample)
    trainer = rehearsal.trainer(rows, few=sample is not None)
    told = figures(trainer, rows)
    sampled = told.read is not None and told.read < (rows.report.train.whole or 0)
    lines = [trainer.report.fusion.line()] if sampled else trainer.report.lines()
    if (
        sampled
    ):  # the longest rows, apart: they decide what a step holds, and would weigh too much in all else
        args = trainer.args
        most = max(LONGEST, args.per_device_train_batch_size, args.per_device_eval_batch_size)
        longest = Sample(rows=0, longest=most)
        trainer = rehearsal.trainer(rehearsal.rows(longest), few=True)
        told = told.with_longest(trainer)
    report, target = trainer.report, rehearsal.target
    assert report.memory is not None
    plugin = rehearsal.options.plugin
    coverage = [report.coverage.line()] if plugin.load_in_4bit else []
    fits = target.verdict(report.memory) == "fits"
    return Plan(
        recipe=rehearsal.name,
        base=rehearsal.decisions.base,
        target=target,
        memory=report.memory,
        figures=told,
        lines=(*coverage, *lines, *rows.report.notes),
        reference=_reference(report.precomputed),
        trained=adapters.trained_parameters(trainer.model),
        modules=adapters.trained_modules(trainer.model),
        parameters=_parameters(trainer.model),
        changes=() if fits else tuple(changes(trainer, plugin, target)),
        tokens_per_second=tokens_per_second,
    )


def _reference(precomputed: bool | None) -> str | None:
    """How reference log-probabilities are computed, where there are any."""
    if precomputed is None:
        return None
    return "computed once, before training" if precomputed else "computed in every step, by the same weights"


def _parameters(model: Any) -> int:
    return sum(each.numel() for each in model.parameters())
