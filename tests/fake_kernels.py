"""Packages of kernels that compute on a "GPU": what transformers has in their place, once they are switched on."""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

# The functions of a package, by the module they are imported from, and what transformers calls those in their place.
Kernels = dict[str, dict[str, str]]

# transformers passes on the arguments that a kernel names.
_SOURCE = """
on_gpu, calls, references = False, [], {{}}
"""
_FUNCTION = """
def {name}({parameters}):
    given = {{key: value for key, value in locals().items() if value is not None}}
    if not on_gpu:
        raise RuntimeError("{name} computes on a GPU")
    calls.append("{name}")
    return references["{name}"](**given)
"""


def write(site: Path, upstream: str, kernels: Kernels) -> None:
    """Write ``kernels`` for the modeling module ``upstream`` as packages below ``site``."""
    module = importlib.import_module(upstream)
    for package, functions in kernels.items():
        folder = site.joinpath(*package.split("."))
        folder.mkdir(parents=True)
        source = _SOURCE.format()
        for name, called in functions.items():
            own = inspect.signature(inspect.unwrap(getattr(module, called))).parameters.values()
            named = ", ".join(f"{each.name}=None" for each in own if each.kind is not each.VAR_KEYWORD)
            source += _FUNCTION.format(name=name, parameters=named)
        (folder / "__init__.py").write_text(source)


def switch_on(upstream: str, kernels: Kernels) -> list[ModuleType]:
    """Let the packages of ``kernels`` compute, and return them; their ``calls`` are the names of what was called."""
    module = importlib.import_module(upstream)
    found = [importlib.import_module(package) for package in kernels]
    for package, functions in zip(found, kernels.values(), strict=True):
        package.on_gpu = True  # type: ignore[attr-defined]
        for name, called in functions.items():
            package.references[name] = inspect.unwrap(getattr(module, called))
    return found
