"""How PEFT matches what ``target_modules`` and ``target_parameters`` name."""


def is_named(path: str, *names: str) -> bool:
    """Whether one of ``names`` is the whole ``path`` of a module or parameter, or the end of it from a dot on."""
    return any(path == name or path.endswith(f".{name}") for name in names)


# The layers whose names PEFT reads as those of experts: it takes their weights among ``target_parameters``.
_TAKEN = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def layer_of(parameter: str) -> str | None:
    """The layer that ``parameter``, one of ``target_parameters``, is the weight of; None for any other parameter."""
    path, _, name = parameter.rpartition(".")
    return path if name == "weight" and is_named(path, *_TAKEN) else None
