"""The fusion report: what of a run is fused, and why the rest is not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from halfbyte.fast.layer_call import LEVELS
from halfbyte.terminal.wording import plural

ON = "on"


@dataclass(frozen=True)
class Choice:
    """The save level that was chosen, and why: bytes on one rank, for ``tokens`` a forward.

    ``recorded`` means that the level comes from the checkpoint and was not chosen here.
    """

    level: int
    budget: str
    available: int | None
    needed: int
    tokens: int
    recorded: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class FusionReport:
    """What is fused, and why the rest is not; ``run.json`` keeps it under ``fast``.

    ``level`` is the save level of the layers that have one, ``memory`` how it was chosen. ``layers_apart`` and
    ``plain`` count layers and linears that are not fused, by reason; ``keeping`` are those of such layers that have a
    save level all the same, ``parts`` what of them is fused, by name, and ``experts`` the layers whose packed experts
    are fused. ``head`` (chunked LM head) and ``batches`` (padding-free) are ``on``, a reason, or None where the trainer
    has no such part; ``trees`` says that the sides of a pair share their prefix in them. ``autocast`` says whether the
    base runs outside it.
    """

    mode: str = "auto"
    reason: str | None = None
    layers: int = 0
    level: int | None = None
    memory: Choice | None = None
    layers_apart: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    keeping: int = 0
    linears: int = 0
    experts: int = 0
    plain: Mapping[str, int] = field(default_factory=dict)
    autocast: str | None = None
    head: str | None = None
    batches: str | None = None
    trees: bool = False

    @property
    def padding_free(self) -> bool:
        """Whether the rows of SFT batches may be packed without padding."""
        return self.batches == ON and not self.trees

    def as_dict(self) -> dict[str, Any]:
        """Return the report in JSON's types, without what is empty."""
        if self.mode == "none":
            return {"mode": self.mode, "reason": self.reason}
        found = {name: value for name, value in vars(self).items() if value not in (None, {}, False)}
        return found | ({"memory": self.memory.as_dict()} if self.memory is not None else {})

    def line(self) -> str:
        """Return the report in one line, to print."""
        if self.mode == "none":
            return f"fast: none ({self.reason})"
        parts = []
        if self.layers:
            parts.append(f"{plural(self.layers, 'layer')} fused (save level {self.level})")
        parts += [f"{plural(n, 'layer')} not fused ({why})" for why, n in self.layers_apart.items()]
        if self.keeping:
            what = "kept" if self.level == LEVELS[-1] else "recomputed"
            parts.append(f"{self.keeping} of them {what} whole")
        parts += [f"{plural(n, name)} fused" for name, n in self.parts.items()]
        parts.append(f"{plural(self.linears, 'linear')} fused")
        if self.experts:
            parts.append(f"experts of {plural(self.experts, 'layer')} fused")
        parts += [f"{plural(n, 'linear')} not fused ({why})" for why, n in self.plain.items()]
        for name, state in (("chunked LM head", self.head), ("padding-free", self.batches)):
            if state is not None:
                parts.append(name if state == ON else f"not {name} ({state})")
        if self.trees:
            parts.append("shared prefixes computed once")
        return "fast: " + ", ".join(parts)
