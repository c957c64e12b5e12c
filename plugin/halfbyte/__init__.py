"""halfbyte: QLoRA training for Accelerate and TRL.

The public API is :class:`QLoRAPlugin` and :class:`Recipe`; importing this package imports neither torch
nor TRL until one of them is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.plugin import QLoRAPlugin
    from halfbyte.recipe import Recipe

__all__ = ["QLoRAPlugin", "Recipe"]


def __getattr__(name: str) -> Any:
    if name == "QLoRAPlugin":
        from halfbyte.terminal import quiet

        quiet.advertisements()  # before bitsandbytes is imported
        from halfbyte.plugin import QLoRAPlugin

        return QLoRAPlugin
    if name == "Recipe":
        from halfbyte.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
