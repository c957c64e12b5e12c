"""What only a CUDA device shows: packed weights on it, paged optimizer state, bfloat16 training."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from halfbyte.quantization import measure_coverage
from tests import tiny
from tests.benchmarks.gpu import FIT_32B, FIT_70B, Part

pytestmark = pytest.mark.gpu
ModelDir = Callable[..., Path]


def test_the_base_is_packed_on_the_device(model_dir: ModelDir) -> None:
    plugin = QLoRAPlugin()
    model = plugin.load(str(model_dir("llama")))
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert packed
    assert all(p.is_cuda for p in model.parameters())
    assert measure_coverage(model.get_base_model()).four_bit_share == 1.0
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert model.get_input_embeddings().weight.dtype == expected


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_a_run_trains_with_the_paged_optimizer(model_dir: ModelDir, tmp_path: Path, recipe: str) -> None:
    rows = {"sft": tiny.conversations, "dpo": tiny.preferences}[recipe](32)
    options = [
        *("--model_name_or_path", str(model_dir("llama")), "--output_dir", str(tmp_path / "run")),
        *("--dataset_name", tiny.write_rows(tmp_path / "rows", rows), "--max_steps", "4"),
        *("--logging_steps", "1", "--report_to", "none", "--save_strategy", "no", "--learning_rate", "1e-3"),
    ]
    assert main([recipe, *options]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["config"]["optim"] == "paged_adamw_32bit"
    assert told["config"]["bf16"] or told["config"]["fp16"]
    assert told["peak_memory_bytes"][0] > 0


def test_optimizer_state_is_paged(model_dir: ModelDir) -> None:
    """State of a parameter over bitsandbytes' paging threshold lives in managed memory; here it is small."""
    parameter = torch.nn.Parameter(torch.randn(1024, 1024, device="cuda"))
    optimizer = QLoRAPlugin().optimizer(torch.nn.ParameterList([parameter]), lr=1e-2)
    before = parameter.detach().clone()
    (parameter**2).sum().backward()
    optimizer.step()
    state = optimizer.state[parameter]["state1"]
    assert getattr(state, "is_paged", False)
    assert state.dtype == torch.float32
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("part", [FIT_32B, FIT_70B], ids=lambda part: part.name)
def test_a_large_base_takes_a_step_under_a_cap(part: Part) -> None:
    """In a process of its own, since the cap is a process's, and is set before anything is on the device."""
    assert part.cap is not None
    free, _ = torch.cuda.mem_get_info()
    if free < part.cap * 1e9:
        pytest.skip(f"needs {part.cap} GB of free device memory")
    command = [sys.executable, "-m", "tests.benchmarks.gpu", part.name]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("| yes |"), done.stdout
