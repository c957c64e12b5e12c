"""EVA (arXiv 2410.07170): fresh adapters begin at the leading directions of what their layers read."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import Tensor

from halfbyte.adapters.fresh import evaluating, to_float32
from halfbyte.errors import UserError


def initialize_eva(model: PeftModel, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set every A ``[r, H]`` to the leading directions of its layer's inputs on ``batches``.

    B stays zero, so the logits do not change. The same batches give the same weights on every rank.

    Raises :class:`UserError` if there are no batches, or none of as many tokens as an adapter has directions: PEFT
    skips smaller ones, and reads the batches again without end.
    """

    class Loader:
        """What PEFT requires of a dataloader: it can be iterated more than once."""

        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter(inputs)

        def __len__(self) -> int:
            return len(inputs)

    wanted = ("input_ids", "attention_mask", "position_ids")
    inputs = [{k: v.to(model.device) for k, v in batch.items() if k in wanted} for batch in batches]
    if not inputs:
        raise UserError("'eva' requires training rows, and there are none", option="init_lora_weights")
    for batch in inputs:
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    rank = model.peft_config[model.active_adapter].r
    largest = max(int(batch["attention_mask"].sum()) for batch in inputs)
    if largest < rank:
        raise UserError(
            f"'eva' finds {rank} directions (lora_r) in the tokens of one batch, and the largest has {largest}; raise "
            f"per_device_train_batch_size, or lower lora_r",
            option="init_lora_weights",
        )
    with evaluating(model), torch.random.fork_rng():
        initialize_lora_eva_weights(
            model,
            Loader(),
            prepare_model_inputs_fn=_mask,
            prepare_layer_inputs_fn=_of_tokens,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    to_float32(model)


def _mask(batch: dict[str, Tensor], _: Any) -> Tensor:
    return batch["attention_mask"].bool()


def _of_tokens(inputs: Any, mask: Tensor, _: str) -> Tensor:
    """What a layer reads of the tokens in ``mask`` ``[B, T]``: one row ``[H]`` each, or one a head.

    Most layers read ``[B, T, H]``. Latents may have heads before the tokens, ``[B, N, T, H]``, which PEFT's own
    function takes for tokens.
    """
    read: Tensor = inputs[0] if isinstance(inputs, tuple | list) else inputs
    batch, tokens = mask.shape
    if read.shape[:2] != mask.shape and read.dim() > 3 and read.shape[2] == tokens:
        read = read.movedim(2, 1)
    if read.shape[0] == batch * tokens:
        read = read.reshape(batch, tokens, *read.shape[1:])
    return (read[mask] if read.shape[:2] == mask.shape else read).reshape(-1, read.shape[-1])
