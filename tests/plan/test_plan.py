"""A plan says what a run then does: the same memory, steps and path, from the same settings."""

import json
import re
from pathlib import Path

import pytest
import torch

from halfbyte import QLoRAPlugin, fast
from halfbyte.cli import main
from halfbyte.errors import UserError
from halfbyte.plan import target
from tests import architectures, tiny
from tests.plan.conftest import OPTIONS, Planned

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize(
    ("recipe", "arch"),
    [("sft", "llama"), ("dpo", "qwen3"), pytest.param("sft", "opt", marks=pytest.mark.faults)],
)
def test_a_run_is_what_was_planned(given, planned: Planned, tmp_path: Path, recipe: str, arch: str) -> None:
    words = given(recipe, arch)
    found = planned(recipe, *words)
    assert main([recipe, *words, f"--output_dir={tmp_path / 'run'}"]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["memory"] == told["memory"]["predicted"]
    assert found["data"]["steps"] == told["steps"]
    assert found["data"]["rows"] == told["data"]["rows"]
    assert any(line.startswith("fast: ") for line in found["step"])
    assert found["data"]["tokens"] == told["data"]["tokens"]  # which its rate is of too
    assert (
        sum(size for name, size in found["memory"].items() if name not in ("total", "pageable"))
        == (found["memory"]["total"])
    )


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("sft", ("--packing",)),
        pytest.param("sft", ("--max_tokens_per_batch=100",), marks=pytest.mark.faults),
        ("sft", ("--dataset_streaming", "--max_steps=2")),
        ("sft", ("--use_peft=false", "--load_in_4bit=false")),
        pytest.param("sft", ("--load_in_4bit=false",), marks=pytest.mark.faults),
        ("sft", ("--load_in_8bit",)),
        ("sft", ("--use_dora",)),
        pytest.param("sft", ("--additional_special_tokens=<new>",), marks=pytest.mark.faults),
        ("dpo", ("--fast=none",)),
        pytest.param("kto", ("--train_sampling_strategy=sequential",), marks=pytest.mark.faults),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_every_kind_of_run_is_planned(
    given, planned: Planned, tmp_path: Path, recipe: str, more: tuple[str, ...]
) -> None:
    words = (*given(recipe), *more)
    found = planned(recipe, *words)
    assert main([recipe, *words, f"--output_dir={tmp_path / 'run'}"]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["memory"] == told["memory"]["predicted"]
    assert found["data"]["steps"] == told["steps"]
    assert found["data"]["sequences"] == told["data"]["packed"]


@pytest.mark.parametrize("name", ["deepseek_v32", "gemma3n_text", "llama"])
def test_adapters_are_planned_where_a_run_has_them(given, tmp_path: Path, name: str, capsys) -> None:
    """No gradient of a text reaches the indexers of the first, and the last projection of the second."""
    base = architectures.save(tmp_path / "base", name)
    words = [word for word in given("sft") if not word.startswith("--model_name_or_path")]
    words += [f"--model_name_or_path={base}", "--lora_r=4", "--gradient_checkpointing=false"]
    capsys.readouterr()
    assert main(["plan", "sft", "--json", *words]) == 0
    printed = capsys.readouterr()
    assert "FP4 quantization state" not in printed.err
    model = QLoRAPlugin(dtype="float32", lora_r=4).load(base, gradient_checkpointing=False)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert json.loads(printed.out)["trained_parameters"] == trained


def test_the_last_batch_may_be_dropped(given, planned: Planned, tmp_path: Path, capsys) -> None:
    words = [word for word in given("sft") if "batch_size" not in word] + ["--dataloader_drop_last"]
    three, many = (f"--per_device_train_batch_size={rows}" for rows in (3, 99))
    found, output = planned("sft", *words, three)["data"], f"--output_dir={tmp_path / 'run'}"
    assert main(["sft", *words, three, output]) == 0
    assert found["steps"] == json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 5
    assert (found["rows"], found["left_out"]) == (15, 1)
    for command in (["plan", "sft"], ["sft", output, "--overwrite_output_dir"]):
        assert main([*command, *words, many]) == 2
        assert "do not fill a batch of 99" in capsys.readouterr().err


def test_an_evaluation_may_hold_the_most(given, planned: Planned, tmp_path: Path, monkeypatch) -> None:
    words = (*given("sft", rows=200), "--eval_strategy=steps", "--eval_steps=99", "--max_steps=1")
    small, large = (planned("sft", *words, f"--per_device_eval_batch_size={rows}") for rows in (2, 32))
    assert (small["peak"], large["peak"]) == ("step", "evaluation")
    assert small["memory"]["total"] < large["memory"]["total"]
    assert large["memory"]["gradients"] == large["memory"]["activations"] == 0
    assert main(["sft", *words, "--per_device_eval_batch_size=32", f"--output_dir={tmp_path / 'run'}"]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["memory"]["predicted"] == large["memory"]
    monkeypatch.setattr(target, "host_memory", lambda: large["memory"]["total"] - 1)
    (change, *_) = planned("sft", *words, "--per_device_eval_batch_size=32")["changes"]
    assert change["write"] == "per_device_eval_batch_size: 16"
    assert change["total"] < large["memory"]["total"]


@pytest.mark.faults  # for its seconds
def test_a_probe_measures_here(given, planned: Planned) -> None:
    evaluating = ("--eval_strategy=steps", "--eval_steps=1", "--eval_on_start")
    found = planned("sft", *given("sft"), *evaluating, "--probe")
    assert found["tokens_per_second"] > 0
    assert found["seconds_per_epoch"] > 0


def test_a_sample_stands_for_all_rows(given, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.data.sample import Sample
    from halfbyte.plan import plan

    def small(rows: int = 60, longest: int = 10) -> Sample:
        return Sample(rows=rows, longest=min(longest, 10))

    monkeypatch.setattr(plan, "Sample", small)
    words = given("sft", rows=200)
    told = planned("sft", *words)["data"]
    whole = planned("sft", *words, "--full")["data"]
    assert (told["rows"], told["read"], whole["read"]) == (whole["rows"], 60, whole["rows"])
    assert told["longest"] == whole["longest"]
    assert told["tokens"] == pytest.approx(whole["tokens"], rel=0.1)
    assert told["steps"] == whole["steps"]


@pytest.mark.parametrize("wrong", ["role", "equal"])
def test_an_error_names_the_row_of_the_data_set(
    model_dir, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    """And not its place in the sample, of which there are fewer than 60."""
    from halfbyte.data.sample import Sample
    from halfbyte.plan import plan

    monkeypatch.setattr(plan, "Sample", lambda **_: Sample(rows=60, longest=0))
    rows = tiny.preferences(200)
    for row in rows[150:]:
        if wrong == "role":
            row["chosen"] = [{"role": "nobody", "content": "a"}]
        else:
            row["rejected"] = row["chosen"]
    words = (
        f"--model_name_or_path={model_dir('llama')}",
        f"--dataset_name={tiny.write_rows(tmp_path / 'd', rows)}",
    )
    assert main(["plan", "dpo", *words, *OPTIONS]) == 2
    said = re.search(r"row (\d+)", capsys.readouterr().err)
    assert said is not None
    assert int(said[1]) > 150


def test_gpus_and_a_launch_file(given, planned: Planned) -> None:
    words = [word for word in given("sft") if "dtype" not in word]
    alone = planned("sft", *words, "--gpu", "24GB")
    shared = planned("sft", *words, "--gpu", "24GB x 2", f"--launch={LAUNCH / 'fsdp2.yaml'}")
    assert (alone["device"]["ranks"], alone["device"]["strategy"]) == (1, "single")
    assert (shared["device"]["ranks"], shared["device"]["strategy"]) == (2, "fsdp2")
    assert alone["device"]["capacity"] == 24 * 2**30 - target.CONTEXT
    assert alone["memory"]["pageable"] == alone["memory"]["optimizer"] > 0  # the paged optimizer is CUDA's
    assert shared["memory"]["four_bit_weights"] == alone["memory"]["four_bit_weights"] // 2
    assert shared["memory"]["quantization_state"] == alone["memory"]["quantization_state"]
    assert shared["memory"]["gathered"] > 0
    assert shared["data"]["batch"] == 2 * alone["data"]["batch"]
    several = planned("sft", *words, "--gpu", "24GB x 2")
    assert several["device"]["strategy"] == "ddp"
    assert several["memory"]["buckets"] == several["memory"]["adapters"]


@pytest.mark.parametrize("option", ["--tf32=true", "--activation_offloading", "--fp16"])
def test_a_gpu_is_asked_what_only_it_can_do(given, planned: Planned, option: str) -> None:
    words = [word for word in given("sft") if "dtype" not in word]
    assert planned("sft", *words, option, "--gpu=24GB")["device"]["device"] == "cuda"


def test_a_configuration_for_the_cpu_is_planned_for_a_gpu(given, planned: Planned, tmp_path: Path) -> None:
    """The message that `use_cpu: true` is refused with says how, and the dtype is the one of a GPU."""
    words = [word for word in given("sft") if "dtype" not in word]
    config = tmp_path / "cpu.yaml"
    config.write_text("use_cpu: true\n")
    found = planned("sft", f"--config={config}", *words, "--gpu=24GB", "--use_cpu", "false")
    assert found == planned("sft", *words, "--gpu=24GB")
    assert found["device"]["device"] == "cuda"
    bf16 = planned("sft", f"--config={config}", *words, "--gpu=24GB", "--use_cpu=false", "--bf16=true")
    assert bf16["memory"] == found["memory"]


def test_what_makes_it_fit_comes_with_its_figure(
    given, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = given("sft")
    whole = planned("sft", *words, "--memory_budget=min")["memory"]["total"]
    monkeypatch.setattr(target, "host_memory", lambda: whole - 50_000)
    found = planned("sft", *words)
    assert found["verdict"] == "does not fit"
    assert found["changes"][-1]["verdict"] != "does not fit"
    assert all(change["total"] < whole for change in found["changes"])
    written = [each.replace(": ", "=") for each in found["changes"][0]["write"].split(", ")]
    kept = [word for word in words if word.partition("=")[0].strip("-") not in " ".join(written)]
    smaller = planned("sft", *kept, *(f"--{each}" for each in written))
    assert smaller["memory"]["total"] == found["changes"][0]["total"]


def test_time_from_a_stated_rate(given, planned: Planned) -> None:
    found = planned("sft", *given("sft"), "--tokens_per_second=100")
    assert found["seconds_per_epoch"] == pytest.approx(found["data"]["tokens"] / 100)


def test_a_page_says_the_verdict_first(given, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "dpo", *given("dpo")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fits: ")
    for part in (
        "base, 4-bit weights",
        "optimizer state",
        "total",
        "trained: ",
        "data: 16 rows",
        "steps: 8 of 2",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "lots"), "'lots' is no GPU"),
        (("--launch", "no-such.yaml"), "no file no-such.yaml"),
        (("--tokens_per_second", "0"), "must be positive"),
        (("--preview", "0"), "must be at least 1"),
        (("--preview", "2", "--row", "3"), "--row: has no effect with --preview"),
        (
            ("--preview", "2", "--probe"),
            "--probe: has no effect with --preview, which shows rows in the place of the plan",
        ),
        (("--row", "3", "--full"), "--full: has no effect with --row"),
        (("--row", "3", "--tokens_per_second", "9"), "--tokens_per_second: has no effect with --row"),
        (("--probe", "--gpu", "24GB"), "measures this machine"),
        (
            ("--gpu", "24GB x 2", "--launch", str(LAUNCH / "fsdp2.yaml"), "--load_in_4bit=false"),
            "false under fsdp2",
        ),
        (("--launch", str(LAUNCH / "cpu.yaml"), "--gpu", "24GB"), "trains on CPUs"),
        (("--use_cpu", "--gpu", "24GB"), "add `--use_cpu false` for the plan"),
        (("--activation_offloading",), "this run is on the CPU"),
        (
            ("--gradient_checkpointing_kwargs={use_reentrant: true}", "--gpu", "24GB x 2"),
            "use_reentrant: true fails under DDP",
        ),
        (("--learning_rat", "1"), "did you mean"),
        (("--row", "99"), "no row 99: the split has 16"),
        (("--row", "0"), "no row 0: the split has 16"),
    ],
)
def test_mistakes(given, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert main(["plan", "sft", *given("sft"), *words]) == 2
    assert said in capsys.readouterr().err


def test_the_help_says_that_rows_are_shown_in_the_place_of_the_plan(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert " ".join(capsys.readouterr().out.split()).count("in the place of the plan") == 2


@pytest.mark.parametrize(
    ("text", "size", "count"),
    [("24GB", 24, None), ("80 GiB", 80, None), ("24GB x 2", 24, 2), ("16", 16, None), ("48GB*4", 48, 4)],
)
def test_gpus_as_they_are_written(text: str, size: int, count: int | None) -> None:
    found = target.find(text, None)
    assert found.capacity == size * 2**30 - target.CONTEXT
    assert found.ranks == (count or 1)


@pytest.mark.parametrize("text", ["", "x 2", "GB", "0GB", "-24GB", "24GB x 0"])
def test_what_is_no_gpu(text: str) -> None:
    with pytest.raises(UserError, match="is no GPU"):
        target.find(text, None)


def test_launch_files_of_clusters() -> None:
    assert target.find("80GB", LAUNCH / "slurm.sh").ranks == 16
    assert target.find("80GB", LAUNCH / "kubernetes.yaml").ranks == 16


def test_a_plan_leaves_nothing_behind(given, planned: Planned, tmp_path: Path, monkeypatch) -> None:
    """Constructing a trainer makes its directory, and a repository where it pushes to the hub."""
    from transformers import Trainer

    def refuse(self: Trainer, *_: object, **__: object) -> None:
        raise AssertionError("a repository was made")

    monkeypatch.setattr(Trainer, "init_hf_repo", refuse)
    planned(
        "sft", *given("sft"), "--push_to_hub=true", "--hub_model_id=x/y", f"--output_dir={tmp_path / 'run'}"
    )
    assert not (tmp_path / "run").exists()


def test_paged_state_may_move_to_the_host(given, planned: Planned) -> None:
    words = [word for word in given("sft") if "dtype" not in word]
    found = planned("sft", *words, "--gpu", "24GB")["memory"]
    place = target.find("24GB", None)
    from dataclasses import replace

    from halfbyte.memory import Memory

    held = Memory(**{name: size for name, size in found.items() if name != "total"})
    assert replace(place, capacity=held.total - held.pageable).verdict(held) == "tight"
    assert replace(place, capacity=held.total - held.pageable - 1).verdict(held) == "does not fit"


def test_adapters_that_a_run_refuses_are_not_planned(
    given, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast.experts, "_is_covered", lambda held: False)
    words = (*given("sft", "qwen3_moe"), "--lora_target_parameters", "experts.gate_up_proj")
    assert main(["plan", "sft", *words]) == 2
    planned = capsys.readouterr().err
    assert "computes its experts in a way of its own" in planned
    assert main(["sft", *words, "--output_dir=refused"]) == 2
    assert planned.splitlines()[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {"num_hidden_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("qwen3_moe", {"output_router_logits": True, "num_experts_per_tok": 1}),
        ("llama", {"use_safetensors": True, "attn_implementation": "eager"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_plan_is_of_the_model_that_the_run_loads(
    given, planned: Planned, tmp_path: Path, arch: str, changes: dict
) -> None:
    words = (*given("sft", arch), "--model_init_kwargs", json.dumps(changes))
    plain, found = planned("sft", *given("sft", arch)), planned("sft", *words)
    assert main(["sft", *words, f"--output_dir={tmp_path / 'run'}"]) == 0
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found["memory"] == told["memory"]["predicted"]
    assert (found["memory"] == plain["memory"]) == ("rope_parameters" in changes)
    assert ("not padding-free (attention is eager" in str(found["step"])) == (
        "attn_implementation" in changes
    )
    assert told["fast"]["batches"] == "on" or "attn_implementation" in changes


def test_the_attention_of_a_gpu_is_planned_without_one(given, planned: Planned, capsys) -> None:
    """Its kernels are installed where the run will be, and refused here where it would be here."""
    words = (*given("sft"), "--attn_implementation=flash_attention_2")
    assert main(["plan", "sft", *words]) == 2
    assert "FlashAttention2 has been toggled on" in capsys.readouterr().err
    gpu = "--gpu=24GB"
    found = planned("sft", *words, gpu)
    assert found["step"][1] == planned("sft", *given("sft"), gpu)["step"][1]
    assert planned("sft", *words, gpu, "--packing", "--fast=none")["verdict"] == "fits"


@pytest.mark.parametrize("launch", [None, "ddp.yaml"])
def test_use_cpu_plans_for_the_cpu_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, launch: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**34))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file = None if launch is None else LAUNCH / launch
    gpu, cpu = (target.find(None, file, use_cpu=use_cpu) for use_cpu in (False, True))
    assert (gpu.device, gpu.capacity, cpu.device) == ("cuda", 2**34 - target.CONTEXT, "cpu")
    assert (gpu.ranks, gpu.strategy) == (cpu.ranks, cpu.strategy)
    assert cpu.planned.device == "cpu"
    assert not cpu.notes  # about GPUs that it does not need
    with pytest.raises(UserError, match="use_cpu: true trains on the CPU, and --gpu plans for a GPU"):
        target.find("24GB", file, use_cpu=True)


def test_an_argument_that_no_model_takes_is_refused_alike(given, tmp_path: Path, capsys) -> None:
    words = (*given("sft"), "--model_init_kwargs", '{"num_hidden_layer": 1}')
    for command in (["plan", "sft"], ["sft", f"--output_dir={tmp_path / 'run'}"]):
        assert main([*command, *words]) == 2
        said = "--model_init_kwargs: 'num_hidden_layer' is neither .*; did you mean num_hidden_layers?"
        assert re.search(said, capsys.readouterr().err)
