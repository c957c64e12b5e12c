"""The one place where a trainer's mixins and their order stand."""

from transformers import Trainer

from halfbyte.trainer.accumulation import AccumulateOnOutOfMemory
from halfbyte.trainer.base import Conduct, Mixin
from halfbyte.trainer.best_metric import BestMetric
from halfbyte.trainer.changed_options import ChangedOptions
from halfbyte.trainer.evaluation_losses import EvaluationLosses
from halfbyte.trainer.exact_resume import ExactResume
from halfbyte.trainer.finite import FiniteSteps
from halfbyte.trainer.first_step import FirstStep
from halfbyte.trainer.float32_adapters import Float32Adapters
from halfbyte.trainer.hub import HubPush
from halfbyte.trainer.invariants import RankInvariants
from halfbyte.trainer.loraplus import LoRAPlus
from halfbyte.trainer.padding_free import PaddingFree
from halfbyte.trainer.references import PrecomputedReferences
from halfbyte.trainer.run_directory import RunDirectory
from halfbyte.trainer.samples import Samples
from halfbyte.trainer.saving import AtomicSaves
from halfbyte.trainer.stopping import StopTogether
from halfbyte.trainer.stored_figures import StoredFigures
from halfbyte.trainer.token_budget import TokenBudget
from halfbyte.trainer.weighted_figures import WeightedFigures
from halfbyte.trainer.whole_adapters import WholeAdapters

# The method resolution order, outermost first: each class wraps the methods of those below it, and sees every
# event after them.
LIBRARY: tuple[type, ...] = (
    HubPush,  # pushes what the saves above it and below it have written
    LoRAPlus,  # makes the optimizer; nothing else does
    PaddingFree,  # makes the training loader; nothing else does
    TokenBudget,  # makes its sampler, and weighs the loss that the classes below compute
    PrecomputedReferences,  # runs the model before training; nothing else does
    WeightedFigures,  # computes the loss and logs; the next does so for other trainers
    StoredFigures,
    EvaluationLosses,  # below both, which say what a batch's loss weighs
    BestMetric,  # looks at options and the figures of evaluations
    WholeAdapters,  # writes what every save of a sharded run writes
    Float32Adapters,  # innermost: it restores what the constructor below it changed, before any other looks
)
RUN: tuple[type, ...] = (
    # Outermost, so that it times the whole save, and cuts an evaluation off outside of `generators_kept`.
    StopTogether,
    # After all others have seen the end of a step, before it is stopped at or saved.
    Samples,
    # Outside of the checks: a step that is done again must be checked from its start.
    AccumulateOnOutOfMemory,
    # Outside of saving: weights that are not finite are refused before a save begins.
    FiniteSteps,
    # Inside of FiniteSteps, which may discard the gradients that it looks at.
    FirstStep,
    # After the step was logged and before it is judged: ranks that differ are named first.
    RankInvariants,
    # After ExactResume has restored the counters that it reads, before a stop at on_save ends the event.
    RunDirectory,
    # Outside of saving, which asks it for this rank's counters; it restores before all others read.
    ExactResume,
    # Restores optimizer and schedule; nothing else does.
    ChangedOptions,
    # Innermost of the saves: what it wraps is upstream's own.
    AtomicSaves,
    *LIBRARY,
)


def run_mixins(conduct: Conduct) -> tuple[type, ...]:
    """The mixins of a run: all of them, the repetition of steps and the samples only where they are wanted."""
    unwanted: set[type] = set()
    if conduct.on_oom != "accumulate":
        unwanted.add(AccumulateOnOutOfMemory)
    if conduct.samples is None:
        unwanted.add(Samples)
    return tuple(mixin for mixin in RUN if mixin not in unwanted)


def compose(trainer_cls: type, mixins: tuple[type, ...]) -> type[Trainer]:
    """A subclass of ``trainer_cls`` with ``mixins`` over it, under the same name."""
    body = {"recipe_class": trainer_cls, "__doc__": trainer_cls.__doc__, "__module__": trainer_cls.__module__}
    return type(trainer_cls.__name__, (*mixins, Mixin, trainer_cls), body)
