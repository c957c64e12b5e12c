"""The progress of every pass over the data, those of the datasets library and of TRL among them."""

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import datasets

from halfbyte.terminal import passes


@contextlib.contextmanager
def showing(training: Any) -> Iterator[None]:
    """Show the passes of the block as ``disable_tqdm`` of ``training`` wants it; see :func:`passes.shown`."""
    modules = (datasets.arrow_dataset, datasets.builder)
    kept = [module.hf_tqdm for module in modules]
    with passes.shown(bar=not getattr(training, "disable_tqdm", False)):
        for module in modules:
            module.hf_tqdm = _LibraryPass
        try:
            yield
        finally:
            for module, own in zip(modules, kept, strict=True):
                module.hf_tqdm = own


class _LibraryPass(passes.Pass):
    """What the datasets library takes for its progress bar."""

    # As tqdm has it: a saved data set is opened by several threads.
    _lock: Any = threading.RLock()

    @classmethod
    def get_lock(cls) -> Any:
        return cls._lock

    @classmethod
    def set_lock(cls, lock: Any) -> None:
        cls._lock = lock

    def __init__(
        self,
        *,
        desc: str = "",
        unit: str = " examples",
        total: int | None = None,
        initial: int = 0,
        **other: Any,
    ) -> None:
        label = re.sub(r" \(num_proc=\d+\)$", "", desc)
        label = re.sub("^Generating (.*) split$", r"reading \1", label)
        super().__init__(
            label[:1].lower() + label[1:], total, done=initial, unit=unit.strip().replace("examples", "rows")
        )

    def update(self, rows: int = 1) -> None:
        self.advance(rows)
