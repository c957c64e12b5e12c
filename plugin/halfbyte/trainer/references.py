"""Reference log-probabilities computed once: by the forward that trains, cached under what made them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from datasets import IterableDataset
from peft import PeftModel
from trl import DPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.dpo_trainer import DataCollatorForPreference

from halfbyte import distributed, parts, store
from halfbyte.data.batching import Batching
from halfbyte.errors import UserError
from halfbyte.fast.scope import keeps
from halfbyte.files import digest_of
from halfbyte.memory import is_planned
from halfbyte.resilience.memory import advised, reference_advice
from halfbyte.terminal.wording import plural, say
from halfbyte.trainer import reference_identity, reference_pass, reference_shard
from halfbyte.trainer.base import Conduct, Mixin

OPTION = "precompute_ref_log_probs"
_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_IMAGES = {"image", "images"}  # by which TRL knows rows that it does not tokenize ahead


class PrecomputedReferences(Mixin):
    """Computes the references of DPO and KTO with the finished model, as every step is computed.

    TRL runs the model inside its constructor, and names its cache by weights and rows alone: references from another
    forward or dtype would be taken for these. For DPO the pass is :mod:`halfbyte.trainer.reference_pass`. TRL's hash
    covers the policy's adapter, so that another seed or rank computes an equal reference again, and on several
    processes it expects the datasets library to have a directory for the rows (trl 1.16, dpo_trainer.py:1180).

    ``precompute_ref_log_probs`` None is decided here by cost: one pass ahead, or one in every epoch.
    """

    train_dataset: Any
    eval_dataset: Any
    batching: Batching | None  # of TokenBudget
    _precompute_model_hash: str
    _precompute_engine: Any
    _named_by_forward: bool = False
    _reference_weights: tuple[str, str] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        training = kwargs.get("args")
        if not _is_dpo(self.recipe_class) or training is None:
            super().__init__(*args, **kwargs)
            return
        wanted: bool | None = training.precompute_ref_log_probs
        # With an adapter TRL's constructor has nothing to do for it; without one it is spared a reference model.
        ours, why = isinstance(kwargs.get("model"), PeftModel), None
        ahead = wanted
        if wanted is None and not ours:
            ahead, why = _decide(training, kwargs, kwargs.get("conduct"))
        training.precompute_ref_log_probs = bool(ahead) and not ours
        super().__init__(*args, **kwargs)
        if ours:
            self._precompute(wanted)
        elif why is not None:
            self._note(bool(ahead), why)

    def _precompute(self, wanted: bool | None) -> None:
        """Give every set of pairs its references, if they are ``wanted``, or cost less than in every step."""
        sets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        if wanted is None:
            ahead, why = _decide(self.args, sets, self.conduct, self.batching)
            if ahead is None and self._is_cached(self.train_dataset):
                ahead, why = True, "cached"
            wanted = bool(ahead)
            self._note(wanted, why)
        elif wanted:
            _require_rows(sets)
        self.args.precompute_ref_log_probs = self.precompute_ref_logps = wanted
        if not wanted or is_planned(self._reference):
            return
        size = self.args.precompute_ref_batch_size
        if self.train_dataset is not None:
            self.train_dataset = self._precompute_ref_logps(
                self.train_dataset, "train", size or self.args.per_device_train_batch_size
            )
        size = size or self.args.per_device_eval_batch_size
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._precompute_ref_logps(dataset, name, size)
                for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", size)

    def _note(self, ahead: bool, why: str) -> None:
        how = "computed once, before training" if ahead else "computed in every step"
        if not is_planned(self._reference):
            say(f"reference log-probabilities: {how} ({why})", error=self.conduct is None)
        self.report = replace(self.report, precomputed=ahead)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Return ``dataset`` with the columns that TRL's loss reads; a collective."""
        self._make_ready_once()
        if not _is_dpo(self.recipe_class):
            with advised(partial(reference_advice, self.args, batch_size)):
                return self._named_precompute(dataset, name, batch_size)
        _require_rows({"train_dataset": dataset})
        dataset = dataset.remove_columns([each for each in _COLUMNS if each in dataset.column_names])
        description, lengths = self._describe(dataset)
        shards = reference_shard.split(lengths)
        batch_sizes = [batch_size] * len(shards)
        if self.batching is not None and name == "train":
            # A shard's first pair is its longest.
            most = [max(self.batching.tokens // int(lengths[shard[0]]), 1) for shard in shards]
            batch_sizes = [min(each) for each in zip(batch_sizes, most, strict=True)]
        sides = reference_pass.sums(
            self,
            self._running_reference,
            dataset.with_format(None),
            batch_sizes,
            shards,
            description,
            name=name,
            label=self._label(len(dataset), name),
        )
        for column, values in zip(_COLUMNS, sides, strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def _named_precompute(self, *args: Any) -> Any:
        if not self._named_by_forward:
            self._named_by_forward = True
            fusion = self.report.fusion
            made_by = [fusion.mode, fusion.layers, fusion.linears, self.accelerator.mixed_precision]
            self._precompute_model_hash = digest_of([self._precompute_model_hash, *made_by])
        return super()._precompute_ref_logps(*args)

    def _describe(self, dataset: Any) -> tuple[dict[str, Any] | None, np.ndarray]:
        """Return what decides the references of ``dataset``, on the first rank, and the tokens of each pair.

        None for a collator whose settings are unknown: what it makes of the rows is not decided by what is hashed.
        """
        pairs, lengths = reference_identity.pairs(dataset, self.args)
        collator = getattr(self.data_collator, "padded", self.data_collator)
        if type(collator) is not DataCollatorForPreference:
            return None, lengths
        model = self._reference
        if self._reference_weights is None:  # neither the base nor the reference adapter is trained
            self._reference_weights = reference_identity.weights(model)
        base, adapter = self._reference_weights
        return {
            "format": reference_identity.FORMAT,
            "pairs": pairs,
            "pairs_in_a_shard": reference_shard.PAIRS,
            "weights": base,
            "adapter": adapter,
            "forward": reference_identity.forward(self, model),
        }, lengths

    def _is_cached(self, dataset: Any) -> bool:
        """Return whether all references of ``dataset`` are in the store; the weights are hashed if any may be."""
        if is_planned(self._reference):
            return False
        pairs, _ = reference_identity.pairs(dataset, self.args)
        if not distributed.agree(parts.holds(store.REFERENCES, pairs=pairs)):
            return False
        description, lengths = self._describe(dataset)
        stored = set() if description is None else parts.names_of(store.REFERENCES, description)
        wanted = {reference_shard.name(number) for number in range(len(reference_shard.split(lengths)))}
        return distributed.agree(wanted <= stored)

    @property
    def _reference(self) -> Any:
        return self.model if self.ref_model is None else self.ref_model

    def _running_reference(self) -> Any:
        """Return the reference as it can be run now: DeepSpeed gathers weights in an engine of its own."""
        if self.ref_model is not None or not self.is_deepspeed_enabled:
            return self._reference
        if self.deepspeed is not None:  # training has begun
            return self.model_wrapped
        if self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
        return self._precompute_engine

    def _label(self, pairs: int, name: str) -> str:
        model = self._reference
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        adapter = reference_identity.REFERENCE in getattr(model, "peft_config", {})
        return f"{base.name_or_path}{' with an adapter' if adapter else ''}: {plural(pairs, 'pair')} ({name})"


def _is_dpo(trainer_cls: type) -> bool:
    """Whether ``trainer_cls`` computes its references as TRL's DPO trainer does."""
    return keeps(trainer_cls, DPOTrainer, ("_precompute_ref_logps", "compute_ref_log_probs"))


def _require_rows(sets: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` if some of the ``sets`` have no tokenized rows ahead of training."""
    if (obstacle := _obstacle(sets)) is not None:
        raise UserError(
            f"{obstacle}, and cannot be gone through ahead of training; write false", option=OPTION
        )


def _obstacle(sets: Mapping[str, Any]) -> str | None:
    """Why references cannot be computed ahead of training, or None."""
    evaluated = sets.get("eval_dataset")
    for each in (
        sets.get("train_dataset"),
        *(evaluated.values() if isinstance(evaluated, dict) else [evaluated]),
    ):
        if isinstance(each, IterableDataset):
            return "the data is a stream"
        if each is not None and _IMAGES & set(each.column_names):
            return "the data has images, which are prepared with each batch"
    return None


def _decide(
    args: Any, sets: Mapping[str, Any], conduct: Conduct | None, batching: Batching | None = None
) -> tuple[bool | None, str]:
    """Return whether a pass ahead of training costs less than the reference of every step, and why.

    None: it costs the same, unless it is cached. A resumed run keeps what it began with.
    """
    manifest = conduct.manifest if conduct is not None else None
    if manifest is not None and OPTION in manifest.decided:
        return bool(manifest.decided[OPTION]), "as when the run began"
    if (obstacle := _obstacle(sets)) is not None:
        return False, obstacle
    if args.sync_ref_model:
        return False, "the reference changes"
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        batches = args.max_steps * args.gradient_accumulation_steps * args.world_size
        alike = max(len(sets["train_dataset"]), 1) / args.per_device_train_batch_size
        epochs = batches / (alike if batching is None else len(batching))
    if epochs > 1:
        return True, f"{epochs:.3g} epochs"
    return None, "one epoch at most, and not cached"
