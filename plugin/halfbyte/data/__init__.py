"""Rows for a trainer: read, recognised, checked, counted, and reported in run.json."""

from halfbyte.data.chat.template import prepare_tokenizer
from halfbyte.data.formats import DataFormat, Layout, OtherRowsError, PreferencePairs, Text
from halfbyte.data.preparation.prepared import CountedRows, check_labels, counted
from halfbyte.data.preparation.sides import prepared_as_dpo
from halfbyte.data.prompts import Prompt, Prompts
from halfbyte.data.report import DataReport
from halfbyte.data.run import RunData, load
from halfbyte.data.scored import ScoredPairs
from halfbyte.data.unpaired import UnpairedPreferences

FORMATS = (Text, PreferencePairs, UnpairedPreferences, ScoredPairs)
"""What rows may be, in the order in which they are recognised."""

__all__ = [
    "FORMATS",
    "CountedRows",
    "DataFormat",
    "DataReport",
    "Layout",
    "OtherRowsError",
    "PreferencePairs",
    "Prompt",
    "Prompts",
    "RunData",
    "ScoredPairs",
    "Text",
    "UnpairedPreferences",
    "check_labels",
    "counted",
    "load",
    "prepare_tokenizer",
    "prepared_as_dpo",
]
