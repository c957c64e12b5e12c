"""What a report found: each scheme's bits, error and loss, as rows of a table."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte.export.measure import mean_and_error
from halfbyte.terminal.wording import aligned

PLAIN = "as it is"


@dataclass(frozen=True)
class Layer:
    """One weight that would be quantized: its size, and for each scheme the squared norm of its error."""

    name: str
    weights: int
    norm: float
    errors: dict[str, float]


@dataclass
class Report:
    """What was found; ``losses`` float64 ``[sequences, 2]`` by scheme where there were rows, and of the model as it is.

    ``bits`` are those by formula and by bytes.
    """

    model: str
    layers: list[Layer]
    bits: dict[str, tuple[float, float]]
    histogram: Tensor
    drift: dict[int, float]
    source: str | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)

    def error(self, scheme: str) -> float:
        """The relative error of all weights together."""
        return math.sqrt(
            sum(each.errors[scheme] for each in self.layers) / sum(each.norm for each in self.layers)
        )

    def loss(self, scheme: str) -> tuple[float, float, float, float]:
        """Nats a token with ``scheme``, the standard error, and the same of the difference from the model as it is.

        The difference is of one sequence under both, so that its error is much the smaller.
        """
        own, plain = self.losses[scheme], self.losses[PLAIN]
        both = torch.stack([own[:, 0] - plain[:, 0], own[:, 1]], dim=1)
        return *mean_and_error(own), *mean_and_error(both)

    def rows(self) -> list[tuple[Any, ...]]:
        """One row a scheme, as :meth:`columns` names it."""
        found: list[tuple[Any, ...]] = []
        if self.losses:
            found.append((PLAIN, 16.0, 16.0, 0.0, *self.loss(PLAIN)))
        for name, (formula, stored) in self.bits.items():
            loss = self.loss(name) if self.losses else ()
            found.append((name, formula, stored, self.error(name), *loss))
        return found

    def columns(self) -> tuple[str, ...]:
        """The names of what :meth:`rows` returns."""
        names = ("scheme", "bits by formula", "bits by bytes", "relative error")
        return (*names, "NLL", "+-", "more NLL", "+-") if self.losses else names

    def lines(self) -> list[str]:
        """A table to print, and the drift."""
        formats = ("{}", "{:.3f}", "{:.3f}", "{:.4f}", "{:.4f}", "{:.4f}", "{:+.4f}", "{:.4f}")
        cells = [[how.format(value) for how, value in zip(formats, row, strict=False)] for row in self.rows()]
        found = aligned([self.columns(), *cells])
        if self.source is not None:
            found.append(f"NLL in nats a token on {self.source}")
        after = ", ".join(f"{error:.1%} after {rounds:,}" for rounds, error in self.drift.items())
        found.append(f"merging an update of 2% into NF4 and out again moves the base: {after}")
        return found
