"""What state mixers keep and work with: they run their own forward, on rows, and few of them have kernels.

transformers' torch functions keep far more than kernels do: a Mamba's, for every token, a chunk of others. So what
autograd saves is counted on a mixer of the same class without weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from halfbyte.fast import rows
from halfbyte.state_kernels import calls_kernels

_FLOAT32 = 4
# Tokens of the row that is counted: some functions go through a row token by token.
_ROW = 1024


def of_mixers(
    layer: nn.Module, config: Any, seen: int, longest: int, size: int, known: dict[type, int | None]
) -> int:
    """Return the bytes that the state mixers of ``layer`` keep and work with, of ``seen`` tokens in rows.

    ``longest`` are the tokens of the longest row. Each keeps what its linear maps take and what its functions save, and
    its backward has gradients of as much. Kernels save about eight times the stream, and what the maps return. What is
    counted of a row is kept in ``known``, by class.
    """
    total, text = 0, config.get_text_config()
    for mixer in rows.mixers(layer):
        linears = list(_linears(mixer))
        stream = text.hidden_size
        taken, returned = (
            sum(getattr(each, name) for each in linears) for name in ("in_features", "out_features")
        )
        row = min(longest, _ROW)
        if type(mixer) not in known:
            known[type(mixer)] = None if calls_kernels(mixer) else saved_of_row(mixer, text, row, size)
        saved = known[type(mixer)]
        if saved is None:
            saved = (8 * stream + returned) * size * row
        total += 2 * (seen * taken * size + saved * seen // max(row, 1))
    return total


def _linears(module: nn.Module) -> Iterator[Any]:
    """The linear maps in ``module``, each with its adapters as one."""
    for child in module.children():
        if isinstance(child, LoraLayer | nn.Linear):
            yield child
        else:
            yield from _linears(child)


def saved_of_row(mixer: nn.Module, config: Any, tokens: int, size: int) -> int | None:
    """Return the bytes that autograd saves of a row of ``tokens`` in ``mixer``, weights apart; None if unknown."""
    cls: Any = type(mixer)
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    try:
        with torch.device("meta"):
            like = cls(config, mixer.layer_idx).to(torch.float32 if size == _FLOAT32 else torch.bfloat16)
            row = torch.empty(
                1, tokens, config.hidden_size, dtype=next(like.parameters()).dtype, requires_grad=True
            )
        like.requires_grad_(False)
        own = [parameter.untyped_storage() for parameter in like.parameters()]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            like(row)
    except Exception:  # whatever a mixer requires beside its input: then its maps say what it keeps
        return None
    return sum(storage.nbytes() for key, storage in kept.items() if key not in set(map(id, own)))
