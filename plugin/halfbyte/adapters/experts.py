"""Adapters on experts, which PEFT adapts as parameters (``target_parameters``) and not as layers."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from halfbyte.adapters.targets import is_named
from halfbyte.errors import UserError
from halfbyte.terminal.wording import plural, suggestion

_GATES = re.compile(r"(^|\.)(\w*gate|router|wg)(\.|$)")

Shapes = Mapping[str, Sequence[int]]


def check_parameters(model: PreTrainedModel, config: LoraConfig, stacks: Shapes) -> None:
    """Raise :class:`UserError` for ``target_parameters`` that match nothing, or what has no adapter of its own.

    ``stacks`` are the shapes of the experts by the path of their parameter.
    """
    targets = config.target_parameters
    if not targets:
        return
    if config.lora_dropout:
        raise UserError("PEFT drops no inputs of a parameter; write `lora_dropout: 0`", option="lora_dropout")
    if config.use_dora:
        raise UserError("PEFT has no DoRA of a parameter; take it out", option="use_dora")
    if config.init_lora_weights == "eva":
        raise UserError(
            "EVA reads the inputs of layers, and a parameter has none; take it out",
            option="init_lora_weights",
        )
    holders = {path.rpartition(".")[0] for path in stacks}
    excluded = (
        [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules or ()
    )
    for name in sorted(excluded):
        if any(is_named(path, name) for path in holders):
            raise UserError(
                f"{name!r} are experts, and PEFT excludes layers alone; take their names out of lora_target_parameters",
                option="lora_exclude_modules",
            )
    paths = {*stacks, *_plain_parameters(model, holders)}
    names = sorted(
        {*short_names(stacks), *(path.rpartition(".")[0].rpartition(".")[2] for path in paths)} - {""}
    )
    for target in sorted(targets):
        if not any(is_named(path, target) for path in paths):
            known = ", ".join(short_names(stacks)) or "none: the model has no experts"
            raise UserError(
                f"{target!r} matches no parameter{suggestion(target, names)}; stacks of experts: {known}",
                option="lora_target_parameters",
            )


def check_names(model: PreTrainedModel, targets: Iterable[str], stacks: Shapes) -> None:
    """Raise :class:`UserError` for ``target_modules`` that PEFT reads as experts: no layer of that name is adapted."""
    taken = sorted(taken_for_experts(model, targets))
    if taken:
        raise UserError(
            f"on {model.config.model_type} PEFT reads {', '.join(taken)} as the experts, and gives no layer of that "
            f"name an adapter; take it out, and for the experts write "
            f"`lora_target_parameters: [{', '.join(short_names(stacks))}]`",
            option="lora_target_modules",
        )


def short_names(stacks: Iterable[str]) -> list[str]:
    """What to write for each kind of stack: the last two names of its path."""
    return sorted({".".join(path.split(".")[-2:]) for path in stacks})


def routers(linears: Mapping[str, Any], stacks: Shapes) -> set[str]:
    """The linear layers that decide how much of which expert a token gets."""
    found = set()
    for path, shape in stacks.items():
        block = path.rpartition(".")[0].rpartition(".")[0]
        for name, module in linears.items():
            inside = name.removeprefix(f"{block}.")
            width = getattr(module, "out_features", module.weight.shape[0])  # packed weights have no rows
            if inside != name and _GATES.search(inside) and width in (shape[0], 1):
                found.add(name)
    return found


def taken_for_experts(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The layers that PEFT would give no adapter: it reads their names as those of experts.

    PEFT 0.21 maps `gate_proj`, `up_proj` and `down_proj` of some architectures to the stacked experts, wherever they
    stand, so that adapters of transformers 4 still load: shared experts and dense layers lose theirs.
    """
    leaves: dict[str, bool] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        if leaf not in leaves:
            probe = LoraConfig(target_modules={leaf})
            try:
                convert_peft_config_for_transformers(probe, model, None)
            except ValueError:  # one of two that it reads together
                leaves[leaf] = True
            else:
                leaves[leaf] = leaf not in (probe.target_modules or ())
    return {name for name in names if leaves[name.rpartition(".")[2]]}


def no_weights(config: LoraConfig) -> str | None:
    """What to write so that PEFT can adapt weights as parameters, which ``config`` prevents; None if it does not."""
    if config.lora_dropout:
        return "`lora_dropout: 0`"
    if config.use_dora:
        return "`use_dora: false`"
    return "`init_lora_weights: default`" if config.init_lora_weights == "eva" else None


def target_weights(config: LoraConfig, layers: Iterable[str]) -> list[str]:
    """Add the weights of ``layers`` to the ``target_parameters`` of ``config``, and return the layers that were added.

    PEFT adapts a weight ``[out, in]`` as it does a layer, under the same names, and maps no name of a parameter. It
    looks for what is excluded among layers only, so that excluded ones are left out here.
    """
    excluded = config.exclude_modules or ()
    if isinstance(excluded, str):
        added = [name for name in layers if not re.fullmatch(excluded, name)]
    else:
        added = [name for name in layers if not is_named(name, *excluded)]
    config.target_parameters = [*(config.target_parameters or ()), *(f"{name}.weight" for name in added)]
    return added


def described(stacks: Shapes) -> str:
    """How many experts there are in how many layers, and how many weights they have."""
    layers = {path.rpartition(".")[0] for path in stacks}
    weights = sum(math.prod(shape) for shape in stacks.values())
    experts = max(shape[0] for shape in stacks.values())
    return f"the {experts} experts of {plural(len(layers), 'layer')} ({weights:,} weights)"


def _plain_parameters(model: PreTrainedModel, holders: set[str]) -> Iterable[str]:
    """The paths of parameters that are not a linear layer's or an embedding's: routers', for the most part.

    Beside their stacks the ``holders`` of experts have biases, which take no adapter.
    """
    for path, module in model.named_modules():
        if path not in holders and not isinstance(module, nn.Linear | nn.Embedding):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.dim() == 2:
                    yield f"{path}.{name}"
