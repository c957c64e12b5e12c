"""State mixers in a padding-free batch: each sequence is a row of its own to them, and to nothing else of the model.

A Mamba, a gated delta rule, a short convolution or lightning attention carries a state along its input, and keeps
packed sequences apart only in kernels that few machines have. So its input ``[1, T, H]`` is gathered into right-padded
rows ``[B, longest, H]``, one for each path of the forest from a root to a leaf, and its output is put back: a prefix,
which is in several rows, from the first of them. Padding does not reach the tokens before it, as
:mod:`halfbyte.fast.rows_proof` shows for every model. The forest comes by value, in the place of the mask or beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.fast.arguments import by_position
from halfbyte.fast.forest import Forest
from halfbyte.fast.varlen import observe

# What a forest is called as an argument of its own.
BESIDE = "forest"
# Of a packed row as a whole, and so of no row of a sequence.
_OF_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", BESIDE)
# What has a value for each token.
_OF_TOKENS = ("position_ids", "position_embeddings")

# How many times the tokens of a batch a mixer may see before its rows are grouped by length.
MOST_PADDED = 2

Carry = Callable[[Any, Tensor], dict[str, Any]]


def in_masks(stack: Any, forest: Tensor) -> dict[str, Any]:
    """Return the arguments that bring ``forest`` to the layers of ``stack`` as the mask of every kind of layer."""
    kinds = {"full_attention", "linear_attention", *(getattr(stack.config, "layer_types", None) or ())}
    return {"attention_mask": dict.fromkeys(sorted(kinds), forest)}


def beside_the_mask(stack: Any, forest: Tensor) -> dict[str, Any]:
    """Return the same for layers that are handed the mask as it is, or all arguments that their model does not know."""
    return {"attention_mask": forest, BESIDE: forest}


CARRIES: tuple[Carry, ...] = (in_masks, beside_the_mask)


@dataclass(frozen=True)
class Group:
    """Rows of about one length.

    ``gathered`` int64 ``[B * longest]`` is the token at each place; padding repeats the last one of its row.
    """

    rows: int
    gathered: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Return the tokens of ``x`` ``[1, T, ...]`` in rows, ``[B, longest, ...]``."""
        return x[0].index_select(0, self.gathered).view(self.rows, -1, *x.shape[2:])


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a forest are in rows.

    ``places`` int64 ``[T]`` is where the first row that has a token has it, among the places of all ``groups``.
    """

    groups: tuple[Group, ...]
    places: Tensor

    def put_back(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the tokens of the rows of each group, ``[B, longest, ...]``, as one row, ``[1, T, ...]``."""
        return torch.cat([each.flatten(0, 1) for each in rows]).index_select(0, self.places)[None]


@lru_cache(maxsize=2)
def layout(forest: Forest, device: torch.device) -> Layout:
    """Return the layout of ``forest`` on ``device``; every mixer of a forward has the same.

    Where a batch in rows of one length is more than twice its tokens (one long sequence packed beside short ones), rows
    are grouped by length, so that less than half of each group is padding.
    """
    owner = torch.full((forest.ends[-1],), -1)
    rows: list[Tensor] = []
    # A side that ends with the prefix is part of the row of the other one.
    for leaf in sorted(
        forest.leaves, key=lambda segment: forest.spans[segment][0] == forest.spans[segment][1]
    ):
        row = forest.tokens(leaf)
        new = row[owner[row] < 0]
        if len(new):
            owner[new] = len(rows)
            rows.append(row)
    groups, places, begin = [], torch.empty_like(owner), 0
    for group in _grouped([len(row) for row in rows]):
        longest = max(len(rows[index]) for index in group)
        gathered = []
        for index in group:
            row = rows[index]
            mine = (owner[row] == index).nonzero()[:, 0]
            places[row[mine]] = begin + mine
            begin += longest
            gathered.append(row[torch.arange(longest).clamp_(max=len(row) - 1)])
        groups.append(Group(len(group), torch.cat(gathered).to(device)))
    return Layout(tuple(groups), places.to(device))


