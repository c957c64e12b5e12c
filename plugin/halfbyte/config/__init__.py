"""Strict configuration: YAML and command line into dataclasses, with the place of every mistake."""

from halfbyte.config.run import RunArguments
from halfbyte.config.settings import Settings, read
from halfbyte.config.sources import Source

__all__ = ["RunArguments", "Settings", "Source", "read"]
