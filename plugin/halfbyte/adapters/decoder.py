"""The linear layers that text trains: all linear layers of the decoder, found by one short forward and backward."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from halfbyte.adapters.targets import is_named
from halfbyte.errors import UserError
from halfbyte.multimodal import language_model
from halfbyte.task import SEQUENCE_CLASSIFICATION

# Layers whose weights state mixers read past an adapter. Kernels read `out_proj` (PEFT 0.21 refuses adapters on it, not
# for all of these); on a base that is not quantized `dt_proj` is a product with its weight, and on one that is, a call.
_READ_PAST = {
    "bamba": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "falcon_mamba": {"dt_proj", "out_proj"},
    "granitemoehybrid": {"out_proj"},
    "jamba": {"dt_proj"},
    "mamba": {"dt_proj", "out_proj"},
    "mamba2": {"out_proj"},
    "nemotron_h": {"out_proj"},
    "zamba2": {"out_proj"},
}
_TOKENS = 16


def linears(
    model: PreTrainedModel, shown_by: PreTrainedModel | None = None
) -> tuple[list[str], list[str], list[str]]:
    """Return the paths of the linear layers that text reaches, of those read past an adapter, and of those not reached.

    The output head is in none. A layer counts as reached if a layer at its place in any block is (the expert of
    another token): vision towers, attention to an encoder and poolers are not. ``shown_by`` is a small model of the
    class of a ``model`` on meta. Where no forward can be made (ZeRO-3 holds no whole weight; the model requires other
    inputs), and of layers that a small model has not, all count as reached.
    """
    found = _layers(model)
    past = _read_past(model, found)
    shown = found if shown_by is None else _layers(shown_by)
    reached = None if is_deepspeed_zero3_enabled() else _reached(shown_by or model, shown)
    places = {place(name) for name in (found if reached is None else reached)}
    places |= {place(name) for name in found} - {place(name) for name in shown}
    chosen = [name for name in found if place(name) in places and name not in past]
    return chosen, sorted(past), sorted(found.keys() - past - set(chosen))


def check_read(model: PreTrainedModel, targets: str | Collection[str]) -> None:
    """Raise :class:`UserError` for ``targets`` that name a layer whose weight is read past an adapter."""
    past = sorted(_read_past(model, matched(model, targets)))
    if past:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in past}))
        raise UserError(
            f"state layers of {_type(model)} read the weight of {leaves} past an adapter, which would not train or not "
            f"count on the 16-bit base; take {leaves} out, or write `all-linear`, which leaves it out",
            option="lora_target_modules",
        )


def matched(model: PreTrainedModel, targets: str | Collection[str]) -> list[str]:
    """Return the paths of the layers inside the decoder that ``targets`` name as PEFT does: by ends, or a pattern."""

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return is_named(name, *targets)

    return [name for name in _layers(model) if is_target(name)]


def _read_past(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    leaves = _READ_PAST.get(_type(model), set())
    return {name for name in names if name.rpartition(".")[2] in leaves}


def _type(model: PreTrainedModel) -> str:
    found: str = model.config.get_text_config().model_type
    return found


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