def _grouped(lengths: list[int]) -> list[list[int]]:
    """The rows of these lengths that a mixer sees at once: all, or those between two powers of two."""
    if len(lengths) * max(lengths) <= MOST_PADDED * sum(lengths):
        return [list(range(len(lengths)))]
    found: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        found.setdefault((length - 1).bit_length(), []).append(index)
    return list(found.values())


class RowsForward:
    """The ``forward`` of a state mixer: its own, in rows where a forest comes."""

    def __init__(self, mixer: nn.Module) -> None:
        self.mixer = mixer
        self._names = by_position(type(mixer).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the mixer returns for its stream ``[1, T, H]``, the first argument."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        forest = _carried(given)
        own = type(self.mixer).forward
        if forest is None:
            return own(self.mixer, *args, **kwargs)
        observe(self.mixer, forest)
        in_rows = {name: value for name, value in given.items() if name not in _OF_PACKED}
        if "attention_mask" in in_rows:
            in_rows["attention_mask"] = None
        if len(forest.ends) == 1:
            return own(self.mixer, **in_rows)
        places = layout(forest, given[self._names[0]].device)
        outputs = []
        for group in places.groups:
            of_tokens = {
                name: _each(in_rows[name], group.gather)
                for name in (self._names[0], *_OF_TOKENS)
                if in_rows.get(name) is not None
            }
            outputs.append(own(self.mixer, **in_rows | of_tokens))
        if isinstance(outputs[0], tuple):
            return places.put_back([output[0] for output in outputs]), *outputs[0][1:]
        return places.put_back(outputs)


class StackForward:
    """The ``forward`` of the module that has the layers: it hands them the forest of its batch."""

    def __init__(self, stack: Any, carry: Carry) -> None:
        self.stack, self.carry = stack, carry
        self._names = by_position(type(stack).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stack of layers returns."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        forest = _of_batch(given) if mask is None else mask if _is_forest(mask) else None
        if forest is not None:
            observe(self.stack, Forest.of_tensor(forest))
            given |= self.carry(self.stack, forest)
        return type(self.stack).forward(self.stack, **given)


def install(stack: Any, mixers: tuple[type[nn.Module], ...], carry: Carry) -> None:
    """Let the ``mixers`` in the layers of ``stack`` see rows from now on; only the instances' ``forward`` change."""
    for module in stack.modules():
        if isinstance(module, mixers):
            module.forward = RowsForward(module)
    stack.forward = StackForward(stack, carry)


def remove(model: nn.Module) -> None:
    """Give mixers and stack their own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), RowsForward | StackForward):
            del module.forward


def mixers(model: nn.Module) -> list[nn.Module]:
    """Return the modules in ``model`` that see rows."""
    return [each for each in model.modules() if isinstance(each.__dict__.get("forward"), RowsForward)]


def _carried(given: Mapping[str, Any]) -> Forest | None:
    found = next((v for v in (given.get(BESIDE), given.get("attention_mask")) if _is_forest(v)), None)
    return None if found is None else Forest.of_tensor(found).whole


def _is_forest(mask: Any) -> bool:
    """Whether ``mask`` is what :meth:`Forest.tensor` returns."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4


def _of_batch(given: Mapping[str, Any]) -> Tensor | None:
    """The forest of a batch without a mask: sequences in one row, as lengths or positions say."""
    inputs = next(each for each in (given.get("input_ids"), given.get("inputs_embeds")) if each is not None)
    cumulative, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    if len(inputs) != 1:
        return None
    forest = None
    if cumulative is not None:
        forest = Forest.of_cumulative(cumulative)
    elif positions is not None:
        forest = Forest.of_positions(
            positions.reshape(-1, positions.shape[-1])[0]
        )  # the first of several kinds
    return None if forest is None else forest.tensor(inputs.device)


def _each(value: Any, of_tokens: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(of_tokens, value)) if isinstance(value, tuple) else of_tokens(value)
