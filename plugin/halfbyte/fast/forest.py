"""The batch as a forest: sequences in one row of tokens without padding, what they have in common only once.

A tree is a sequence and what continues it: a row of SFT is a root alone, a preference pair the prefix that its sides
share and two branches, a group of completions a prompt and one branch each. Each segment (root or branch) is
contiguous in the row; its tokens attend to the segments that it continues, whole, and to those before them in their
own. For a causal model the prefix computes what it would compute in each sequence, so sharing it is exact.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

ROOT = -1


@dataclass(frozen=True)
class Forest:
    """Where the segments of one row of tokens begin and end, and which segment each continues.

    ``ends`` are the past-the-last tokens of the segments, in the order of the row; ``parents`` the number of the
    segment that each continues, smaller than its own, or :data:`ROOT`. ``read_from`` is the first token of each whose
    output is read behind the last layer, its end where none is; None where all are.
    """

    ends: tuple[int, ...]
    parents: tuple[int, ...]
    read_from: tuple[int, ...] | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], parents: Sequence[int] | None = None) -> "Forest":
        """Segments of these lengths, roots unless ``parents`` are given."""
        return cls(tuple(accumulate(lengths)), (ROOT,) * len(lengths) if parents is None else tuple(parents))

    @classmethod
    def of_cumulative(cls, cumulative: Tensor) -> "Forest":
        """Read sequences off cumulative lengths that begin with 0, as variable-length kernels take them."""
        return _of_cumulative(cumulative)

    @classmethod
    def of_positions(cls, positions: Tensor) -> "Forest | None":
        """Read sequences off positions ``[1, T]``, which begin again in each of them; None for one sequence."""
        return _of_positions(positions)

    @classmethod
    def of_tensor(cls, encoded: Tensor) -> "Forest":
        """Read what :meth:`tensor` returned off the device, once for all layers of a forward."""
        return _of_tensor(encoded)

    def tensor(self, device: Any = None) -> Tensor:
        """Return the forest as int32 ``[1, 1, 2 or 3, segments]``: a model passes it on in the place of a mask."""
        rows = [self.ends, self.parents, *([self.read_from] if self.read_from is not None else [])]
        return torch.tensor([[rows]], dtype=torch.int32, device=device)

    @cached_property
    def whole(self) -> "Forest":
        """The forest of which every token's output is read, as the layers before the last see it."""
        return self if self.read_from is None else Forest(self.ends, self.parents)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First and past-the-last token of each segment."""
        return tuple(zip((0, *self.ends[:-1]), self.ends, strict=True))

    @cached_property
    def queries(self) -> tuple[tuple[int, int], ...]:
        """First and past-the-last of each segment's queries, counted among those of all: its last tokens, or all."""
        if self.read_from is None:
            return self.spans
        ends = tuple(accumulate(end - first for end, first in zip(self.ends, self.read_from, strict=True)))
        return tuple(zip((0, *ends[:-1]), ends, strict=True))

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """The segments that have queries."""
        return tuple(i for i, (start, end) in enumerate(self.queries) if end > start)

    def path(self, segment: int) -> tuple[int, ...]:
        """The segments from the root to ``segment``, both included."""
        parent = self.parents[segment]
        return (segment,) if parent == ROOT else (*self.path(parent), segment)

    @property
    def leaves(self) -> tuple[int, ...]:
        """The segments that no other continues."""
        return tuple(sorted(set(range(len(self.ends))) - set(self.parents)))

    def tokens(self, segment: int, device: Any = None) -> Tensor:
        """Return the tokens of the path from the root to ``segment``, int64."""
        return torch.cat([torch.arange(*self.spans[i], device=device) for i in self.path(segment)])

    def keys(self, segment: int) -> tuple[tuple[int, int], ...]:
        """The spans of the row that ``segment`` attends to, its own last; neighbours are one."""
        found: list[tuple[int, int]] = []
        for start, end in (self.spans[i] for i in self.path(segment)):
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            elif end > start:
                found.append((start, end))
        return tuple(found)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest path from a root."""
        sizes = [end - start for start, end in self.spans]
        return max((sum(sizes[i] for i in self.path(segment)) for segment in range(len(sizes))), default=0)

    @property
    def branches(self) -> bool:
        """Whether a segment continues another."""
        return any(parent != ROOT for parent in self.parents)

    def positions(self) -> Tensor:
        """Return the position of each token in its sequence, int64 ``[1, T]``."""
        begins: list[int] = []
        for parent in self.parents:
            at = 0 if parent == ROOT else begins[parent] + self.spans[parent][1] - self.spans[parent][0]
            begins.append(at)
        parts = [torch.arange(at, at + b - a) for at, (a, b) in zip(begins, self.spans, strict=True)]
        return torch.cat(parts).unsqueeze(0)


@dataclass(frozen=True)
class VarlenLayout:
    """A forest for variable-length kernels: cumulative lengths of queries and keys, and which keys to gather.

    ``queries`` and ``keys`` are int32 ``[segments + 1]``; ``gathered`` int64 is an index of the row, None where the
    keys are the row itself.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    gathered: Tensor | None


@lru_cache(maxsize=2)
def varlen_layout(forest: Forest, device: torch.device) -> VarlenLayout:
    """Return the layout of ``forest`` on ``device``; every layer of a forward has the same."""
    spans = [forest.keys(segment) for segment in forest.segments]
    of_keys = [sum(end - start for start, end in each) for each in spans]
    of_queries = [forest.queries[segment][1] - forest.queries[segment][0] for segment in forest.segments]
    gathered = None
    if forest.branches:
        at = [torch.arange(start, end) for each in spans for start, end in each]
        gathered = torch.cat(at).to(device)
    return VarlenLayout(
        _cumulative(of_queries, device), _cumulative(of_keys, device), max(of_queries), max(of_keys), gathered
    )


@lru_cache(maxsize=2)
def read_tokens(forest: Forest, device: torch.device) -> Tensor | None:
    """Return which tokens of the row have an output that is read, int64 ``[K]`` in order; None where all have."""
    if forest.read_from is None:
        return None
    parts = [torch.arange(first, end) for first, end in zip(forest.read_from, forest.ends, strict=True)]
    return torch.cat(parts).to(device)


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def once_per_tensor(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember the last result: every layer of a forward passes the same tensor."""
    last: list[tuple[weakref.ref[Tensor], tuple[Any, ...], Any]] = []

    def remembered(tensor: Tensor, *others: Any) -> Any:
        if last and last[0][0]() is tensor and last[0][1] == others:
            return last[0][2]
        result = function(tensor, *others)
        last[:] = [(weakref.ref(tensor), others, result)]
        return result

    return remembered


@once_per_tensor
def _of_cumulative(cumulative: Tensor) -> Forest:
    ends = cumulative.flatten().tolist()[1:]
    return Forest(tuple(ends), (ROOT,) * len(ends))


@once_per_tensor
def _of_positions(positions: Tensor) -> Forest | None:
    row = positions.flatten()
    begins = [*((row[1:] != row[:-1] + 1).nonzero().flatten() + 1).tolist(), len(row)]
    return Forest(tuple(begins), (ROOT,) * len(begins)) if len(begins) > 1 else None


@once_per_tensor
def _of_tensor(encoded: Tensor) -> Forest:
    return Forest(*map(tuple, encoded[0, 0].tolist()))
