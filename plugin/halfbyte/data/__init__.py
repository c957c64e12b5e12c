"""Rows for a trainer: read, recognised, checked, counted, and described in run.json."""

from halfbyte.data.formats import DataFormat, Layout, PreferencePairs, Text
from halfbyte.data.prepared import check_labels, counted
from halfbyte.data.report import DataReport
from halfbyte.data.run import RunData, load
from halfbyte.data.template import prepare_tokenizer

__all__ = [
    "DataFormat",
    "DataReport",
    "Layout",
    "PreferencePairs",
    "RunData",
    "Text",
    "check_labels",
    "counted",
    "load",
    "prepare_tokenizer",
]
