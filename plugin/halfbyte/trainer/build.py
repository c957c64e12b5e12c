"""Build a trainer over a loaded model: any trainer class, composed with mixins, its step fused."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from trl import DPOTrainer, KTOTrainer

from halfbyte import adapters, fast, memory, optimizers
from halfbyte.data.batching import Batching
from halfbyte.data.lengths import Lengths
from halfbyte.errors import UserError
from halfbyte.fast.head import cap_for_trl
from halfbyte.fast.pairs import PairsAsTrees
from halfbyte.memory import Place
from halfbyte.quantization import Coverage
from halfbyte.trainer import trial
from halfbyte.trainer.base import BuildReport, Conduct
from halfbyte.trainer.compose import compose
from halfbyte.trainer.token_budget import order_seed
from halfbyte.trainer.workload import workload_of

_EVA_BATCHES = 32


def with_values(args: Any, values: Mapping[str, Any]) -> Any:
    """A copy of training arguments with ``values`` in their fields; ``__post_init__`` is not run again."""
    changed = copy.copy(args)
    for name, value in values.items():
        if hasattr(changed, name):
            kind = type(getattr(args, name))
            setattr(changed, name, kind(value) if name == "optim" else value)
    if "gradient_checkpointing_kwargs" in values:
        changed.activation_checkpointing_kwargs = values["gradient_checkpointing_kwargs"]
    return changed


def build(
    trainer_cls: type[Trainer],
    model: PreTrainedModel | PeftModel,
    coverage: Coverage,
    args: Any,
    mixins: tuple[type, ...],
    *,
    place: Place,
    conduct: Conduct | None = None,
    fresh_adapter: bool,
    initialization: str | None = None,
    loraplus_lr_ratio: float | None = None,
    fused: bool = True,
    memory_budget: str = "auto",
    token_budget: int | None = None,
    save_level: int | None = None,
    parts: frozenset[str] | None = None,
    sides: int | None = None,
    **kwargs: Any,
) -> Trainer:
    """Construct ``trainer_cls`` under ``mixins`` over a loaded ``model``; its ``report`` is a :class:`BuildReport`.

    ``place`` is where the step runs, which decides what its fused layers may keep. ``parts`` of the fast step may
    apply, all that fit the class by default; ``sides`` is the number of sequences that a row brings to one forward.
    ``fresh_adapter`` says that the adapter is new, so that the base is the reference of a preference trainer.
    ``kwargs`` are the trainer's own. Raises :class:`UserError` for an optimizer or schedule that cannot be made, and
    for a model whose loss TRL cannot compute.
    """
    composed = compose(trainer_cls, mixins)
    if args.gradient_checkpointing:
        trial.check_checkpointing(model)

    def finish(trainer: Any) -> None:
        optimizers.check(args, model)
        lengths = Lengths.of(trainer.train_dataset, args)
        evaluated = _evaluated(trainer)
        if token_budget is not None:
            _check_token_budget(trainer, lengths)
        trial.check_loss(trainer, model)
        if fresh_adapter:
            adapters.drop_reference_copy(model)
            if initialization == "eva" and not memory.is_planned(model):
                adapters.initialize_eva(model, _first_batches(trainer, lengths, token_budget))
        scope, refusal = _scope(trainer, trainer_cls, parts, sides), fast.refusal(args)
        if refusal is not None or not fused:
            fusion = fast.FusionReport(mode="none", reason=refusal or "as given")
        else:
            fusion = fast.fuse(
                model,
                scope=scope,
                args=args,
                collator=trainer.data_collator,
                checkpointing=args.gradient_checkpointing,
            )
        trial.check_apart(trainer, model, fusion)
        workload = workload_of(
            args,
            model,
            lengths,
            fusion,
            scope.sides,
            token_budget,
            place,
            evaluated,
            evaluates=trainer.eval_dataset is not None,
        )
        if args.gradient_checkpointing:
            choice = memory.choose(
                model, memory_budget, workload, recorded=save_level, available=place.available
            )
            if choice is not None:
                fusion = replace(fusion, memory=choice, level=choice.level)
        trainer.loraplus_lr_ratio = loraplus_lr_ratio
        trainer.unpads_batches = fusion.padding_free
        if fusion.trees:
            trainer.data_collator = PairsAsTrees(trainer.data_collator)
        if token_budget is not None:
            assert lengths is not None
            trainer.batching = _batching(trainer, lengths, token_budget, fusion)
        trainer.report = BuildReport(
            coverage=coverage,
            fusion=fusion,
            batching=trainer.batching,
            workload=workload,
            lengths=lengths,
            evaluated=evaluated,
            memory=memory.predict(model, workload),
        )

    # Before the constructor returns: what it runs the model for must be computed as every step is.
    with _hidden(args, "model_init_kwargs", "chat_template_path"), cap_for_trl(model):
        return composed(model=model, args=args, conduct=conduct, ready=finish, **kwargs)


def _scope(
    trainer: Any, trainer_cls: type[Trainer], parts: frozenset[str] | None, sides: int | None
) -> fast.Scope:
    """What of a step may be fused: as the class allows, narrowed by ``parts``, with the ``sides`` that are known."""
    scope = fast.scope(trainer_cls)
    ruled_out = {}
    if isinstance(trainer, DPOTrainer) and trainer.compute_metrics is not None:
        ruled_out["padding_free"] = "compute_metrics gets the logits of padded batches"
    return fast.Scope(scope.parts if parts is None else scope.parts & parts, sides or scope.sides, ruled_out)


@contextmanager
def _hidden(args: Any, *fields: str) -> Iterator[None]:
    """Hide options that halfbyte has acted on from TRL, which would act on them again or warn."""
    kept = {name: getattr(args, name) for name in fields if hasattr(args, name)}
    for name in kept:
        setattr(args, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


def _evaluated(trainer: Any) -> Lengths | None:
    """The lengths of the rows that ``trainer`` evaluates on: of several sets, of the one with the longest."""
    sets = trainer.eval_dataset
    each = [
        Lengths.of(rows, trainer.args) for rows in (sets.values() if isinstance(sets, Mapping) else [sets])
    ]
    known = [lengths for lengths in each if lengths is not None]
    if len(known) < len(each):
        return None
    return max(known, key=lambda lengths: int(np.maximum.reduce(lengths.sides).max()), default=None)


def _check_token_budget(trainer: Any, lengths: Lengths | None) -> None:
    """Raise :class:`UserError` for a trainer whose micro-batches cannot be made by tokens."""
    loading, reason = trainer.args.accelerator_config, None
    if isinstance(trainer, KTOTrainer):
        reason = "KTO compares the rows of one micro-batch, whose number it fixes beforehand"
    elif lengths is None:
        reason = f"the rows of {type(trainer).__name__} do not say how many tokens they are"
    elif loading.dispatch_batches or loading.split_batches:
        reason = "dispatch_batches and split_batches split a batch by rows"
    if reason is not None:
        raise UserError(f"{reason}; take it out", option="max_tokens_per_batch")


def _batching(trainer: Any, lengths: Lengths, tokens: int, fusion: fast.FusionReport) -> Batching:
    """The micro-batches of ``tokens`` at most, counted as they are collated."""
    padded = not (fusion.padding_free or fusion.trees or getattr(trainer, "padding_free", False))
    return Batching.fill(
        lengths.sizes(padded=padded, shared=fusion.trees),
        rows=trainer.args.per_device_train_batch_size,
        tokens=tokens,
        padded=padded,
        ranks=trainer.args.world_size,
        seed=order_seed(trainer.args),
    )


def _first_batches(
    trainer: Trainer, lengths: Lengths | None, token_budget: int | None
) -> list[dict[str, torch.Tensor]]:
    """The first collated training batches, the same on every rank and drawing no random numbers."""
    dataset: Any = trainer.train_dataset
    rows, collate = trainer.args.per_device_train_batch_size, trainer.data_collator
    if token_budget is None or lengths is None:
        loader = DataLoader(dataset, batch_size=rows, collate_fn=collate)
    else:
        sizes = lengths.sizes(padded=True)
        batching = Batching.fill(sizes, rows=rows, tokens=token_budget, padded=True)
        loader = DataLoader(dataset, batch_sampler=batching, collate_fn=collate)
    return list(islice(loader, _EVA_BATCHES))
