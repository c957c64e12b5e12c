"""Strict configuration: YAML and command line into dataclasses, each mistake reported with its file and line.

Importing this package imports neither torch nor TRL; ``RunArguments``, a subclass of TRL's, does.
"""

from typing import TYPE_CHECKING, Any

from halfbyte.config.fields import check_values
from halfbyte.config.reading import read, refuse_early
from halfbyte.config.settings import Settings
from halfbyte.config.sources import Source
from halfbyte.config.written import Written, collect

if TYPE_CHECKING:
    from halfbyte.config.run import RunArguments

__all__ = [
    "RunArguments",
    "Settings",
    "Source",
    "Written",
    "check_values",
    "collect",
    "read",
    "refuse_early",
]


def __getattr__(name: str) -> Any:
    if name == "RunArguments":
        from halfbyte.config.run import RunArguments

        return RunArguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
