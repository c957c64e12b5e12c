"""A merge beside the model as trained, and beside what else could be made of its adapter."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from halfbyte.errors import UserError
from halfbyte.export import held_out, measure
from halfbyte.export.held_out import HeldOut
from halfbyte.export.measure import Measured
from halfbyte.export.origin import Origin
from halfbyte.multimodal import model_class
from halfbyte.plugin import QLoRAPlugin
from halfbyte.quantization import compute_in_float32, quantizer
from halfbyte.quantization.streamed import own_quantization
from halfbyte.task import SEQUENCE_CLASSIFICATION
from halfbyte.terminal.wording import say

TRAINED, MERGED = "as trained", "this merge"
ORIGINAL, REQUANTIZED = "adapter on the 16-bit base", "merge in 4 bits again"


def measure_all(
    origin: Origin,
    adapter: Path,
    directory: Path,
    tokenizer: Any,
    *,
    alternatives: bool,
    data: str | None = None,
    recipe: str | None = None,
) -> tuple[str, dict[str, Measured]]:
    """Score the model as trained, the merge in ``directory``, and the ``alternatives``, one after the other.

    Returns on what, in words, and the figures by name. The rows are those of the run, or at ``data``, which ``recipe``
    reads; without any it is a fixed text. Raises :class:`UserError` for ``data`` that cannot be read.
    """
    scorer = origin.task == SEQUENCE_CLASSIFICATION
    with tempfile.TemporaryDirectory(prefix="halfbyte-merge-") as scratch:
        plugin, trained = load_as_trained(origin, adapter, tokenizer)
        rows = _rows(origin, plugin, trained, tokenizer, Path(scratch), data, recipe)
        reference, scored = measure.as_trained(trained, rows, Path(scratch), scorer=scorer)
        found = {TRAINED: scored}
        del trained
        for name, load in _candidates(origin, adapter, directory, alternatives).items():
            found[name] = measure.compare(load(), reference, name)
    return rows.source, found


def load_as_trained(origin: Origin, adapter: Path, tokenizer: Any) -> tuple[QLoRAPlugin, PeftModel]:
    """The weights of training in float32 arithmetic: what a merge is held against."""
    quantization = origin.quantization
    plugin = QLoRAPlugin(
        model_name_or_path=str(origin.directory),
        adapter_name_or_path=str(adapter),
        dtype=dtype_name(origin.dtype),
        fast="none",
        load_in_4bit=quantization is not None,
        lora_task_type=origin.task.peft_type,
        **(
            {}
            if quantization is None
            else {
                "bnb_4bit_quant_type": quantization.bnb_4bit_quant_type,
                "use_bnb_nested_quant": quantization.bnb_4bit_use_double_quant,
            }
        ),
    )
    model = plugin.load(tokenizer=tokenizer, gradient_checkpointing=False)
    assert isinstance(model, PeftModel)
    compute_in_float32(model)
    return plugin, model


def _rows(
    origin: Origin,
    plugin: QLoRAPlugin,
    model: PeftModel,
    tokenizer: Any,
    scratch: Path,
    data: str | None,
    recipe: str | None,
) -> HeldOut:
    try:
        found = held_out.rows_of(origin, plugin, model, tokenizer, scratch, given=data, name=recipe)
    except UserError as error:
        if data is not None:
            raise
        say(f"the rows that the run evaluated on cannot be read: {error.what}", error=True)
        found = None
    if found is None or not found.sequences:
        say(
            "no held-out rows: a fixed text shows errors of the weights only; `--data ROWS` measures more",
            error=True,
        )
        found = held_out.fixed_text(tokenizer)
    return found


def _candidates(
    origin: Origin, adapter: Path, directory: Path, alternatives: bool
) -> dict[str, Callable[[], Any]]:
    """What is compared with the model as trained, each loaded when it is its turn."""
    auto = model_class(AutoConfig.from_pretrained(origin.directory), origin.task)
    place = {"": 0 if torch.cuda.is_available() else "cpu"}

    def load(path: Path, **more: Any) -> PreTrainedModel:
        with quantizer.registered():  # "in 4 bits again" packs experts too
            model: PreTrainedModel = auto.from_pretrained(path, dtype=torch.float32, device_map=place, **more)
        return model

    found: dict[str, Callable[[], Any]] = {MERGED: lambda: load(directory)}
    if alternatives and origin.quantization is not None:
        settings = {**origin.quantization.to_dict(), "bnb_4bit_compute_dtype": torch.float32}
        found[REQUANTIZED] = lambda: load(directory, quantization_config=BitsAndBytesConfig(**settings))
        if own_quantization(origin.directory) is None and origin.task != SEQUENCE_CLASSIFICATION:
            found[ORIGINAL] = lambda: PeftModel.from_pretrained(load(origin.directory), adapter)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
