"""How far models are from one as it was trained: on the same sequences, in float32, one model in memory at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from halfbyte.export.held_out import HeldOut, Scored
from halfbyte.terminal.passes import Pass
from halfbyte.terminal.wording import aligned

MOST = 4 * 2**30  # bytes of logits that are kept on disk; sequences beyond are scored without


@dataclass(frozen=True)
class Measured:
    """What one model does on the scored tokens, and how it differs from the model as trained.

    ``nll`` is nats a token, of a scorer nats a pair, with its standard error over sequences. ``kl`` is that of the
    model as trained to this one, nats a token; ``top1`` the share of tokens with the same most likely one; ``error``
    the norm of the difference of logits over that of the adapter's effect. ``accuracy`` is of pairs: the chosen side
    gained more over the base than the rejected one, of a scorer it has the higher score.
    """

    nll: float | None = None
    nll_error: float | None = None
    kl: float | None = None
    top1: float | None = None
    error: float | None = None
    accuracy: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Return the figures in JSON's types, without what is not known."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class AsTrained:
    """The logits of the model as trained, on disk, and the norm of what its adapter adds to them."""

    directory: Path
    held_out: HeldOut
    scorer: bool = False
    kept: int = 0  # sequences of which logits are kept
    effect: float = 0.0
    base: list[Tensor] = field(default_factory=list)  # without the adapter

    def keep(self, number: int, logits: Tensor) -> None:
        """Keep the logits of a sequence, float32 ``[K, V]``."""
        np.save(self.directory / f"{number}.npy", logits.numpy())
        self.kept = number + 1

    def logits(self, number: int) -> Tensor:
        """The logits of a sequence that is kept."""
        return torch.from_numpy(np.load(self.directory / f"{number}.npy"))


@torch.no_grad()
def as_trained(model: Any, held_out: HeldOut, directory: Path, *, scorer: bool) -> tuple[AsTrained, Measured]:
    """Score ``model``, a PEFT model, with its adapter and without; keep the logits as files in ``directory``.

    A ``scorer`` has one value a sequence, and others one a token of the vocabulary.
    """
    found = AsTrained(directory, held_out, scorer)
    effect, bytes_kept, scores = 0.0, 0, []
    for number, sequence in _shown(held_out, "scoring the model as trained"):
        logits = _logits(model, sequence)
        with model.disable_adapter():
            without = _logits(model, sequence)
        scores.append(_scores(logits, sequence, scorer))
        found.base.append(_scores(without, sequence, scorer))
        bytes_kept += 4 * logits.numel()
        if number == found.kept and (bytes_kept <= MOST or not number):
            found.keep(number, logits)
            effect += (logits - without).square().sum().item()
    found.effect = math.sqrt(effect)
    return found, _measured(scores, held_out, found.base, scorer)


@torch.no_grad()
def compare(model: Any, trained: AsTrained, what: str) -> Measured:
    """Score ``model``, which is ``what``, on the sequences of ``trained``, and compare their logits."""
    scores, divergence, same, tokens, squares = [], 0.0, 0, 0, 0.0
    for number, sequence in _shown(trained.held_out, f"scoring {what}"):
        logits = _logits(model, sequence)
        scores.append(_scores(logits, sequence, trained.scorer))
        if number >= trained.kept:
            continue
        theirs = trained.logits(number)
        width = min(theirs.shape[1], logits.shape[1])  # an embedding may have rows for no token
        logits, theirs = logits[:, :width], theirs[:, :width]
        squares += (logits - theirs).square().sum().item()
        one, other = theirs.double().log_softmax(-1), logits.double().log_softmax(-1)
        divergence += (one.exp() * (one - other)).sum().item()
        same += int((logits.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(logits)
    error = math.sqrt(squares) / trained.effect if trained.effect else None
    found: dict[str, Any] = {"error": error}
    if not trained.scorer and tokens:
        found |= {"kl": divergence / tokens, "top1": same / tokens}
    return _measured(scores, trained.held_out, trained.base, trained.scorer, **found)


@torch.no_grad()
def losses(model: Any, held_out: HeldOut, what: str) -> Tensor:
    """Score ``model``, which is ``what``, by itself: nats and tokens of each sequence, float64 ``[sequences, 2]``.

    Of pairs, the chosen sides.
    """
    rejected = _rejected(held_out.sequences)
    found = []
    for number, sequence in _shown(held_out, f"scoring {what}"):
        if number not in rejected and sequence.scored.any():
            score = _scores(_logits(model, sequence), sequence, False)
            found.append([-score.sum().item(), len(score)])
    return torch.tensor(found, dtype=torch.float64)


def mean_and_error(sums: Tensor) -> tuple[float, float]:
    """The mean a token of ``sums`` ``[sequences, 2]``, of a value and its tokens, and its standard error.

    That of a ratio of sums over sequences, which are drawn independently (Cochran, Sampling Techniques, chapter 6).
    """
    tokens = sums[:, 1].sum().item()
    mean = sums[:, 0].sum().item() / tokens
    squares = (sums[:, 0] - mean * sums[:, 1]).square().sum().item()
    return mean, math.sqrt(squares * len(sums) / max(len(sums) - 1, 1)) / tokens


def _measured(
    scores: Sequence[Tensor], held_out: HeldOut, base: Sequence[Tensor], scorer: bool, **more: Any
) -> Measured:
    """``base`` are the scores without an adapter, which those of pairs are held against."""
    rejected = _rejected(held_out.sequences)
    gains = [
        (score.sum() - (0.0 if scorer else before.sum())).item()
        for score, before in zip(scores, base, strict=True)
    ]
    margins = torch.tensor([gains[number - 1] - gains[number] for number in rejected], dtype=torch.float64)
    accuracy = (margins > 0).double().mean().item() if rejected else None
    if scorer:
        told = [-logsigmoid(margin)[None] for margin in margins]
    else:  # of pairs, the chosen side
        told = [-score for number, score in enumerate(scores) if number not in rejected and len(score)]
    if not told:
        return Measured(accuracy=accuracy, **more)
    mean, spread = mean_and_error(
        torch.tensor([[each.sum().item(), len(each)] for each in told], dtype=torch.float64)
    )
    return Measured(mean, spread, accuracy=accuracy, **more)


def _rejected(sequences: Sequence[Scored]) -> set[int]:
    """The numbers of the sequences that are rejected sides: the second of each pair."""
    return {
        number
        for number in range(1, len(sequences))
        if sequences[number].pair is not None and sequences[number - 1].pair == sequences[number].pair
    }


def _logits(model: nn.Module, sequence: Scored) -> Tensor:
    """What ``model`` says of a sequence, float32 ``[K, V]``: the logits of its scored tokens, or one row of scores."""
    device = next(model.parameters()).device
    found: Tensor = model.eval()(input_ids=sequence.ids[None].to(device), use_cache=False).logits
    if found.dim() == 3:
        found = found[0, :-1][sequence.scored.to(device)]
    return found.float().cpu()


def _scores(logits: Tensor, sequence: Scored, scorer: bool) -> Tensor:
    """The log-probability of each scored token, float64 ``[K]``; of a scorer its score, ``[1]``."""
    if scorer:
        return logits[0, :1].double()
    targets = sequence.ids[1:][sequence.scored]
    return logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _shown(held_out: HeldOut, label: str) -> Iterator[tuple[int, Scored]]:
    with Pass(label, len(held_out.sequences), unit="sequences", summed_up=False) as progress:
        for number, sequence in enumerate(held_out.sequences):
            yield number, sequence
            progress.advance(1)


_COLUMNS = {
    "nll": ("NLL", "{:.4f}"),
    "nll_error": ("+-", "{:.4f}"),
    "kl": ("KL", "{:.2e}"),
    "top1": ("top-1", "{:.2%}"),
    "error": ("error/effect", "{:.2e}"),
    "accuracy": ("accuracy", "{:.1%}"),
}


def table(found: Mapping[str, Measured]) -> list[str]:
    """One line a model under a heading, with the figures that any of them has."""
    names = [name for name in _COLUMNS if any(getattr(each, name) is not None for each in found.values())]
    rows = [("", *(_COLUMNS[name][0] for name in names))]
    for model, each in found.items():
        values = [getattr(each, name) for name in names]
        cells = [
            "" if value is None else _COLUMNS[name][1].format(value)
            for name, value in zip(names, values, strict=True)
        ]
        rows.append((model, *cells))
    return aligned(rows)
