"""Reads TensorBoard's event files: records of a length, a protocol buffer and their checksums."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def events(directory: Path) -> Iterator[Event]:
    """The events of the one file in ``directory``, in the order they were written."""
    (path,) = directory.glob("events.out.tfevents.*")
    content, position = path.read_bytes(), 0
    while position < len(content):
        (size,) = struct.unpack_from("<Q", content, position)
        position += 12  # the length and its checksum
        yield Event.FromString(content[position : position + size])
        position += size + 4


def scalars(directory: Path) -> list[tuple[int, str, float]]:
    """Every scalar, as its step, its tag and its value in float32."""
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(directory)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def texts(directory: Path) -> dict[str, str]:
    """Every text by its tag."""
    return {
        value.tag.removesuffix("/text_summary"): value.tensor.string_val[0].decode()
        for event in events(directory)
        for value in event.summary.value
        if value.HasField("tensor")
    }
