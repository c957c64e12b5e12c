"""What saved adapters change in stacks of experts: PEFT computes each update, on parameters of their shape alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from halfbyte.adapters.targets import is_named

_PREFIX = "base_model.model."
_WRAPPED = "base_layer."


class Experts:
    """The stacks of a model, ``shapes`` by the path of their parameters, as one adapter of ``config`` targets them."""

    def __init__(self, config: LoraConfig, shapes: Mapping[str, Sequence[int]]) -> None:
        self._config, self._shapes = config, shapes

    def names(self, parameter: str, saved: set[str]) -> Iterator[str]:
        """The tensors among ``saved`` that adapt ``parameter``: PEFT nests the wrappers of one module."""
        if not self._is_target(parameter):
            return
        path = parameter.rpartition(".")[0]
        siblings = self._targets(path)
        inner = _WRAPPED * (len(siblings) - 1 - siblings.index(parameter))
        start = f"{_PREFIX}{path}.{inner}lora_"
        yield from (name for name in saved if name.startswith(start))

    def update(self, parameter: str, tensors: Mapping[str, Tensor], module: Any) -> Tensor:
        """Return what ``tensors`` add to ``parameter`` of ``module``, float32 in its shape."""
        path, _, leaf = parameter.rpartition(".")
        root = module_at(
            path, _Held({leaf: self._shapes[parameter]}, getattr(module, "is_transposed", False))
        )
        config = self._config
        only = LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, rank_pattern=config.rank_pattern,
            alpha_pattern=config.alpha_pattern, use_rslora=config.use_rslora, target_modules=[],
            target_parameters=[parameter],
        )  # fmt: skip
        peft = get_peft_model(root, only)
        set_peft_model_state_dict(
            peft, {name.replace(f".{_WRAPPED}", "."): tensor for name, tensor in tensors.items()}
        )
        wrapper = next(each for each in peft.modules() if isinstance(each, ParamWrapper))
        found: Tensor = wrapper.get_delta_weight("default").detach()
        return found

    def _targets(self, path: str) -> list[str]:
        return [name for name in self._shapes if name.rpartition(".")[0] == path and self._is_target(name)]

    def _is_target(self, parameter: str) -> bool:
        targets = self._config.target_parameters or ()
        return parameter in self._shapes and is_named(parameter, *targets)


class _Held(nn.Module):
    """Parameters of these shapes without storage of their own."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        for name, shape in shapes.items():
            self.register_parameter(
                name, nn.Parameter(torch.zeros(()).expand(tuple(shape)), requires_grad=False)
            )


def module_at(path: str, module: nn.Module) -> nn.Module:
    """A model that has ``module`` alone, at ``path``, where PEFT finds it by its name."""
    *above, name = path.split(".")
    root = model = nn.Module()
    for part in above:
        model.add_module(part, nn.Module())
        model = getattr(model, part)
    model.add_module(name, module)
    return root
