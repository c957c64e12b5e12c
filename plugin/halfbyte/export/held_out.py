"""The rows that a model is measured on: a run's evaluation split, or others, tokenized as the run's trainer does."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from trl import DatasetMixtureConfig

from halfbyte import config, data, recipe
from halfbyte.config import RunArguments
from halfbyte.data.preparation.counting import IGNORED
from halfbyte.errors import UserError
from halfbyte.export.origin import Origin
from halfbyte.names import public
from halfbyte.plugin import QLoRAPlugin
from halfbyte.recipe import Recipe

# What of a run's configuration decides its rows.
_DECIDING = (
    "dataset_name", "dataset_config", "datasets", "dataset_train_split", "dataset_test_split", "test_split_size",
    "max_length", "truncation_mode", "dataset_text_field", "completion_only_loss", "assistant_only_loss",
    "user_special_tokens", "seed",
)  # fmt: skip
_TEXT = "The quick brown fox jumps over the lazy dog. In 1969 people walked on the moon; 2 + 2 is 4."
_SOURCES = ("dataset_name", "dataset_config", "datasets", "test_split_size")


@dataclass(frozen=True)
class Scored:
    """Token ids ``[T]``, and which of them after the first are scored, bool ``[T - 1]``.

    Both sides of a ``pair`` have its number, the chosen one first.
    """

    ids: Tensor
    scored: Tensor
    pair: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """What is measured on, in words, and its sequences."""

    source: str
    sequences: list[Scored]


def fixed_text(tokenizer: Any) -> HeldOut:
    """A text of our own, where there are no rows: it shows errors of the weights, not of what was trained."""
    ids = torch.tensor(tokenizer(_TEXT)["input_ids"])
    return HeldOut("a fixed text", [Scored(ids, torch.ones(len(ids) - 1, dtype=torch.bool))])


def rows_of(
    origin: Origin,
    plugin: QLoRAPlugin,
    model: Any,
    tokenizer: Any,
    scratch: Path,
    *,
    given: str | None = None,
    name: str | None = None,
) -> HeldOut | None:
    """The evaluation rows of the run of ``origin``, or those at ``given``; None where there are none.

    ``plugin`` has loaded ``model``. The recipe is ``name`` where no run.json says it. Raises :class:`UserError` for
    rows that are not there, or that the recipe cannot read.
    """
    recorded = origin.run.get("config")
    wanted: Mapping[str, Any] = recorded if isinstance(recorded, Mapping) else {}
    if given is None and wanted.get("eval_strategy", "no") == "no":
        return None
    found, _ = _read(name or origin.run.get("recipe"), wanted, scratch, given, tokenizer, plugin, model)
    return found


def rows_at(given: str, name: str | None, directory: Path, scratch: Path) -> tuple[HeldOut, Any]:
    """The rows at ``given``, as the recipe ``name`` reads them for the model in ``directory``, and that model.

    The model is in float32, with all of its weights as they are. Raises :class:`UserError` as :func:`rows_of` does.
    """
    plugin = QLoRAPlugin(load_in_4bit=False, use_peft=False, fast="none")
    return _read(name, {}, scratch, given, AutoTokenizer.from_pretrained(directory), plugin, str(directory))


def _read(
    name: str | None,
    wanted: Mapping[str, Any],
    scratch: Path,
    given: str | None,
    tokenizer: Any,
    plugin: QLoRAPlugin,
    model: Any,
) -> tuple[HeldOut, Any]:
    """The rows and the trainer's model; ``model`` may be a name."""
    if name is None:
        raise UserError("nothing says which recipe reads these rows; name it", option="--recipe")
    found = recipe.load(str(name))
    if found.trainer is None:
        raise UserError(
            f"the recipe {name} builds its own trainer; its rows are not read here", option="--recipe"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    script, args, mixture = _options(str(name), found, wanted, scratch, given, device)
    script.dataset_train_split = script.dataset_test_split
    rows = data.load(script, mixture, args, found.data, tokenizer)
    trainer_cls = data.counted(found.trainer, rows.report)
    trainer: Any = plugin.trainer(
        trainer_cls, model=model, args=args, train_dataset=rows.train, processing_class=tokenizer
    )
    named = str(given or wanted.get("dataset_name") or "its evaluation rows")
    source = f"{public(named)}, split {script.dataset_test_split}"
    return HeldOut(source, list(_sequences(trainer))), trainer.model


def _options(
    name: str, found: Recipe, wanted: Mapping[str, Any], scratch: Path, given: str | None, device: str
) -> tuple[Any, Any, Any]:
    """The script, training and mixture options that read the rows as the run did."""
    values = {key: wanted[key] for key in _DECIDING if wanted.get(key) is not None}
    if given is not None:
        values = {key: value for key, value in values.items() if key not in _SOURCES} | {
            "dataset_name": given
        }
    values |= {
        "output_dir": str(scratch),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
    }
    words = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    ]
    classes = (RunArguments, found.config, QLoRAPlugin, DatasetMixtureConfig)
    settings = config.read(words, classes, prog=f"halfbyte {name}")
    # Rows are read, and none is trained.
    changed: dict[str, Any] = {"bf16": False, "fp16": False, "precompute_ref_log_probs": False}
    changed |= {"gradient_checkpointing": False, "router_aux_loss_coef": 0.0}
    settings = settings.with_values(**{key: value for key, value in changed.items() if key in settings})
    script, args, _, mixture = settings.build()
    return script, args, mixture


def _sequences(trainer: Any) -> Iterator[Scored]:
    """What the trainer's collator makes of each row, without padding."""
    for number, row in enumerate(trainer.train_dataset):
        batch = trainer.data_collator([row])
        if "chosen_input_ids" in batch:
            for side in ("chosen", "rejected"):
                labels = batch[f"{side}_labels"][0]
                yield Scored(batch[f"{side}_input_ids"][0], labels[1:] != IGNORED, number)
        elif "labels" in batch:
            yield Scored(batch["input_ids"][0], batch["labels"][0, 1:] != IGNORED)
        else:
            pair, mask = number if len(batch["input_ids"]) == 2 else None, batch["attention_mask"].bool()
            # Of a scorer all tokens count.
            completions = batch.get("completion_mask", mask).bool()
            for ids, there, scored in zip(batch["input_ids"], mask, completions, strict=True):
                yield Scored(ids[there], scored[there][1:], pair)
