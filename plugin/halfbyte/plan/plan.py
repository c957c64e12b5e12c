"""What a run would take: memory by part against a device, the step that runs, data, steps, and time."""

from dataclasses import dataclass
from typing import Any

from halfbyte.data.sample import Sample
from halfbyte.memory import Memory
from halfbyte.plan.changes import Change, changes
from halfbyte.plan.figures import Figures, figures
from halfbyte.plan.rehearsal import Rehearsal
from halfbyte.plan.target import Target

# The share of a device up to which a run fits without a second thought: the allocator's pieces and the longest row of
# tomorrow want some room.
_COMFORTABLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that was not started: what it holds at its peak, and what it computes.

    ``lines`` say what of the step is fused and how its data is read; ``trained`` of ``parameters`` parameters are
    trained. ``tokens_per_second`` are those of one device, measured or stated.
    """

    recipe: str
    base: str
    target: Target
    memory: Memory
    figures: Figures
    lines: tuple[str, ...]
    reference: str | None
    trained: int
    parameters: int
    changes: tuple[Change, ...] = ()
    tokens_per_second: float | None = None

    @property
    def verdict(self) -> str:
        """``fits``, ``tight`` or ``does not fit``."""
        if self.memory.total <= _COMFORTABLE * self.target.capacity:
            return "fits"
        return "tight" if self.memory.total <= self.target.capacity else "does not fit"

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
            "trained_parameters": self.trained,
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
    rows = rehearsal.rows(None if full else Sample())
    trainer = rehearsal.trainer(rows)
    report, target = trainer.report, rehearsal.target
    assert report.memory is not None
    budget = rehearsal.options.plugin.max_tokens_per_batch
    small = report.memory.total <= _COMFORTABLE * target.capacity
    coverage = [report.coverage.line()] if rehearsal.options.plugin.load_in_4bit else []
    return Plan(
        recipe=rehearsal.name,
        base=rehearsal.decisions.base,
        target=target,
        memory=report.memory,
        figures=figures(trainer, rows),
        lines=(*coverage, *report.lines(), *rows.report.notes),
        reference=_reference(report.precomputed),
        trained=sum(each.numel() for each in trainer.model.parameters() if each.requires_grad),
        parameters=_parameters(trainer.model),
        changes=() if small else tuple(changes(trainer, budget, target)),
        tokens_per_second=tokens_per_second,
    )


def _reference(precomputed: bool | None) -> str | None:
    """How the log-probabilities of a reference are come by, where there is one."""
    if precomputed is None:
        return None
    return "computed once, before training" if precomputed else "computed in every step, by the same weights"


def _parameters(model: Any) -> int:
    return sum(each.numel() for each in model.parameters())
