"""A checkpoint written one tensor at a time: safetensors files of a bounded size, and their index."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from halfbyte.errors import UserError
from halfbyte.files import entry, write_file
from halfbyte.terminal.wording import size_in_bytes


def most_bytes(text: str) -> int:
    """The bytes of a `max_shard_size`: ``5GB``, ``256MiB`` or a plain number of them.

    Raises :class:`UserError` for what is no size.
    """
    if not (found := int(text) if text.strip().isdecimal() else size_in_bytes(text)):
        raise UserError(
            f"{text!r} is no size; write one such as 5GB, or a number of bytes", option="--max_shard_size"
        )
    return found


class Shards:
    """Files in ``directory`` of at most ``most`` bytes each; what is larger is alone in its file.

    Tensors of one file are held until it is full. The files get their final names by :meth:`finish`, which knows how
    many there are.
    """

    def __init__(self, directory: Path, most: int) -> None:
        self._directory, self._most = directory, most
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._files: list[list[str]] = []
        self.total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors, which stay in one file, under names that none has yet."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._held and self._bytes + size > self._most:
            self._write()
        self._held |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._bytes += size
        self.total += size

    def finish(self) -> list[str]:
        """Write what is held, and the index where there are several files; return the files' names."""
        if self._held:
            self._write()
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self._directory / "model.safetensors")
            return ["model.safetensors"]
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            self._part(number).rename(self._directory / name)
        places = {tensor: name for name, held in zip(names, self._files, strict=True) for tensor in held}
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
        write_file(self._directory / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
        return [*names, "model.safetensors.index.json"]

    def _write(self) -> None:
        path = self._part(len(self._files))
        save_file(self._held, path, metadata={"format": "pt"})
        entry(path, durable=True)
        self._files.append(list(self._held))
        self._held, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}"
