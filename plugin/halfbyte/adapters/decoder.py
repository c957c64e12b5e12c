"""The linear layers that text trains: all linear layers of the decoder, found by one short forward and backward."""

import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from halfbyte.adapters.targets import is_named
from halfbyte.multimodal import language_model
from halfbyte.task import SEQUENCE_CLASSIFICATION

# Layers that fused kernels of state-space models read past an adapter (PEFT 0.21 refuses adapters on them).
_READ_BY_KERNELS = {
    model: {"out_proj"}
    for model in (
        "falcon_h1",
        "mamba",
        "mamba2",
        "falcon_mamba",
        "nemotron_h",
        "bamba",
        "zamba2",
        "granitemoehybrid",
    )
}
_TOKENS = 16


def linears(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return the paths of the linear layers that text reaches, and of those that it does not.

    The output head is in neither. A layer counts as reached if a layer at its place in any block is (the expert of
    another token): vision towers, attention to an encoder, poolers and what kernels read past an adapter are not.
    Where no forward can be made (ZeRO-3 holds no whole weight; the model requires other inputs) all count as reached.
    """
    found = _layers(model)
    reached = None if is_deepspeed_zero3_enabled() else _reached(model, found)
    passed_over = _READ_BY_KERNELS.get(model.config.get_text_config().model_type, set())
    places = {place(name) for name in (found if reached is None else reached)}
    chosen = [name for name in found if place(name) in places and name.rpartition(".")[2] not in passed_over]
    return chosen, sorted(found.keys() - set(chosen))


def matched(model: PreTrainedModel, targets: str | Collection[str]) -> list[str]:
    """Return the paths of the layers inside the decoder that ``targets`` name as PEFT does: by ends, or a pattern."""

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return is_named(name, *targets)

    return [name for name in _layers(model) if is_target(name)]


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers by path, without a head; of a multimodal model those of its language model."""
    head = model.get_output_embeddings()
    within = language_model(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not (head is None and _in_new_head(name))
        and (within is None or name.startswith(f"{within}."))
    }


def _in_new_head(name: str) -> bool:
    """Whether a layer belongs to a classification head, which is trained in full."""
    return not set(SEQUENCE_CLASSIFICATION.unquantized).isdisjoint(name.split("."))


def place(name: str) -> str:
    """The path of a layer whatever the block or expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _reached(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> set[str] | None:
    """The names of ``modules`` on whose output the logits of a text depend; None if no forward can be made."""
    outputs: list[tuple[str, Tensor]] = []
    embedding = model.get_input_embeddings()

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(
                output, Tensor
            ):  # a router may be a linear layer that returns a tuple: no adapter fits
                outputs.append((name, output if output.requires_grad else output.requires_grad_()))

        return hook

    ids = torch.arange(_TOKENS, device=embedding.weight.device).remainder(embedding.weight.shape[0])[None]
    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    training = model.training
    model.train()  # kernels are fused in training only
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            found = torch.autograd.grad(logits.sum(), [output for _, output in outputs], allow_unused=True)
    except Exception:  # of any architecture: one that requires images, a language, a decoder's input
        return None
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name for (name, _), gradient in zip(outputs, found, strict=True) if gradient is not None}
