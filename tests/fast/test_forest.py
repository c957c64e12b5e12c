"""The description of a batch as a forest, and attention along its paths."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from halfbyte.fast.attention import CpuAttention
from halfbyte.fast.attention_graph import GraphAttention
from halfbyte.fast.forest import ROOT, Forest, read_tokens, varlen_layout

# A row alone, a pair, a group of three whose last continues a branch, a pair without a common prefix, an empty branch.
LENGTHS = (5, 7, 3, 4, 6, 2, 1, 3, 4, 0, 5, 3, 2, 0)
PARENTS = (ROOT, ROOT, 1, 1, ROOT, 4, 4, 4, 7, ROOT, 9, 9, ROOT, 12)
FOREST = Forest.of_lengths(LENGTHS, PARENTS)
# All of a segment is read, its end, or nothing of it.
READ = replace(FOREST, read_from=(4, 9, 12, 19, 21, 25, 28, 29, 31, 35, 36, 41, 45, 45))
READ_TOKENS = [i for first, end in zip(READ.read_from, READ.ends, strict=True) for i in range(first, end)]
HEADS, KV_HEADS, SIZE = 4, 2, 16


def test_a_forest_survives_its_tensor() -> None:
    assert Forest.of_tensor(FOREST.tensor()) == FOREST
    assert FOREST.tensor().shape == (1, 1, 2, len(LENGTHS))


def test_what_is_read_survives_the_tensor_too() -> None:
    assert Forest.of_tensor(READ.tensor()) == READ
    assert READ.whole == FOREST
    assert FOREST.whole is FOREST
    assert READ.queries[2:5] == ((4, 7), (7, 7), (7, 11))
    assert torch.equal(read_tokens(READ, torch.device("cpu")), torch.tensor(READ_TOKENS))
    assert read_tokens(FOREST, torch.device("cpu")) is None


def test_positions_continue_from_the_prefix() -> None:
    assert Forest.of_lengths([2, 1, 2], [ROOT, 0, 0]).positions().tolist() == [[0, 1, 2, 2, 3]]
    found = FOREST.positions()[0].split(LENGTHS)
    assert found[8].tolist() == [9, 10, 11, 12]  # after 6 and 3
    assert found[10].tolist() == [0, 1, 2, 3, 4]


def test_the_longest_path() -> None:
    assert FOREST.longest == 6 + 3 + 4


def test_what_a_segment_attends_to() -> None:
    assert FOREST.keys(3) == ((5, 12), (15, 19))
    assert FOREST.keys(2) == ((5, 15),)
    assert FOREST.keys(11) == ((40, 43),)


def test_roots_are_read_off_cumulative_lengths_and_positions() -> None:
    expected = Forest.of_lengths([3, 1, 4])
    assert Forest.of_cumulative(torch.tensor([0, 3, 4, 8], dtype=torch.int32)) == expected
    assert Forest.of_positions(torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])) == expected
    assert Forest.of_positions(torch.arange(8)[None]) is None


def test_the_varlen_layout_gathers_the_keys_of_each_path() -> None:
    layout = varlen_layout(FOREST, torch.device("cpu"))
    counts = [sum(b - a for a, b in FOREST.keys(segment)) for segment in FOREST.segments]
    assert layout.keys.diff().tolist() == counts
    assert layout.queries.diff().tolist() == [n for n in LENGTHS if n]
    assert layout.gathered is not None
    assert layout.gathered.split(counts)[3].tolist() == [*range(5, 12), *range(15, 19)]
    asked = varlen_layout(READ, torch.device("cpu"))
    assert asked.queries[-1] == len(READ_TOKENS)
    assert len(asked.keys) == len(asked.queries) == 1 + len(READ.segments)


def dense(q, k, v, window: int | None, sinks: torch.Tensor | None):
    """The same attention under a mask of the whole row, with a sink as a further key of value zero."""
    total = FOREST.ends[-1]
    hidden = torch.ones(total, total, dtype=torch.bool)
    for segment in FOREST.segments:
        at = torch.tensor([i for a, b in FOREST.keys(segment) for i in range(a, b)])
        start, end = FOREST.spans[segment]
        for query in range(start, end):
            seen = at[: len(at) - (end - 1 - query)]
            hidden[query, seen[-window:] if window else seen] = False
    groups = HEADS // KV_HEADS
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = torch.zeros(1, HEADS, total, total).masked_fill(hidden, float("-inf"))
    if sinks is not None:
        mask = torch.cat([mask, sinks[:, None, None].expand(1, HEADS, total, 1)], -1)
        key, value = (functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(
        1, 2
    )


@pytest.mark.parametrize("forest", [FOREST, READ], ids=["all", "what is read"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 4, HEADS)], ids=["", "sinks"])
@pytest.mark.parametrize("kind", [CpuAttention, GraphAttention])
def test_attention_along_paths_equals_the_mask_of_the_row(
    kind, sinks: torch.Tensor | None, window: int | None, forest: Forest
) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(heads: int):
        return torch.randn(1, FOREST.ends[-1], heads, SIZE, generator=generator, requires_grad=True)

    q, k, v = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
    gradient = torch.randn(q.shape, generator=generator)
    expected = dense(q, k, v, window, sinks)
    asked = q
    if forest is READ:
        expected, gradient, asked = (x[:, READ_TOKENS] for x in (expected, gradient, q))
    expected_gradients = torch.autograd.grad(expected, (q, k, v), gradient)
    call = kind(0.3, None, forest, window, None, sinks)
    found = call.attend(asked, k, v)
    assert torch.allclose(found, expected, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, (q, k, v), gradient), expected_gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)
