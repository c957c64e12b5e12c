"""What decides reference log-probabilities: the pairs, the weights of the reference, and the forward that runs them.

Tokenizer and chat template act through the tokens alone, a quantization through the packed weights and their scales.
Nothing of the policy counts: its seed, rank, scale, loss and batches may change, and the entry is the same.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from halfbyte import distributed
from halfbyte.data.preparation.counting import PAIRS, list_batches, list_lengths, list_values
from halfbyte.files import digest_of

FORMAT = 2
REFERENCE = "ref"  # TRL's name of the adapter that is the reference
BASE = "base"  # the reference is the base with its adapter off
_VERSIONS = ("halfbyte", "torch", "transformers", "bitsandbytes")
# Of a model's configuration: what says where it came from, and what its weights or the forward say.
_NAMES = ("_name_or_path", "transformers_version", "use_cache", "quantization_config", "dtype", "torch_dtype")
_OF_PEFT = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
# PEFT's names for the module that it wraps: targets of the policy's adapter, which the reference does not have.
_WRAPPED = {"base_layer", "original_module"}
# Of the fusion report: how much a step keeps for its backward, which the reference does not have.
_OF_BACKWARD = {"level", "memory"}


def pairs(dataset: Any, args: Any) -> tuple[str, np.ndarray]:
    """Return a sha256 of tokenized pairs as ``args`` truncate them, and the tokens of each, int64 ``[n]``."""
    sha = hashlib.sha256(f"{args.max_length} {args.truncation_mode}\n".encode())
    tokens = [np.empty(0, dtype=np.int64)]
    for batch in list_batches(dataset, *PAIRS.columns):
        prompt, *answers = (list_lengths(column).astype(np.int64) for column in batch.values())
        for length, column in zip((prompt, *answers), batch.values(), strict=True):
            sha.update(length.tobytes())
            sha.update(list_values(column).astype(np.int64).tobytes())
        sides = [prompt + answer for answer in answers]
        tokens.append(np.sum([np.minimum(side, args.max_length or side) for side in sides], axis=0))
    return sha.hexdigest(), np.concatenate(tokens)


def weights(model: nn.Module) -> tuple[str, str]:
    """Return a sha256 of the base in ``model`` and one of its reference adapter, or :data:`BASE` without one.

    Of what is in memory, which may be other than in the checkpoint: rows for tokens that were added. A collective
    where the model is sharded; else the first rank alone reads its weights, and the others return nothing of use.
    """
    adapters: Mapping[str, Any] = getattr(model, "peft_config", {})
    base, reference = [], []
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor):  # a module's extra state
            continue
        parts = name.split(".")
        if REFERENCE in parts and REFERENCE in adapters:
            reference.append((name, tensor))
        elif not adapters.keys() & set(parts):
            base.append((".".join(part for part in parts if part not in _WRAPPED), tensor))
    sha = _digest(base, model)
    if not reference:
        return sha, BASE
    config = {k: _plain(v) for k, v in adapters[REFERENCE].to_dict().items() if k not in _OF_PEFT}
    return sha, digest_of([config, _digest(reference, model)])


def forward(trainer: Any, model: Any) -> dict[str, Any]:
    """Return what of ``trainer`` decides how a forward of ``model`` rounds, in JSON's types."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = {key: value for key, value in base.config.to_dict().items() if key not in _NAMES}
    fusion = {key: value for key, value in trainer.report.fusion.as_dict().items() if key not in _OF_BACKWARD}
    return {
        "config": digest_of(_plain(config)),
        "dtype": str(base.get_input_embeddings().weight.dtype),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "attention": base.config._attn_implementation,
        "fused": _plain(fusion),
        "device": trainer.accelerator.device.type,
        "dropout": not trainer.args.disable_dropout,
        "versions": {package: version(package) for package in _VERSIONS},
    }


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], model: nn.Module) -> str:
    sha = hashlib.sha256()
    first = PartialState().is_main_process
    for name, tensor in tensors:
        if first or distributed.is_sharded(model):
            whole = distributed.whole(tensor).contiguous().reshape(-1).view(torch.uint8)
            sha.update(f"{name} {whole.numel()}\n".encode())
            content: Any = whole.numpy()
            sha.update(content if first else b"")
    return sha.hexdigest()


def _plain(value: Any) -> Any:
    """``value`` in JSON's types, sets sorted."""
    return json.loads(json.dumps(value, sort_keys=True, default=_text))


def _text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
