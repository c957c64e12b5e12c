"""What only a CUDA device shows: packed weights on it, paged optimizer state, bfloat16 training."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from halfbyte import QLoRAPlugin
from halfbyte.cli import main
from halfbyte.fast import grouped_experts
from halfbyte.fast.attention import attention
from halfbyte.fast.forest import ROOT, Forest
from halfbyte.quantization import measure_coverage
from tests import plain_trl, tiny
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


def test_experts_in_groups_compute_what_one_after_the_other_does(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, in whose rounding they differ."""
    ids = torch.arange(4, 68, device="cuda")[None]
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    found = []
    for grouped in (True, False):
        monkeypatch.setattr(grouped_experts, "is_used", lambda device, maps, grouped=grouped: grouped)
        torch.manual_seed(0)
        model = QLoRAPlugin(dtype="bfloat16", lora_target_parameters=stacks).load(str(model_dir("qwen3_moe")))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [
            p.grad for name, p in model.named_parameters() if "experts" in name and p.grad is not None
        ]
        found.append((loss.item(), torch.cat([each.flatten() for each in gradients])))
    (one, ours), (other, theirs) = found
    assert one == pytest.approx(other, rel=1e-2)
    assert (ours - theirs).norm() <= 0.1 * theirs.norm()


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


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 24])
def test_attention_along_paths_is_one_kernel_with_the_numbers_of_the_cpu(
    window: int | None, with_sinks: bool
) -> None:
    """Queries and keys of a branch are not of one length: the kernel must align their last tokens."""
    forest = Forest.of_lengths([40, 17, 9, 33, 5, 64], [ROOT, 0, 0, ROOT, 3, 3])
    generator = torch.Generator().manual_seed(4)
    shapes = ((8, 64), (2, 64), (2, 64), (8, 64))
    drawn = [torch.randn(1, forest.ends[-1], *shape, generator=generator) for shape in shapes]
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        q, k, v = (x.bfloat16().to(device, dtype).requires_grad_() for x in drawn[:3])
        sinks = torch.linspace(-2, 6, 8, device=device) if with_sinks else None
        call = attention(q.device, dtype, 0.125, None, forest, window, sinks=sinks)
        out = call.attend(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), drawn[3].to(device, dtype))
        found.append([x.float().cpu() for x in (out, *gradients)])
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= 1e-2 * exact.norm()


def test_dpo_on_trees_equals_padded_pairs_on_the_device(model_dir: ModelDir, tmp_path: Path) -> None:
    losses = []
    for fast in ("auto", "none"):
        args = plain_trl.arguments(DPOConfig, tmp_path / fast, max_steps=3, use_cpu=False, bf16=True)
        plugin = QLoRAPlugin(dtype="bfloat16", fast=fast)
        rows = Dataset.from_list(tiny.preferences(24))
        trainer = plugin.trainer(DPOTrainer, model=str(model_dir("llama")), args=args, train_dataset=rows)
        assert trainer.report.fusion.trees == (fast == "auto")
        losses.append(plain_trl.Steps.of(trainer).losses)
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)
