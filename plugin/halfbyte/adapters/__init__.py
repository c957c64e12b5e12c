"""LoRA adapters on a 4-bit base: fresh, continued, or as the start and reference of a preference run."""

from halfbyte.adapters.eva import initialize_eva
from halfbyte.adapters.fresh import (
    INITIALIZATIONS,
    REFUSED_INITIALIZATIONS,
    attach,
    check_initialization,
    check_targets,
    evaluating,
)
from halfbyte.adapters.lineage import chain, describe, lines, same_quantization, same_tokenizer
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
from halfbyte.adapters.trained import trained_line, trained_modules, trained_parameters

__all__ = [
    "INITIALIZATIONS",
    "REFUSED_INITIALIZATIONS",
    "attach",
    "base_of",
    "chain",
    "check_checkpoint",
    "check_initialization",
    "check_targets",
    "continue_from",
    "describe",
    "directory_of",
    "drop_reference_copy",
    "evaluating",
    "initialize_eva",
    "keep_float32",
    "lines",
    "options_in",
    "options_of",
    "resolve",
    "restore",
    "revision_of",
    "same_base",
    "same_quantization",
    "same_task",
    "same_template",
    "same_tokenizer",
    "trained_line",
    "trained_modules",
    "trained_parameters",
    "trained_values",
]
