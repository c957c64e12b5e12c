"""The load-balancing loss of a mixture of experts, as TRL adds it to a loss (``trl.trainer.utils.add_fused_lm_head``).

It is a mean over tokens (Switch Transformer, arXiv 2101.03961, equations 4 to 6). TRL's batches hold the prompt of a
pair once a side, so that a token of a forest weighs as many as sequences pass through it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from halfbyte.fast.forest import Forest


def requested(model: PreTrainedModel, given: Any) -> bool:
    """Whether a call of ``model`` with the keyword arguments ``given`` returns router logits."""
    by_configuration = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(given.get("output_router_logits", by_configuration))


def router_loss(model: PreTrainedModel, router_logits: Any, mask: Tensor | None) -> Tensor:
    """Return the load-balancing loss of ``router_logits``, one ``[tokens, E]`` a layer.

    ``mask`` weighs the tokens: an attention mask ``[B, T]``, 1 for each that is not padding, or a forest.
    """
    config = model.config.get_text_config()
    if mask is not None and mask.dtype == torch.int32:
        mask = sequences_through(Forest.of_tensor(mask)).to(mask.device)
    loss: Tensor = load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, mask
    )
    return loss


def sequences_through(forest: Forest) -> Tensor:
    """Return how many sequences, from a root to a leaf, pass through each token of ``forest``: float32 ``[1, T]``."""
    sequences = [0] * len(forest.ends)
    for leaf in forest.leaves:
        for segment in forest.path(leaf):
            sequences[segment] += 1
    lengths = torch.tensor([end - start for start, end in forest.spans])
    return torch.tensor(sequences, dtype=torch.float32).repeat_interleave(lengths)[None]
