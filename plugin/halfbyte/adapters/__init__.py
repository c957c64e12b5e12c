"""LoRA adapters on a 4-bit base: fresh, continued, or as the start and reference of a preference run."""

from halfbyte.adapters.fresh import (
    INITIALIZATIONS,
    REFUSED_INITIALIZATIONS,
    attach,
    check_initialization,
    evaluating,
    initialize_eva,
)
from halfbyte.adapters.reference import drop_reference_copy, keep_float32, restore, trained_values
from halfbyte.adapters.saved import (
    base_of,
    check_checkpoint,
    continue_from,
    directory_of,
    options_in,
    options_of,
    resolve,
    revision_of,
    same_base,
    same_task,
    same_template,
)

__all__ = [
    "INITIALIZATIONS",
    "REFUSED_INITIALIZATIONS",
    "attach",
    "base_of",
    "check_checkpoint",
    "check_initialization",
    "continue_from",
    "directory_of",
    "drop_reference_copy",
    "evaluating",
    "initialize_eva",
    "keep_float32",
    "options_in",
    "options_of",
    "resolve",
    "restore",
    "revision_of",
    "same_base",
    "same_task",
    "same_template",
    "trained_values",
]
