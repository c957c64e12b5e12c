"""LoRA adapters on a 4-bit base: fresh, continued, or as the start and reference of a preference run.

Adapter weights are float32 from the first step to the last, so that small updates survive and a resumed
run can be exact.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"

_REWRITES_BASE = "it rewrites the base weights, which on a 4-bit base means quantizing them a second time"
_DECOMPOSES_BASE = "it decomposes the base weight, which on a 4-bit base is packed bytes"
REFUSED_INITIALIZATIONS = {
    "pissa": _DECOMPOSES_BASE,
    "corda": _DECOMPOSES_BASE,
    "olora": _REWRITES_BASE,
    "loftq": _REWRITES_BASE,
    "lora_ga": "on a 4-bit base PEFT runs it with B = 0 and no gradient information, silently",
    "orthogonal": "it fails on packed 4-bit weights",
}
INITIALIZATIONS = ("default", "gaussian", "eva")


def check_initialization(name: str | None) -> None:
    """Raise :class:`UserError` for an initialization that is wrong, or not proven, on a 4-bit base."""
    if name is None or name in INITIALIZATIONS:
        return
    family = next((refused for refused in REFUSED_INITIALIZATIONS if name.startswith(refused)), None)
    choice = f"write one of {', '.join(INITIALIZATIONS)}"
    if family is not None:
        raise UserError(
            f"init_lora_weights: {name!r} is refused: {REFUSED_INITIALIZATIONS[family]}; {choice}"
        )
    near = difflib.get_close_matches(name, INITIALIZATIONS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"init_lora_weights: {name!r} is not an initialization proven on a 4-bit base; {hint}{choice}"
    )


def attach(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    initialization: str | None = None,
    added_token_ids: Iterable[int] = (),
) -> PeftModel:
    """Put a fresh LoRA adapter on ``model``; the logits do not change.

    ``added_token_ids`` are vocabulary rows that are new: their embeddings, and output rows where the head
    is not tied to them, are trained in full.

    Raises :class:`UserError` if a target matches no layer, or if the output head is a target: TRL's fused
    head reads its weight directly, so that an adapter there would silently not train.
    """
    check_initialization(initialization)
    if initialization == "eva":
        # rho=1 keeps one rank for all layers: ranks that depend on data would differ between processes.
        config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    elif initialization == "gaussian":
        config.init_lora_weights = "gaussian"
    _check_targets(model, config)
    added = sorted(added_token_ids)
    if added:
        config.trainable_token_indices = _rows_to_train(model, added)
    # EVA's A is set later from data; until then PEFT leaves it as it is, and B is zero.
    peft_model = get_peft_model(model, config)
    _check_head(peft_model)
    return _show_head_bias(_to_float32(peft_model))


def continue_from(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Put the saved adapter ``adapter`` (directory or hub id) on ``model``, trainable, in float32."""
    try:
        peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the adapter {adapter!r}: {str(error).splitlines()[0]}") from error
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise UserError(f"the adapter {adapter!r} has no trainable weights")
    return _show_head_bias(_to_float32(peft_model))


def initialize_eva(model: PeftModel, batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """Set every A from the leading directions of its layer's inputs on ``batches`` (EVA, arXiv 2410.07170).

    B stays zero, so the logits do not change. The same batches give the same weights on every rank.
    """

    class Loader:
        """What PEFT wants of a dataloader: that it can be walked more than once."""

        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            return iter(inputs)

        def __len__(self) -> int:
            return len(inputs)

    wanted = ("input_ids", "attention_mask", "position_ids")
    inputs = [{k: v.to(model.device) for k, v in batch.items() if k in wanted} for batch in batches]
    if not inputs:
        raise UserError("init_lora_weights: 'eva' needs training rows to initialize from, and there are none")
    for batch in inputs:
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    with evaluating(model), torch.random.fork_rng():
        initialize_lora_eva_weights(model, Loader(), gather_distributed_inputs=False, show_progress_bar=False)
    _to_float32(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block with ``model`` in evaluation mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def kept_in_float32(model: nn.Module) -> Iterator[None]:
    """Undo what a block does to the values of trainable parameters.

    TRL 1.16 rounds the adapters of a quantized model to bfloat16 while it constructs a trainer
    (trainer/sft_trainer.py:908, trainer/dpo_trainer.py:726); their float32 values come back afterwards.
    """
    kept = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name].to(parameter.device)


@contextmanager
def whole_reference(model: nn.Module) -> Iterator[None]:
    """Make the reference that TRL's preference trainers copy from an adapter a copy of all of it, and frozen.

    TRL 1.16 copies the parameters that have ``.default.`` in their name (trainer/dpo_trainer.py:690), which
    passes over trained embedding rows, whose names end in ``.default``.
    """
    if not isinstance(model, PeftModel):
        yield
        return

    def add_adapter(name: str, config: LoraConfig, *args: Any, **kwargs: Any) -> None:
        PeftModel.add_adapter(model, name, config, *args, **kwargs)
        for path, parameter in list(model.named_parameters()):
            parts = path.split(".")
            if "default" in parts:
                copied = ".".join(name if part == "default" else part for part in parts)
                model.get_parameter(copied).data.copy_(parameter.data)
                model.get_parameter(copied).requires_grad_(False)

    model.__dict__["add_adapter"] = add_adapter
    try:
        yield
    finally:
        del model.__dict__["add_adapter"]


def drop_reference_copy(model: nn.Module) -> None:
    """Take away the frozen copy that TRL's preference trainers make of any adapter they are given.

    A fresh adapter needs none: its reference is the base with the adapter off, which TRL falls back to.
    """
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")


def adapter_directory(name_or_path: str) -> Path | None:
    """Return the path if it is a local adapter directory, else None."""
    path = Path(name_or_path)
    return path if (path / ADAPTER_CONFIG).is_file() else None


def base_of(adapter: str) -> str:
    """Return the base model that the local adapter directory ``adapter`` names."""
    directory = adapter_directory(adapter)
    if directory is None:
        raise UserError(f"{adapter!r} is not an adapter directory: it has no {ADAPTER_CONFIG}")
    try:
        base = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(
            "base_model_name_or_path"
        )
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} is not a PEFT adapter configuration: {error}"
        ) from error
    if not base:
        raise UserError(f"{directory / ADAPTER_CONFIG} names no base model; write `model_name_or_path`")
    return str(base)


