"""Adapters on a 4-bit base: float32, unchanged logits at step 0, one step that trains, refusals that explain."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin, adapters
from halfbyte.errors import UserError
from tests import tiny

ModelDir = Callable[..., Path]


def arguments(cls: type, output: Path, **options):
    base = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return cls(**{**base, **options})


def sft(plugin: QLoRAPlugin, model: Path, output: Path, **options) -> Trainer:
    return plugin.trainer(
        SFTTrainer,
        model=str(model),
        args=arguments(SFTConfig, output, **options),
        train_dataset=Dataset.from_list(tiny.texts(12)),
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(4, 24)[None]
    with adapters.evaluating(model):
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"loraplus_lr_ratio": 16.0},
        {"lora_dropout": 0.1},
    ],
    ids=lambda o: next(iter(o), "default"),
)
def test_a_fresh_adapter_changes_nothing_and_then_trains(
    model_dir: ModelDir, tmp_path: Path, options: dict
) -> None:
    plugin = QLoRAPlugin(dtype="float32", **options)
    trainer = sft(plugin, model_dir("llama"), tmp_path)
    model = trainer.model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert {p.dtype for p in trained.values()} == {torch.float32}
    with model.disable_adapter():
        base = logits(model)
    # DoRA recomputes the weight's norm from its dequantized value: equal in exact arithmetic only.
    assert (logits(model) - base).abs().max() <= (1e-5 if options.get("use_dora") else 0)
    before = {n: p.detach().clone() for n, p in trained.items()}
    trainer.train()
    moved = {n for n, p in trained.items() if not torch.equal(p, before[n])}
    assert moved == set(trained), f"not trained: {sorted(set(trained) - moved)}"
    assert (logits(model) - base).abs().max() > 1e-6
    if options.get("init_lora_weights") == "eva":
        a = next(p for n, p in before.items() if "lora_A" in n)
        assert torch.allclose(a @ a.T, torch.eye(len(a)) * (a @ a.T).diagonal(), atol=1e-4), (
            "EVA's rows are orthogonal"
        )


def test_loraplus_gives_b_its_own_rate(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer = sft(QLoRAPlugin(dtype="float32", loraplus_lr_ratio=16.0), model_dir("llama"), tmp_path)
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(1e-3 * (16 if "lora_B" in names[id(parameter)] else 1))


@pytest.mark.parametrize(
    "name", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "orthogonal"]
)
def test_initializations_that_harm_a_4bit_base_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(
        UserError, match=f"init_lora_weights: '{name}' is refused: .*4-bit.*write one of"
    ) as error:
        QLoRAPlugin(init_lora_weights=name)
    assert len(str(error.value).splitlines()) <= 10


def test_an_unknown_initialization_suggests_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"^init_lora_weights: 'gausian' .*; did you mean gaussian\?; write one of"
    ):
        QLoRAPlugin(init_lora_weights="gausian")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_projj"],
            r"'q_projj' matches no layer; did you mean q_proj\?; linear layers: down_proj, gate_proj",
        ),
        (["q_proj", "nowhere"], "'nowhere' matches no layer"),
        (["q_proj", "lm_head"], "lm_head is the output head"),
        (["lm_head"], "lm_head is the output head"),
    ],
)
def test_targets_that_would_not_train_are_errors(
    model_dir: ModelDir, targets: list[str], message: str
) -> None:
    plugin = QLoRAPlugin(dtype="float32", lora_target_modules=targets)
    with pytest.raises(UserError, match=message):
        plugin.load(str(model_dir("llama")))


def test_one_target_is_a_name_and_exclusions_count(model_dir: ModelDir) -> None:
    model = QLoRAPlugin(dtype="float32", lora_target_modules=["q_proj"]).load(str(model_dir("llama")))
    assert {
        n.split(".lora_")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad
    } == {"q_proj"}
    plugin = QLoRAPlugin(dtype="float32", lora_exclude_modules=["down_proj"])
    model = plugin.load(str(model_dir("llama")))
    assert not any("down_proj" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("arch", ["llama", "opt", "qwen3", "gemma"])
def test_checkpointing_does_not_change_gradients(model_dir: ModelDir, arch: str) -> None:
    ids = torch.randint(4, tiny.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))

    path = str(model_dir(arch))

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = QLoRAPlugin(dtype="float32").load(path, gradient_checkpointing=checkpointing)
        assert model.get_base_model().is_gradient_checkpointing is checkpointing
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    without, having = gradients(False), gradients(True)
    assert without.keys() == having.keys()
    for name, gradient in without.items():
        assert gradient.abs().sum() > 0, f"{name} has no gradient"
        assert torch.equal(gradient, having[name]), name


@pytest.fixture(scope="module")
def sft_adapter(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sft")
    trainer = sft(QLoRAPlugin(dtype="float32"), model_dir("llama"), output, max_steps=4, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(output))
    return output


def dpo(plugin: QLoRAPlugin, output: Path, model: str | None = None, **options) -> Trainer:
    return plugin.trainer(
        DPOTrainer,
        model=model,
        args=arguments(DPOConfig, output, **options),
        train_dataset=Dataset.from_list(tiny.preferences(8)),
    )


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.rows.append(dict(logs))


def first_loss(trainer: Trainer) -> float:
    """The loss at step 0, unrounded."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize("by_model_path", [False, True], ids=["adapter_name_or_path", "model path"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_from_an_adapter_starts_at_ln_2(
    sft_adapter: Path, tmp_path: Path, by_model_path: bool, dtype: str
) -> None:
    if by_model_path:
        trainer = dpo(QLoRAPlugin(dtype=dtype), tmp_path, str(sft_adapter))
    else:
        trainer = dpo(QLoRAPlugin(dtype=dtype, adapter_name_or_path=str(sft_adapter)), tmp_path)
    named = dict(trainer.model.named_parameters())
    policies = [n for n in named if ".default." in n]
    assert policies
    for name in policies:
        reference = named[name.replace(".default.", ".ref.")]
        assert torch.equal(named[name], reference)
        assert named[name].dtype == reference.dtype == torch.float32
        assert named[name].requires_grad
        assert not reference.requires_grad
    assert any(named[n].abs().max() > 0 for n in policies if "lora_B" in n), "the SFT adapter is not trivial"
    assert abs(first_loss(trainer) - math.log(2)) < 1e-6


