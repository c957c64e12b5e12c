"""Rows for a trainer: read, recognised, checked, counted, and reported in run.json."""

from halfbyte.data.formats import DataFormat, Layout, PreferencePairs, Text, UnpairedPreferences
from halfbyte.data.prepared import CountedRows, check_labels, counted
from halfbyte.data.report import DataReport
from halfbyte.data.run import RunData, load
from halfbyte.data.template import prepare_tokenizer

__all__ = [
    "CountedRows",
    "DataFormat",
    "DataReport",
    "Layout",
    "PreferencePairs",
    "RunData",
    "Text",
    "UnpairedPreferences",
    "check_labels",
    "counted",
    "load",
    "prepare_tokenizer",
]
