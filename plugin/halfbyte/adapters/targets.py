"""How PEFT matches what ``target_modules`` and ``target_parameters`` name."""


def is_named(path: str, *names: str) -> bool:
    """Whether one of ``names`` is the whole ``path`` of a module or parameter, or the end of it from a dot on."""
    return any(path == name or path.endswith(f".{name}") for name in names)