def test_dpo_with_a_fresh_adapter_takes_the_base_as_reference(model_dir: ModelDir, tmp_path: Path) -> None:
    trainer = dpo(QLoRAPlugin(dtype="float32"), tmp_path, str(model_dir("llama")))
    assert trainer.ref_model is None
    assert not any(".ref." in name for name, _ in trainer.model.named_parameters())
    assert abs(first_loss(trainer) - math.log(2)) < 1e-6
    rows = Losses()
    trainer.add_callback(rows)
    trainer.train()
    assert rows.rows[0]["rewards/margins"] == 0
    assert rows.rows[1]["rewards/margins"] != 0


def test_sft_continues_an_adapter_exactly(sft_adapter: Path, tmp_path: Path, model_dir: ModelDir) -> None:
    from safetensors.torch import load_file

    trainer = sft(
        QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter)), model_dir("llama"), tmp_path
    )
    saved = load_file(sft_adapter / "adapter_model.safetensors")
    named = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert named.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(named[name], value), name


def test_an_adapter_of_another_base_is_an_error_that_names_both(
    model_dir: ModelDir, sft_adapter: Path
) -> None:
    other = model_dir("llama", seed=1)
    with pytest.raises(UserError, match="was trained on the base") as error:
        QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter)).load(str(other))
    assert str(model_dir("llama")) in str(error.value)
    assert str(other) in str(error.value)


def test_the_recorded_fingerprint_decides_over_the_name(
    model_dir: ModelDir, sft_adapter: Path, tmp_path: Path
) -> None:
    import shutil

    from halfbyte.quantization import fingerprint

    moved, adapter = tmp_path / "moved", tmp_path / "adapter"
    shutil.copytree(model_dir("llama"), moved)
    shutil.copytree(sft_adapter, adapter)
    (adapter / "run.json").write_text(json.dumps({"base": {"sha": fingerprint(str(model_dir("llama")))}}))
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(adapter))
    plugin.load(str(moved))
    with pytest.raises(UserError, match="was trained on the base"):
        plugin.load(str(model_dir("llama", seed=1)))


IGNORED = {
    "rank": ({"lora_r": 64}, "lora_r: 64 is not what the adapter"),
    "alpha": ({"lora_alpha": 1}, "lora_alpha: 1 is not"),
    "DoRA": ({"use_dora": True}, "use_dora: True is not"),
    "targets": ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: q_proj is not"),
    "initialization": ({"init_lora_weights": "eva"}, "init_lora_weights: the adapter"),
    "no adapters": ({"use_peft": False, "load_in_4bit": False}, "use_peft: false trains the base without"),
}


@pytest.mark.parametrize("case", IGNORED)
def test_what_a_saved_adapter_would_ignore_is_refused_before_the_base_is_loaded(
    sft_adapter: Path, case: str
) -> None:
    options, message = IGNORED[case]
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter), **options)
    with pytest.raises(UserError, match=message):
        plugin.load()
    assert plugin.coverage is None


def test_new_tokens_on_a_saved_adapter_are_refused(sft_adapter: Path) -> None:
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter))
    with pytest.raises(
        UserError, match=r"additional_special_tokens: the adapter .* was trained without them"
    ):
        plugin.load(added_token_ids=[5])


def test_the_revision_of_the_base_goes_with_the_adapter(model_dir: ModelDir, tmp_path: Path) -> None:
    first = QLoRAPlugin(dtype="float32", model_revision="v1").load(str(model_dir("llama")))
    first.save_pretrained(tmp_path / "adapter")
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(tmp_path / "adapter"))
    assert plugin.base_record()["revision"] == "v1"
    assert QLoRAPlugin(dtype="float32", model_name_or_path="x/y").base_record()["revision"] == "main"


def test_an_adapter_of_the_hub(sft_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's client keeps it on disk, since there is no network here."""
    import shutil

    cached = tmp_path / "models--them--adapter"
    shutil.copytree(sft_adapter, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plugin = QLoRAPlugin(dtype="float32", adapter_name_or_path="them/adapter")
    local = QLoRAPlugin(dtype="float32", adapter_name_or_path=str(sft_adapter))
    assert plugin.resolve()[0] == local.resolve()[0]
    trained, same = (
        {n: p for n, p in m.load().named_parameters() if p.requires_grad} for m in (plugin, local)
    )
    assert trained
    assert all(torch.equal(trained[name], same[name]) for name in same)
    with pytest.raises(UserError, match="'them/none' is neither a directory nor an adapter on the hub"):
        QLoRAPlugin(adapter_name_or_path="them/none").resolve()


def test_a_damaged_adapter_directory_is_a_users_error(model_dir: ModelDir, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{not json")
    with pytest.raises(UserError, match="not a PEFT adapter configuration"):
        QLoRAPlugin(adapter_name_or_path=str(tmp_path)).resolve()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        QLoRAPlugin(adapter_name_or_path=str(tmp_path)).resolve()
    with pytest.raises(UserError, match="no model"):
        QLoRAPlugin().resolve()
