"""What a saved adapter was trained on: the base, as its run quantized it, and the run's own record."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from halfbyte import adapters, quantization
from halfbyte.adapters import config as saved
from halfbyte.adapters import lineage
from halfbyte.errors import UserError
from halfbyte.multimodal import auto_class
from halfbyte.quantization.stored import located
from halfbyte.task import CAUSAL_LM, TASKS, Task


@dataclass(frozen=True)
class Origin:
    """The base of an adapter: its ``directory`` on this machine, its task, and how training loaded it.

    ``quantization`` is None for a base that was trained in 16 bits. ``run`` is what run.json says, if there is one.
    """

    name: str
    revision: str
    directory: Path
    task: Task
    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None
    run: Mapping[str, Any]

    @property
    def auto_class(self) -> str:
        """The name of transformers' class that loads the whole base."""
        return auto_class(AutoConfig.from_pretrained(self.directory), self.task)


def origin_of(adapter: Path, *, model: str | None = None) -> Origin:
    """Return what ``adapter``, a run's or a checkpoint's directory, was trained on; ``model`` stands for its base.

    Without a run.json the base is taken to be NF4 with double quantization in bfloat16, the defaults.
    Raises :class:`UserError` where there is no adapter, where its base is missing or another one, and for 8 bits.
    """
    if adapters.directory_of(str(adapter)) is None:
        raise UserError(f"{adapter} is not an adapter: it has no {saved.FILE}", option="halfbyte merge")
    name, revision = model or adapters.base_of(str(adapter)), adapters.revision_of(str(adapter))
    directory = located(name, revision)
    adapters.same_base(str(adapter), name, revision, quantization.fingerprint(name, revision))
    run = lineage.recorded(str(adapter))
    options = run.get("config") if isinstance(run.get("config"), dict) else {}
    assert isinstance(options, dict)
    if options.get("load_in_8bit"):
        raise UserError(
            f"{adapter} was trained on a base in 8 bits, whose values are not defined without its inputs"
        )
    dtype = getattr(torch, str(options.get("dtype") or "bfloat16"), torch.bfloat16)
    packed = None
    if options.get("load_in_4bit", True):
        packed = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.get("bnb_4bit_quant_type", "nf4"),
            bnb_4bit_use_double_quant=options.get("use_bnb_nested_quant", True),
            bnb_4bit_compute_dtype=dtype,
        )
    task = TASKS.get(str(saved.read(str(adapter)).get("task_type")), CAUSAL_LM)
    return Origin(name, revision, directory, task, dtype, packed, run)
