"""Fresh adapters: float32, unchanged logits at step 0, one step that trains, refusals that explain."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte import QLoRAPlugin, adapters
from halfbyte.errors import UserError
from tests import tiny
from tests.adapters.build import sft

ModelDir = Callable[..., Path]


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
    for group in trainer.create_optimizer().param_groups:
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
