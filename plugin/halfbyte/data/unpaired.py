"""Single answers, each labelled as wanted or not: rows of KTO, and pairs that become two such rows each."""

from typing import Any

import datasets

from halfbyte.data.conversion import shapes
from halfbyte.data.conversion.columns import Conversion
from halfbyte.data.conversion.shapes import Seen
from halfbyte.data.formats import DataFormat, Layout, PreferencePairs
from halfbyte.data.kinds import boolean, text_or_messages
from halfbyte.data.preparation.counting import COMPLETIONS, SIDES
from halfbyte.errors import UserError

# Desirable over undesirable rows, each side times its weight: equation 8 of arXiv 2402.01306, in TRL's rounding.
BALANCED = (1.0, 1.33)


def _convert(seen: Seen) -> Conversion | None:
    if any(name in seen.columns for name in shapes.LABELS):
        return shapes.unpaired(seen)
    if seen.all(*PreferencePairs.compared) and isinstance(seen.dataset, datasets.IterableDataset):
        raise UserError(
            "TRL would train the chosen answers of a thousand streamed pairs, and then the rejected ones\n"
            "  write rows of prompt, completion and label in mixed order, or leave `dataset_streaming` out",
            split=seen.split,
        )
    return shapes.pairs(seen)


def _balance(dataset: Any, training: Any) -> str | None:
    """How many rows are wanted and how many not, and what would balance them."""
    if "label" not in dataset.column_names:
        return None
    labels = dataset["label"][:]
    wanted = sum(labels)
    unwanted = len(labels) - wanted
    if not wanted or not unwanted:
        only, other = ("true", "false") if wanted else ("false", "true")
        return f"every label is {only}; without rows whose label is {other}, the loss has nothing to compare with"
    found = f"{wanted:,} desirable, {unwanted:,} undesirable"
    weights = [getattr(training, f"{side}_weight", 1.0) for side in ("desirable", "undesirable")]
    low, high = BALANCED
    if low <= round(weights[0] * wanted / (weights[1] * unwanted), 2) <= high:
        return found
    one = [round(weights[1] * unwanted / wanted * bound, 2) for bound in BALANCED]
    other_ = [round(weights[0] * wanted / unwanted / bound, 2) for bound in (high, low)]
    return (
        f"{found}, weighted {weights[0]:g} and {weights[1]:g}; balanced with `desirable_weight` from {one[0]:g} to "
        f"{one[1]:g}, or `undesirable_weight` from {other_[0]:g} to {other_[1]:g}"
    )


UnpairedPreferences = DataFormat(
    "unpaired preferences",
    (
        Layout({"prompt": text_or_messages, "completion": text_or_messages, "label": boolean}),
        *PreferencePairs.layouts,
    ),
    prepared=(SIDES, COMPLETIONS),
    compared=PreferencePairs.compared,
    remark=_balance,
    convert=_convert,
)
"""A prompt, a completion, and whether that completion is wanted; a pair is a wanted and an unwanted completion."""
