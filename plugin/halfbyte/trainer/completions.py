"""Greedy completions of prompts by a model that is being trained, which is afterwards as it was before."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from halfbyte import distributed
from halfbyte.checkpoint.generators import generators_kept
from halfbyte.distributed import zero3

Ids = Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """The new tokens of one prompt, and why there are no more: ``stop``, ``length`` or ``time``."""

    ids: tuple[int, ...]
    ended: str


def complete(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    stops: frozenset[int],
    pad: int,
    batch_size: int,
    ends: Callable[[], bool],
) -> list[Completion]:
    """Return what ``model`` adds to each of ``prompts``, in their order, as ``generate`` does without sampling.

    Prompts are padded on the left, ``batch_size`` at a time; a model that carries a state along the row gets them one
    by one. ``stops`` end a completion beside the model's own end tokens. ``ends()`` is looked at before every token:
    the batch at work is then cut short, and of those after it nothing is returned.

    A sharded model is called on every rank, with the same prompts. Each rank completes its share of them, and goes on
    until all ranks are done, since every token gathers the weights; each returns all completions.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    stops |= _own_stops(base)
    found: list[Completion] = []
    size = 1 if base._is_stateful else batch_size
    rank, ranks = _ranks(model)
    with generators_kept(), evaluated(model), zero3.in_forward(model):
        for begin in range(0, len(prompts), size * ranks):
            if any(_of_all(ends(), ranks)):
                break
            block = prompts[begin : begin + size * ranks]
            batch = block[rank::ranks] or block[:1]  # a rank without a share takes part
            made = _of_all(_complete(model, base, batch, max_new_tokens, stops, pad, ends, ranks), ranks)
            found += [made[place % ranks][place // ranks] for place in range(len(block))]
    return found


def _ranks(model: nn.Module) -> tuple[int, int]:
    """This rank's number and the number of ranks that complete together: those that hold shards of ``model``."""
    if not distributed.is_sharded(model):
        return 0, 1
    state = PartialState()
    return state.process_index, state.num_processes


def _of_all(value: T, ranks: int) -> list[T]:
    return distributed.gather(value) if ranks > 1 else [value]


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode without gradients; every module and parameter has its own flag afterwards.

    PEFT's `set_adapter`, by which the reference is switched on, sets which parameters are trained.
    """
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)


def _complete(
    model: Any,
    base: Any,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    stops: frozenset[int],
    pad: int,
    ends: Callable[[], bool],
    ranks: int,
) -> list[Completion]:
    device, longest = base.get_input_embeddings().weight.device, max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    # Under FSDP2 the root's weights are whole within its own method only.
    rows = (model if ranks > 1 else base).generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        # Of sampling, which a model's own configuration may set: upstream warns about each.
        temperature=None,
        top_k=None,
        top_p=None,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        return_dict_in_generate=False,
        synced_gpus=ranks > 1,
        stopping_criteria=StoppingCriteriaList([_Ends(ends)]),
    )
    return [_until_a_stop(row, stops, max_new_tokens) for row in rows[:, longest:].tolist()]


def _until_a_stop(ids: list[int], stops: frozenset[int], most: int) -> Completion:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    if end is not None:
        return Completion(tuple(ids[:end]), "stop")
    return Completion(tuple(ids), "length" if len(ids) == most else "time")


def _own_stops(base: Any) -> frozenset[int]:
    own = getattr(base.generation_config, "eos_token_id", None)
    return frozenset(own if isinstance(own, list) else [] if own is None else [own])


class _Ends(StoppingCriteria):
    def __init__(self, ends: Callable[[], bool]) -> None:
        self._ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._ends(), dtype=torch.bool, device=input_ids.device)
