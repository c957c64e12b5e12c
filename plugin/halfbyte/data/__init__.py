"""Rows for a trainer: read, recognised, checked, counted, and reported in run.json."""

from halfbyte.data.formats import (
    FORMATS,
    DataFormat,
    Layout,
    OtherRowsError,
    PreferencePairs,
    Text,
    UnpairedPreferences,
)
from halfbyte.data.prepared import CountedRows, check_labels, counted
from halfbyte.data.report import DataReport
from halfbyte.data.run import RunData, load
from halfbyte.data.template import prepare_tokenizer

__all__ = [
    "FORMATS",
    "CountedRows",
    "DataFormat",
    "DataReport",
    "Layout",
    "OtherRowsError",
    "PreferencePairs",
    "RunData",
    "Text",
    "UnpairedPreferences",
    "check_labels",
    "counted",
    "load",
    "prepare_tokenizer",
]
