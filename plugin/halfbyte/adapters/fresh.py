"""Fresh LoRA adapters on a 4-bit base: how they are initialized, and which initializations are refused.

Adapter weights are float32 from the first step to the last: small updates survive, and a resumed run is exact.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from halfbyte import multimodal
from halfbyte.adapters import decoder, experts, patterns, whole
from halfbyte.adapters.targets import is_named
from halfbyte.errors import UserError
from halfbyte.terminal.wording import first_line, plural, say, suggestion

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
    """Raise :class:`UserError` for an initialization that is wrong, or not tested, on a 4-bit base."""
    if name is None or name in INITIALIZATIONS:
        return
    family = next((refused for refused in REFUSED_INITIALIZATIONS if name.startswith(refused)), None)
    choice = f"write one of {', '.join(INITIALIZATIONS)}"
    if family is not None:
        raise UserError(
            f"{name!r} is refused: {REFUSED_INITIALIZATIONS[family]}; {choice}", option="init_lora_weights"
        )
    raise UserError(
        f"{name!r} is not an initialization tested on a 4-bit base{suggestion(name, INITIALIZATIONS)}; {choice}",
        option="init_lora_weights",
    )


def attach(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    initialization: str | None = None,
    added_token_ids: Iterable[int] = (),
    stacks: experts.Shapes = MappingProxyType({}),
    shown_by: PreTrainedModel | None = None,
) -> PeftModel:
    """Add a fresh LoRA adapter to ``model``; the logits do not change.

    ``added_token_ids`` are new vocabulary rows: their embeddings ``[H]``, and their rows of the head where it is
    not tied to the embeddings, are trained in full. ``stacks`` are the shapes of the model's experts by path.
    ``shown_by`` stands for a model on meta where a forward shows what text reaches.

    Raises :class:`UserError` if a target matches no layer, or if the output head is a target: TRL's fused head
    reads the head's weight directly, so an adapter there would silently not train.
    """
    check_initialization(initialization)
    if initialization == "eva":
        # rho=1 keeps one rank r for all layers: ranks that depend on data would differ between processes.
        config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=1.0)
    elif initialization == "gaussian":
        config.init_lora_weights = "gaussian"
    check_targets(model, config, stacks)
    if config.target_modules == "all-linear":
        _target_the_decoder(model, config, stacks, shown_by)
    elif multimodal.language_model(model) is not None:
        # By path: the same names in a tower must not match where the adapter is loaded on the whole model.
        config.target_modules = set(decoder.matched(model, config.target_modules))
    added = sorted(added_token_ids)
    if added:
        config.trainable_token_indices = _rows_to_train(model, added)
    # EVA sets A later, from data; until then B is zero and A is PEFT's default.
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(first_line(error), option="lora_target_modules") from error
    _check_head(peft_model)
    return show_head_bias(to_float32(peft_model))


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


def check_targets(model: PreTrainedModel, config: LoraConfig, stacks: experts.Shapes) -> None:
    """Raise :class:`UserError` for a target or an exclusion of ``config`` that nothing in ``model`` answers to.

    ``stacks`` are as in :func:`attach`. No weight is read.
    """
    _check_layers(model, config, stacks)
    _check_excluded(model, config)
    whole.check(model, config)
    experts.check_parameters(model, config, stacks)


def _check_layers(model: PreTrainedModel, config: LoraConfig, stacks: experts.Shapes) -> None:
    """Raise if any target matches no layer: PEFT raises only if no target matches."""
    targets = config.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        try:
            patterns.check(model, {"target_modules": targets})
        except UserError as error:
            raise UserError(error.what, option="lora_target_modules") from error
    if targets and targets != "all-linear":
        decoder.check_read(model, targets)
    if not isinstance(targets, (list, set)):
        return
    if stacks:
        experts.check_names(model, targets, stacks)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings()
    for target in sorted(targets):
        matched = [name for name in names if is_named(name, target)]
        if head is not None and any(model.get_submodule(name) is head for name in matched):
            raise _head_refused(f"{target} is the output head", model)
        if target == "all-linear":
            raise UserError("`all-linear` stands alone; remove the other names", option="lora_target_modules")
        if not matched:
            leaves = _linear_leaves(model)
            raise UserError(
                f"{target!r} matches no layer{suggestion(target, leaves)}; linear layers: {', '.join(leaves)}",
                option="lora_target_modules",
            )


def _check_excluded(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise if an exclusion matches no module."""
    excluded = config.exclude_modules
    if not isinstance(excluded, (list, set)):
        return
    paths = [name for name, _ in model.named_modules()]
    for name in sorted(excluded):
        if not any(is_named(path, name) for path in paths):
            parts = {part for path in paths for part in path.split(".") if not part.isdigit()}
            raise UserError(
                f"{name!r} excludes nothing: no module has that name{suggestion(name, parts)}; "
                f"linear layers: {', '.join(_linear_leaves(model))}",
                option="lora_exclude_modules",
            )


