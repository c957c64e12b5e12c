"""Reads an offline ``.wandb`` file: LevelDB's log framing around W&B's own protocol buffers."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_HEADER = b":W&B"  # then two bytes of magic and one of version
_BLOCK = 32768
_FULL, _LAST = 1, 4


def records(path: Path) -> Iterator[Record]:
    content = path.read_bytes()
    assert content.startswith(_HEADER)
    position, message = 7, b""
    while position + 7 <= len(content):
        room = _BLOCK - position % _BLOCK
        if room < 7:  # too little for another chunk: padding up to the next block
            position += room
            continue
        _checksum, size, kind = struct.unpack_from("<IHB", content, position)
        if kind == 0:
            position += room
            continue
        message += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (_FULL, _LAST):
            yield Record.FromString(message)
            message = b""


def read(path: Path) -> dict[str, Any]:
    """What the file holds of a run: its names, ``config``, ``history`` (one dict for each row) and ``exit_code``.

    ``summaries`` are those defined by metric, ``axes`` the metrics' steps; ``alerts`` are titles with texts, and
    ``artifacts`` the files of each by its alias.
    """
    found: dict[str, Any] = {"config": {}, "history": [], "exit_code": None, "summary": {}}
    found |= {"summaries": {}, "axes": {}, "alerts": [], "artifacts": {}}
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                found |= {"project": run.project, "name": run.display_name, "group": run.run_group}
                found |= {"id": run.run_id, "job_type": run.job_type}
                found["config"] |= _items(run.config.update)
            case "config":
                found["config"] |= _items(record.config.update)
            case "history":
                found["history"].append(_items(record.history.item))
            case "metric":
                metric = record.metric
                if metric.step_metric:
                    found["axes"][metric.glob_name or metric.name] = metric.step_metric
                kinds = {kind.name for kind, value in metric.summary.ListFields() if value}
                found["summaries"] |= {metric.name: kinds} if kinds else {}
            case "summary":
                found["summary"] |= _items(record.summary.update)
            case "alert":
                found["alerts"].append((record.alert.title, record.alert.text))
            case "artifact":
                artifact = record.artifact
                files = [entry.path for entry in artifact.manifest.contents]
                alias = next((each for each in artifact.aliases if each != "latest"), artifact.name)
                found["artifacts"][alias] = sorted(files)
            case "exit":
                found["exit_code"] = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