def _check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Every target must match a layer: PEFT raises only if all of them together match nothing."""
    targets = config.target_modules
    if not isinstance(targets, (list, set)):
        return
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings()
    for target in sorted(targets):
        matched = [name for name in names if name == target or name.endswith(f".{target}")]
        if head is not None and any(model.get_submodule(name) is head for name in matched):
            raise UserError(_head_message(target, model))
        if not matched and target != "all-linear":
            leaves = _linear_leaves(model)
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"lora_target_modules: {target!r} matches no layer; {hint}linear layers: {', '.join(leaves)}"
            )


def _check_head(model: PeftModel) -> None:
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(_head_message("the output head", model))


def _head_message(target: str, model: nn.Module) -> str:
    leaves = ", ".join(_linear_leaves(model))
    return (
        f"lora_target_modules: {target} is the output head, where an adapter would silently not train "
        f"(the loss reads the head's weight directly); take it out; linear layers: {leaves}"
    )


def _linear_leaves(model: nn.Module) -> list[str]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
    )


def _rows_to_train(model: PreTrainedModel, added: list[int]) -> dict[str, list[int]]:
    """Which modules hold the rows of ``added``: the embedding, and the head where it is not tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    rows = {names[id(embedding)]: added}
    if head is not None and head.weight is not embedding.weight:
        rows[names[id(head)]] = list(added)
    return rows


def _to_float32(model: PeftModel) -> PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _show_head_bias(model: PeftModel) -> PeftModel:
    """Let the head's bias be read where PEFT wraps the head to train rows of it.

    TRL's fused head reads ``weight`` and ``bias`` (trainer/utils.py:1633); PEFT 0.21's wrapper passes on
    the weight only.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        # Not through nn.Module, which would register the parameter a second time.
        object.__setattr__(head, "bias", head.original_module.bias)
    return model


def same_base(adapter: str, name_or_path: str, sha: str | None) -> None:
    """Raise :class:`UserError` unless ``adapter`` was trained on this base.

    The fingerprint in the adapter's run.json decides where there is one; else the names do.
    """
    trained_on = base_of(adapter)
    recorded = _recorded_base(adapter).get("sha")
    if recorded and sha:
        if recorded == sha:
            return
    elif trained_on == name_or_path or Path(trained_on).resolve() == Path(name_or_path).resolve():
        return
    raise UserError(
        f"the adapter {adapter!r} was trained on the base {trained_on!r}, not on {name_or_path!r}; "
        f"leave `model_name_or_path` out to take the adapter's own base, or name an adapter of this one"
    )


def _recorded_base(adapter: str) -> dict[str, Any]:
    run = Path(adapter) / "run.json"
    if not run.is_file():
        return {}
    try:
        return dict(json.loads(run.read_text(encoding="utf-8")).get("base") or {})
    except ValueError:
        return {}


def same_template(adapter: str, tokenizer: PreTrainedTokenizerBase, asked: str | None) -> None:
    """Raise :class:`UserError` if the template in use is not the one ``adapter`` was trained with."""
    if asked is None:
        return
    trained_with = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False).chat_template
    if tokenizer.chat_template != trained_with:
        raise UserError(
            f"chat_template_path: {asked!r} is not the chat template that the adapter {adapter!r} was trained with "
            f"({_beginning(trained_with)!r}); leave it out to use the adapter's"
        )


def _beginning(template: str | None) -> str:
    return "none" if template is None else template[:40] + ("..." if len(template) > 40 else "")
