"""The order of schemes in Table 2 of the QLoRA paper (arXiv 2305.14314), on the loss of models.

There integers are the worst, then FP4, then NF4 with double quantization.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.export import report, schemes
from halfbyte.export.findings import PLAIN
from halfbyte.export.held_out import HeldOut, Scored
from halfbyte.export.measure import mean_and_error
from halfbyte.export.schemes import Scheme

LENGTH = 128  # tokens of a row: what the demo's bases were trained on
MOST = 32  # rows of one text
SIXTEEN = Scheme("bfloat16", 16.0, lambda weight: (weight.bfloat16().float(), 2 * weight.numel()))
ORDER = (schemes.uniform(4), schemes.four_bits("fp4"), schemes.NF4)
"""From the worst to the best, by the paper."""


@dataclass(frozen=True)
class Losses:
    """What was found on a model: its parameters, those in four bits, and by scheme nats and tokens a text.

    Those are float64 ``[texts, 2]``. Rows of one text are no independent draws, and so a text is one.
    """

    parameters: int
    packed: int
    by_scheme: Mapping[str, Tensor]

    def loss(self, scheme: str) -> tuple[float, float]:
        """Nats a token, and the standard error."""
        return mean_and_error(self.by_scheme[scheme])

    def more(self, one: str, other: str) -> tuple[float, float]:
        """How many more nats a token ``one`` costs than ``other``, and the standard error of the paired difference."""
        first, second = self.by_scheme[one], self.by_scheme[other]
        return mean_and_error(torch.stack([first[:, 0] - second[:, 0], first[:, 1]], dim=1))


def rows_of(texts: Iterable[str], tokenizer: Any, length: int = LENGTH) -> tuple[HeldOut, Tensor]:
    """Rows of ``length`` tokens that ``texts`` are cut into, and the number of the text of each, of those with rows."""
    sequences, numbers = [], []
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for piece in torch.tensor(ids).split(length - len(begin))[:MOST]:
            if len(begin) + len(piece) > 1:
                row = torch.cat([torch.tensor(begin, dtype=piece.dtype), piece])
                sequences.append(Scored(row, torch.ones(len(row) - 1, dtype=torch.bool)))
                numbers.append(number)
    return HeldOut("held-out texts", sequences), torch.tensor(numbers).unique(return_inverse=True)[1]


def losses(directory: Path, texts: Iterable[str], length: int = LENGTH) -> Losses:
    """Score the model in ``directory`` as it is, in bfloat16, and under each scheme; computed in float32."""
    rows, numbers = rows_of(texts, AutoTokenizer.from_pretrained(directory), length)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    packed = report.packed_names(directory)
    found = report.losses(model, packed, rows, (SIXTEEN, *ORDER))
    size = int(numbers.max()) + 1
    return Losses(
        sum(weight.numel() for weight in model.parameters()),
        sum(model.get_parameter(name).numel() for name in packed),
        {
            name: torch.zeros(size, 2, dtype=torch.float64).index_add(0, numbers, each)
            for name, each in found.items()
        },
    )


def difference(more: tuple[float, float]) -> str:
    """A difference with its standard error; unresolved under two of them."""
    value, error = more
    shown = f"{value:+.4f} +- {error:.4f}"
    return shown if abs(value) >= 2 * error else f"{shown}, unresolved"


def table(found: Mapping[str, Losses]) -> list[str]:
    """One row a model: perplexity under each scheme, and the differences of neighbours in nats a token."""
    names = [PLAIN, SIXTEEN.name, *(scheme.name for scheme in ORDER)]
    pairs = [*pairwise(names[2:]), (names[2], names[-1]), (names[-1], names[1])]
    rows = [
        ("model", "parameters, in four bits", *("float32" if name == PLAIN else name for name in names)),
    ]
    for model, each in found.items():
        loss = [each.loss(name)[0] for name in names]
        size = f"{each.parameters / 1e6:.2f}M, {each.packed / each.parameters:.0%}"
        rows.append((model, size, *(f"{math.exp(one):.3f}" for one in loss)))
    lines = _markdown(rows)
    rows = [("nats a token", *(f"{one} less {other}" for one, other in pairs))]
    rows += [
        (model, *(difference(each.more(one, other)) for one, other in pairs)) for model, each in found.items()
    ]
    return [*lines, "", *_markdown(rows)]


def _markdown(rows: list[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
