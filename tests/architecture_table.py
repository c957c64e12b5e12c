"""The table of architectures in plugin/README.md: each trained, held against plain TRL and timed, or refused.

``python -m tests.architecture_table [NAME...]`` measures rows, all without names, and prints the table; ``--write``
keeps them in architecture_rows.jsonl and puts the table into the README. The parts of a row are processes of their own
under a time limit, so that one crash does not end the table.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import select
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin, multimodal
from halfbyte.errors import UserError
from halfbyte.quantization import packed, streamed
from halfbyte.task import CAUSAL_LM
from tests import architectures, plain_trl, tiny

README = Path(__file__).parents[1] / "plugin" / "README.md"
KEPT = Path(__file__).parent / "architecture_rows.jsonl"
BEGIN, END = "<!-- measured: architectures -->", "<!-- end of measured -->"
COLUMNS = (
    "architecture",
    "4-bit share",
    "layers fused",
    "padding-free",
    "SFT against TRL",
    "DPO step 0",
    "2 processes",
    "speed",
)
NF4 = plain_trl.nf4()
_LIMIT = 150  # seconds for a part of a row
_STEPS = 3
_WIDER = 4  # the shape that is timed

Row = dict[str, Any]


class _Losses(TrainerCallback):
    """The losses of a trainer, and the seconds of its steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._begun = 0.0

    @classmethod
    def of(cls, trainer: Any) -> "_Losses":
        found = cls()
        trainer.add_callback(found)
        trainer.train()
        return found

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._begun)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def rounded(base: str) -> PreTrainedModel:
    """The whole model in ``base`` by plain transformers, dense in float32, its weights rounded by NF4."""
    config = transformers.AutoConfig.from_pretrained(base)
    auto = getattr(transformers, multimodal.auto_class(config, CAUSAL_LM))
    model: PreTrainedModel = auto.from_pretrained(base, dtype=torch.float32)
    model.config._is_quantized = True  # Mamba's layers read a weight past its adapter otherwise
    source = streamed.read(Path(base), quantization=NF4, dtype=torch.float32, task=CAUSAL_LM)
    state = model.state_dict()
    for name, parts in source.parameters():
        if packed.is_packed(parts):
            weight = packed.unpack(parts)
            layer = model.get_submodule(name.rpartition(".")[0])
            state[name].copy_(weight.T if isinstance(layer, Conv1D) else weight)
    return model


def _arguments(output: Path, rows_a_device: int = 2, **options: Any) -> SFTConfig:
    given = {"max_steps": _STEPS, "per_device_train_batch_size": rows_a_device, "max_length": 256}
    given |= {"gradient_accumulation_steps": 1, **options}
    return plain_trl.arguments(SFTConfig, output, **given)


def _trainer(base: str, output: Path, rows: list[dict[str, str]], plugin: Row, **options: Any) -> Any:
    return QLoRAPlugin(**{"dtype": "float32", "lora_r": 4, **plugin}).trainer(
        SFTTrainer, model=base, args=_arguments(output, **options), train_dataset=Dataset.from_list(rows)
    )


def train(name: str, directory: Path) -> Row:
    """The row of ``name`` as one process sees it."""
    base, start = architectures.save(directory / "base", name), directory / "start"
    options: Row = {}
    try:
        row, losses = _sft(base, directory, options)
    except UserError as error:
        if error.option != "router_aux_loss_coef":
            raise
        options["router_aux_loss_coef"] = 0.0
        row, losses = _sft(base, directory, options)
        row["note"] = f"with `router_aux_loss_coef: 0`: {_reason(error)}"
    theirs = SFTTrainer(
        model=PeftModel.from_pretrained(rounded(base), str(start), is_trainable=True),
        args=_arguments(directory / "trl", **options),
        train_dataset=Dataset.from_list(tiny.texts(8)),
        processing_class=tiny.tokenizer(),
    )
    if not theirs._loss_shifts_labels:
        theirs._loss_shifts_labels = True
        row["note"] = "against TRL with `_loss_shifts_labels`: it divides by the first label of each row too"
    row["sft"] = _difference(losses, _Losses.of(theirs).losses)
    if hasattr(theirs.model.config.get_text_config(), "output_router_logits"):
        # Its loss of the router is computed a batch, so that it is another one on two ranks, and part of DPO's.
        options["router_aux_loss_coef"] = 0.0
    given = {"adapter_name_or_path": str(start)}
    one = _trainer(
        base,
        directory / "one",
        tiny.texts(8),
        given,
        rows_a_device=1,
        gradient_accumulation_steps=2,
        **options,
    )
    row["losses"], row["options"] = _Losses.of(one).losses, options
    try:
        row["dpo"] = architectures.dpo_loss(base, directory / "dpo", **options)
    except UserError as error:
        row["dpo"] = _reason(error)
    return row


def _sft(base: str, directory: Path, options: Row) -> tuple[Row, list[float]]:
    """Train from an adapter that is not trivial, which stays in ``start``."""
    start = directory / "start"
    plain_trl.save_start(QLoRAPlugin(dtype="float32", lora_r=4).load(base), start)
    trainer = _trainer(
        base, directory / "out", tiny.texts(8), {"adapter_name_or_path": str(start)}, **options
    )
    fusion, coverage = trainer.report.fusion, trainer.report.coverage
    losses = _Losses.of(trainer).losses
    row = {
        "share": coverage.four_bit_share,
        "layers": [fusion.layers, fusion.layers + sum(fusion.layers_apart.values())],
        "parts": {**fusion.parts, **({"experts": fusion.experts} if fusion.experts else {})},
        "padding_free": fusion.padding_free,
    }
    return row, losses


