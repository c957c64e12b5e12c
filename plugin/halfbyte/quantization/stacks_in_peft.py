"""What PEFT makes of ``target_parameters`` in four bits: packed stacks of experts, and the weights of linear layers."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from halfbyte.quantization import experts

_OWN = BaseTuner._inject_parameters


@functools.cache
def install() -> None:
    """Have PEFT find ``target_parameters`` that are in four bits, in this process.

    Packed stacks are shown whole for as long as it looks: PEFT 0.21 finds a parameter that is parametrized by its
    module's full path alone, and not below one of its own wrappers: it would adapt no experts for a reference, or in
    another order than it loads them in over a 16-bit base. The packed weight of a linear layer it adapts by adapting
    the layer, and refuses a further adapter there. A layer that ``target_modules`` names too it refuses, as on a
    16-bit base.
    """
    BaseTuner._inject_parameters = _inject


@functools.wraps(_OWN)
def _inject(
    self: BaseTuner, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    targets = peft_config.target_parameters
    adapted = {
        target: [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, LoraLayer)
            and not isinstance(module, ParamWrapper)
            and (target == f"{path}.weight" or f"{path}.weight".endswith(f".{target}"))
        ]
        for target in targets
    }
    # PEFT's own search refuses a layer that has this adapter already: target_modules names it too.
    adapted = {
        target: layers if all(adapter_name not in layer.r for _, layer in layers) else []
        for target, layers in adapted.items()
    }
    # Once a layer, which two targets can name.
    for path, layer in {path: layer for layers in adapted.values() for path, layer in layers}.items():
        above, _, leaf = path.rpartition(".")
        parent = model.get_submodule(above)
        self._create_and_replace(peft_config, adapter_name, layer, leaf, parent, current_key=f"{path}.weight")
    peft_config.target_parameters = [target for target, layers in adapted.items() if not layers]
    try:
        with shown_whole(model):
            found = _OWN(self, peft_config, model, adapter_name, low_cpu_mem_usage)
    finally:
        peft_config.target_parameters = targets
    return [*(target for target, layers in adapted.items() if layers), *found]


@contextmanager
def shown_whole(model: nn.Module) -> Iterator[None]:
    """Have the packed stacks of ``model`` be parameters of their whole shape in this block, which may not read them."""
    hidden: list[tuple[nn.Module, type[nn.Module], Any]] = []
    for _, module, _ in list(experts.modules(model)):
        lists: Any = getattr(module, "parametrizations", None)
        if lists is None:
            continue
        hidden.append((module, type(module), lists))
        del module.parametrizations
        module.__class__ = type(module).__mro__[1]
        for name, each in lists.items():
            state = each.original.quant_state
            one = torch.zeros((), dtype=state.dtype, device=each.original.device)
            setattr(module, name, nn.Parameter(one.expand(tuple(state.shape)), requires_grad=False))
    try:
        yield
    finally:
        for module, cls, lists in hidden:
            for name in lists:
                delattr(module, name)
            module.parametrizations = lists
            module.__class__ = cls
