"""What one step of a trainer's rows computes: how many tokens meet in one forward, and how its state is held."""

from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from halfbyte.data.lengths import Lengths, most_tokens
from halfbyte.fast import FusionReport
from halfbyte.fast.report import ON
from halfbyte.memory import Place, Workload


def workload_of(
    args: Any,
    model: PreTrainedModel | PeftModel,
    lengths: Lengths | None,
    fusion: FusionReport,
    sides: int,
    token_budget: int | None,
    place: Place,
) -> Workload:
    """What one step of these rows computes; without ``lengths`` as many tokens as the options allow."""
    size, free = args.per_device_train_batch_size, fusion.padding_free or fusion.trees
    if lengths is None:
        config = model.config.get_text_config()
        length = getattr(args, "max_length", None) or config.max_position_embeddings
        tokens, longest = int(sides * length * size), length
    else:
        sizes = lengths.sizes(padded=not free, shared=fusion.trees)
        tokens = most_tokens(sizes, size, padded=not free, budget=token_budget)
        # A padded batch is computed as a whole.
        longest = int(np.maximum.reduce(lengths.sides).max()) if free else tokens
    return Workload(
        tokens=tokens,
        longest=longest,
        optim=str(getattr(args.optim, "value", args.optim)),
        sides=sides,
        chunked_head=fusion.head == ON,
        checkpointing=args.gradient_checkpointing,
        accumulation=args.gradient_accumulation_steps,
        strategy=place.strategy,
        world_size=place.world_size,
        device=place.device,
    )