def rank(directory: Path, number: int, port: int, options: Row) -> Row:
    """Train as rank ``number`` of two on the base that :func:`train` has left in ``directory``."""
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    given = {"adapter_name_or_path": str(directory / "start")}
    trainer = _trainer(
        str(directory / "base"), directory / "two", tiny.texts(8), given, rows_a_device=1, **options
    )
    return {"losses": _Losses.of(trainer).losses}


def timed(name: str, directory: Path, options: Row) -> Row:
    """Seconds of a step in a wider shape under ``fast: none`` over those of the fused step, one thread."""
    base = architectures.save(directory / "wide", name, wider=_WIDER)
    rows = [{"text": " ".join(tiny.text(n + i) for i in range(2 + 3 * n % 8))} for n in range(24)]
    best = dict.fromkeys(("none", "auto"), float("inf"))
    for _ in range(2):
        for fast in best:
            more = {"max_steps": 3, "rows_a_device": 4, **options}
            found = _Losses.of(_trainer(base, directory / fast, rows, {"fast": fast, "lora_r": 16}, **more))
            best[fast] = min(best[fast], *found.seconds[1:])
    return {"speed": best["none"] / best["auto"]}


def apart(work: Callable[[], Row]) -> int:
    """Run ``work`` in a process of its own; return the end of a pipe and its number, for :func:`result`."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # by whichever of the two is first
            os.setpgid(child, child)
        os.close(write)
        _children[read] = child
        return read
    os.close(read)
    try:
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        try:
            found = work()
        except UserError as error:
            found = {"refused": _reason(error)}
        except BaseException as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
    finally:
        os._exit(0)


_children: dict[int, int] = {}


def result(read: int, limit: float = _LIMIT) -> Row:
    """What the process behind :func:`apart` has found; it is ended at the limit."""
    child, text = _children.pop(read), b""
    until = time.monotonic() + limit
    while select.select([read], [], [], max(0.0, until - time.monotonic()))[0]:
        if not (more := os.read(read, 1 << 16)):
            break
        text += more
    os.close(read)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found: Row = json.loads(text) if text else {"failed": "ended without a result, or took too long"}
    return found


def measure(name: str) -> Row:
    """The row of ``name``, each part of it in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        row = result(apart(lambda: train(name, directory)))
        if "losses" not in row:
            return {"name": name, **row}
        losses, options = row.pop("losses"), row.pop("options")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [apart(lambda n=n: rank(directory, n, port, options)) for n in (0, 1)]
        two, _ = (result(each) for each in ranks)
        speed = result(apart(lambda: timed(name, directory, options)))
    row["two"] = _difference(two["losses"], losses) if "losses" in two else two
    row["speed"] = speed.get("speed", speed)
    return {"name": name, **row}


def warm_up() -> None:
    """Import what a row imports, so that each process finds it there; importing does nothing else."""

    def imported() -> Row:
        with tempfile.TemporaryDirectory() as scratch:
            train("llama", Path(scratch))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
        torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
        return {"modules": sorted(sys.modules)}

    for name in result(apart(imported)).get("modules", []):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    assert len(ours) == len(theirs) == _STEPS
    return max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))


def _reason(error: UserError) -> str:
    """A refusal on one line."""
    return " ".join(str(error).split())


def _short(reason: str) -> str:
    """A refusal as a note: without the option that names the base, the list of its weights, and the advice."""
    reason = reason.replace("model_name_or_path: ", "").removesuffix("; use another model")
    return re.sub(r"; not quantized: .*?(\)|more)\.", ".", reason).partition(" Use another model,")[0]


def _measured(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown, with the refusals' reasons as notes under it."""
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"[{notes.setdefault(_short(text), len(notes) + 1)}]"

    def cell(value: Any, shown: Callable[[Any], str]) -> str:
        if isinstance(value, dict):
            value = value.get("refused") or value["failed"]
        return f"refused {note(value)}" if isinstance(value, str) else shown(value)

    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        if "refused" in row:
            lines.append((f"`{row['name']}`", f"refused {note(row['refused'])}", *("",) * (len(COLUMNS) - 2)))
            continue
        lines.append(
            (
                f"`{row['name']}`" + (f" {note(row['note'])}" if "note" in row else ""),
                f"{row['share']:.1%}",
                "; ".join(
                    [
                        "{} of {}".format(*row["layers"]),
                        *(f"{name} {n}" for name, n in row.get("parts", {}).items()),
                    ]
                ),
                "yes" if row["padding_free"] else "no",
                _measured(row["sft"]),
                cell(row["dpo"], lambda loss: f"{loss:.6f}"),
                cell(row["two"], _measured),
                cell(row["speed"], lambda ratio: f"{ratio:.2f}x"),
            )
        )
    found = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*found, "", *(f"{number}. {text}" for text, number in notes.items())])


def kept() -> dict[str, Row]:
    """The rows in the file by name."""
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.is_file() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def written(rows: Iterable[Row]) -> str:
    """The README with the table of ``rows``."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument(
        "--write", action="store_true", help="keep the rows, and rewrite the table in plugin/README.md"
    )
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    torch.set_num_threads(1)
    rows = kept() if given.write else {}
    failed = []
    warm_up()
    for name in given.names or architectures.DECODERS:
        row = measure(name)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if any(
            key == "failed" or (isinstance(value, dict) and "failed" in value) for key, value in row.items()
        ):
            failed.append(name)
            continue
        rows[name] = row
        if given.write:
            found = {each: rows[each] for each in architectures.DECODERS if each in rows}
            KEPT.write_text("".join(f"{json.dumps(each)}\n" for each in found.values()), encoding="utf-8")
            README.write_text(written(found.values()), encoding="utf-8")
    print(table(rows.values()))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