def _target_the_decoder(
    model: PreTrainedModel, config: LoraConfig, stacks: experts.Shapes, shown_by: PreTrainedModel | None
) -> None:
    """Replace `all-linear` by the linear layers that text reaches, and print what gets no adapter."""
    found, past, others = decoder.linears(model, shown_by)
    gates = experts.routers({name: model.get_submodule(name) for name in found}, stacks)
    taken = sorted(experts.taken_for_experts(model, found) - gates)
    chosen = [name for name in found if name not in gates and name not in taken]
    config.target_modules = set(chosen)
    without = []
    if stacks and not config.target_parameters:
        short = ", ".join(experts.short_names(stacks))
        without.append(f"{experts.described(stacks)}, which `lora_target_parameters: [{short}]` adds")
    obstacle = experts.no_weights(config)
    by_weight = [] if obstacle else experts.target_weights(config, taken)
    for names, reason in (
        (sorted(gates), "that route to experts"),
        (taken if obstacle else [], f"whose names PEFT reads as those of experts ({obstacle} adds them)"),
        (past, "whose weights state layers read past an adapter"),
        (others, "without a gradient from text"),
    ):
        if names:
            without.insert(0, f"{plural(len(names), 'layer')} {reason}: {_places(names)}")
    if by_weight or without:
        line = f"adapters: {plural(len(chosen) + len(by_weight), 'linear layer')}"
        if by_weight:
            line += (
                f", of them {len(by_weight)} by their weights (PEFT reads their names as those of experts): "
                f"{_places(by_weight)}"
            )
        say(line + "".join(f"; none on {each}" for each in without), error=True)


def _places(names: Sequence[str]) -> str:
    """The kinds of layers among ``names``, four at most."""
    kinds = sorted({decoder.place(name) for name in names})
    return ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")


def _check_head(model: PeftModel) -> None:
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise _head_refused("the pattern matches the output head", model)


def _head_refused(what: str, model: nn.Module) -> UserError:
    return UserError(
        f"{what}, where an adapter would silently not train (the loss reads the head's weight directly); "
        f"remove it; linear layers: {', '.join(_linear_leaves(model))}",
        option="lora_target_modules",
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
    """The modules that hold the rows ``added``: the embedding, and the head where it is not tied to it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    rows = {names[id(embedding)]: added}
    if head is not None and head.weight is not embedding.weight:
        rows[names[id(head)]] = list(added)
    return rows


def to_float32(model: PeftModel) -> PeftModel:
    """Cast every trainable parameter of ``model`` to float32, in place, and return it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def show_head_bias(model: PeftModel) -> PeftModel:
    """Expose the head's bias ``[V]`` where PEFT wraps the head to train rows of it, and return ``model``.

    TRL's fused head reads ``weight`` and ``bias`` (trainer/utils.py:1633); PEFT 0.21's wrapper exposes the weight
    only.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        # Not through nn.Module.__setattr__, which would register the parameter a second time.
        object.__setattr__(head, "bias", head.original_module.bias)
    return model
