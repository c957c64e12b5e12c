"""What one step of a trainer's rows computes: how many tokens meet in one forward, and how its state is held."""

from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from halfbyte.data.lengths import Lengths, most_tokens
from halfbyte.fast import FusionReport
from halfbyte.fast.report import ON
from halfbyte.fast.rows import MOST_PADDED
from halfbyte.memory import Place, Workload

# Tokens of a row that neither an option, the rows nor the model's configuration bounds: TRL's own `max_length`.
_UNBOUNDED = 1024


def workload_of(
    args: Any,
    model: PreTrainedModel | PeftModel,
    lengths: Lengths | None,
    fusion: FusionReport,
    sides: int,
    token_budget: int | None,
    place: Place,
    evaluated: Lengths | None = None,
    *,
    evaluates: bool = False,
) -> Workload:
    """What one step of these rows computes; without ``lengths`` as many tokens as the options allow.

    A trainer that ``evaluates`` does so on rows of the lengths ``evaluated``, in padded batches or as trees.
    """
    size, free = args.per_device_train_batch_size, fusion.padding_free or fusion.trees
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _UNBOUNDED
    length = getattr(args, "max_length", None) or most

    def largest(lengths: Lengths | None, size: int, free: bool, budget: int | None = None) -> tuple[int, int]:
        """The tokens of the largest batch, and those of the longest sequence in it."""
        if lengths is None:
            return int(sides * length * size), length
        sizes = lengths.sizes(padded=not free, shared=fusion.trees)
        tokens = most_tokens(sizes, size, padded=not free, budget=budget)
        # A padded batch is computed as a whole.
        return tokens, int(np.maximum.reduce(lengths.sides).max()) if free else tokens

    tokens, longest = largest(lengths, size, free, token_budget)
    read = None
    if lengths is not None and fusion.trees:
        read = most_tokens(lengths.sizes(padded=False, shared=True) - lengths.unread, size, padded=False)
        read = min(read, tokens)

    def in_rows(lengths: Lengths | None, size: int, tokens: int, free: bool) -> int | None:
        """The most that state mixers see of the largest batch, of ``tokens``, in padded rows; None: no others."""
        if not free:
            return None
        if lengths is None:  # TRL has packed them
            return MOST_PADDED * tokens
        whole = most_tokens(lengths.sizes(padded=False), size, padded=False)
        return min(most_tokens(lengths.sizes(padded=True), size, padded=True), MOST_PADDED * whole)

    of_evaluation = largest(evaluated, args.per_device_eval_batch_size, fusion.trees) if evaluates else (0, 0)
    return Workload(
        tokens=tokens,
        longest=longest,
        read=read,
        evaluated=of_evaluation[0],
        evaluated_longest=of_evaluation[1],
        in_rows=in_rows(lengths, size, tokens, free),
        evaluated_in_rows=in_rows(evaluated, args.per_device_eval_batch_size, of_evaluation[0], fusion.trees),
        optim=str(getattr(args.optim, "value", args.optim)),
        sides=sides,
        chunked_head=fusion.head == ON,
        checkpointing=args.gradient_checkpointing,
        accumulation=args.gradient_accumulation_steps,
        strategy=place.strategy,
        world_size=place.world_size,
        device=place.device,
    )
