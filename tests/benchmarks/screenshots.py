"""Draw a plan, a preview and a run in a terminal, for launch/README.md: `python -m tests.benchmarks.screenshots`.

Each picture is what the command printed, into a pipe, on the demo's rows: the plan and the preview of an 8B-shaped
configuration without weights, the run on the demo's own base of 0.9M parameters.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

import yaml
from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer

from halfbyte.demo import base, corpus, stages
from tests.benchmarks import plans

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 100
SIZE = stages.Size(sft_steps=30, held_out_rows=64)
COMMANDS = {
    "plan": ("plan sft --config 8b.yaml --gpu 10GB --tokens_per_second 2500", ("8b.yaml",)),
    "preview": ("plan dpo --config 8b.yaml --dataset_name data/dpo --preview 2", ()),
    "run": ("sft --config small.yaml", ("small.yaml",)),
}
_EIGHT = {
    "model_name_or_path": "models/8b",
    "dataset_name": "data/sft",
    "output_dir": "runs/8b",
    "per_device_train_batch_size": 16,
    "num_train_epochs": 2,
    "max_length": 256,
    "report_to": "none",
}
_SMALL = {
    "model_name_or_path": "models/small",
    "dataset_name": "data/sft",
    "output_dir": "runs/small",
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "max_length": 256,
    "learning_rate": 4.0e-3,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "eval_on_start": True,
    "save_steps": 20,
    "dtype": "float32",
    "report_to": "none",
}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        prepare(place)
        for name, (command, shown) in COMMANDS.items():
            text = printed(command, place)
            assert scratch not in text, text
            files = "".join(f"$ cat {file}\n{(place / file).read_text()}" for file in shown)
            draw(name, f"{files}$ halfbyte {command}\n{text}")


def prepare(place: Path) -> None:
    """Write the demo's rows and base, and an 8B-shaped configuration with the same tokenizer."""
    source = corpus.collect()
    stages.write_data(source, place / "data", SIZE)
    base.write_untrained(source, place / "models" / "small")
    shape = next(each for each in plans.SHAPES if each.name == "Qwen3 8B")
    plans.config_of(shape).save_pretrained(place / "models" / "8b")
    AutoTokenizer.from_pretrained(place / "models" / "small").save_pretrained(place / "models" / "8b")
    for name, options in (("8b", _EIGHT), ("small", _SMALL)):
        (place / f"{name}.yaml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


def printed(command: str, place: Path) -> str:
    """What the command prints, with its colors."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(place / "cache"),
        "COLUMNS": str(WIDTH),
        "FORCE_COLOR": "1",
        "DS_ACCELERATOR": "cpu",  # or DeepSpeed, where it is installed, prints that it chooses one
    }
    words = [sys.executable, "-m", "halfbyte", *command.split()]
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    return done.stdout


def draw(name: str, text: str) -> None:
    """Write the picture ``name`` of ``text``, in the fonts that the reader has."""
    with open(os.devnull, "w") as nowhere:
        console = Console(
            record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        console.print(Text.from_ansi(text))
        drawn = console.export_svg(title=f"halfbyte {name}", unique_id=name)
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    (PICTURES / f"{name}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
