"""Pairs of which each side is scored as a whole: rows of a reward model."""

from halfbyte.data.conversion import shapes
from halfbyte.data.formats import DataFormat, Layout
from halfbyte.data.kinds import Kind, number, text_or_messages
from halfbyte.data.preparation.counting import SCORED_PAIRS

_SIDES: dict[str, Kind] = {"chosen": text_or_messages, "rejected": text_or_messages}
_PROMPTED: dict[str, Kind] = {"prompt": text_or_messages, **_SIDES}
_MARGIN: dict[str, Kind] = {"margin": number}

ScoredPairs = DataFormat(
    "scored pairs",
    (
        Layout({**_PROMPTED, **_MARGIN}),
        Layout(_PROMPTED),
        Layout({**_SIDES, **_MARGIN}),
        Layout(_SIDES),
    ),
    prepared=(SCORED_PAIRS,),
    compared=("chosen", "rejected"),
    sides=2,
    convert=shapes.pairs,
)
"""A chosen and a rejected side, behind a prompt or alone, and by how much the one should score above the other."""
