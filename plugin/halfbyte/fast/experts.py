"""The experts of a layer as one autograd function.

    y_t = sum over the experts e of token t:  g_te (D_e act(U_e x_t)),   U_e, D_e with the LoRA of the expert

transformers dequantizes all experts of a layer for a pass, and PEFT adds a dense update to each; autograd keeps both
until the backward. Here nothing dequantized outlives its products, and an adapter is two thin products. Experts are
dequantized one at a time (:mod:`halfbyte.fast.looped_experts`), on a GPU in bfloat16 one stack at a time
(:mod:`halfbyte.fast.grouped_experts`). Tokens x are ``[N, H]``, routing weights g and indices ``[N, K]``; E experts,
width F.
"""

from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from halfbyte.errors import UserError
from halfbyte.fast import grouped_experts, looped_experts
from halfbyte.fast.expert_maps import Activation, ExpertAdapter, Gradients, Map, Pass
from halfbyte.quantization import experts


def within(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield every module of experts in ``model``, packed or not: its path, what is called there, and the module itself.

    PEFT's outermost wrapper is called for a module with adapters, else the module.
    """
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        held = module
        while isinstance(held, ParamWrapper):
            held = held.base_layer
            inside.add(held)
        if module not in inside and experts.names_of(held):
            yield path, module, held


def is_fused(module: nn.Module) -> bool:
    """Whether ``module``, experts or PEFT's wrapper of them, runs fused."""
    return isinstance(module.__dict__.get("forward"), ExpertsForward)


def fuse(module: nn.Module, held: nn.Module) -> bool:
    """Run the experts ``held``, which are called as ``module``, fused from now on; return whether they are covered.

    Only the instance's ``forward`` changes.
    """
    if not _is_covered(held):
        return False
    module.forward = ExpertsForward(module, held)
    return True


def require(model: nn.Module) -> None:
    """Fuse every module of experts in ``model`` that has adapters on packed stacks.

    PEFT's own forward is wrong there: it leaves its update on a parameter that is parametrized already (peft 0.21,
    ``ParamWrapper._remove_parametrizations``), once more at every call. Raises :class:`UserError` for experts that the
    fused form does not cover.
    """
    for path, module, held in within(model):
        if not isinstance(module, ParamWrapper) or experts.packed(held, module.parameter_name) is None:
            continue
        if not fuse(module, held):
            # Stacks are parametrizations, which have a class of their own; on meta they are not packed.
            cls = next(each for each in type(held).__mro__ if not each.__name__.startswith("Parametrized"))
            raise UserError(
                f"{path}: {cls.__name__} computes its experts in a way of its own, and adapters on "
                "them would not be right in 4 bits; take it out",
                option="lora_target_parameters",
            )


def unfuse(module: nn.Module) -> None:
    """Undo :func:`fuse` where transformers' own forward is right: not with adapters, see :func:`require`."""
    if is_fused(module) and not isinstance(module, ParamWrapper):
        del module.forward


def _first(held: nn.Module) -> str:
    """The name of the stack of ``held`` that is applied first."""
    return "gate_up_proj" if held.has_gate else "up_proj"


def _is_covered(held: nn.Module) -> bool:
    """Whether ``held`` is as transformers' own implementations of experts require, and packed."""
    return (
        hasattr(held, "is_transposed")
        and not held.has_post_expert_norm
        and all(experts.packed(held, name) is not None for name in (_first(held), "down_proj"))
    )


class ExpertsForward:
    """The ``forward`` of fused experts; ``module`` is they themselves, or PEFT's wrapper around them."""

    def __init__(self, module: nn.Module, held: nn.Module) -> None:
        self.module, self.held = module, held

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``[N, H]`` for tokens ``[N, H]``, their experts' indices and weights, both ``[N, K]``."""
        maps = self._maps()
        index, weights = args if not kwargs else (*args, *kwargs.values())
        parameters = [parameter for each in maps for parameter in each.parameters()]
        way = grouped_experts if grouped_experts.is_used(hidden_states.device, maps) else looped_experts
        result: Tensor = _Experts.apply(
            hidden_states, weights, index, way, maps, Activation(self.held), *parameters
        )
        return result

    def _maps(self) -> tuple[Map, Map]:
        """The two maps with the adapters that are active now.

        Raises ValueError for merged adapters, which PEFT adds to a copy of packed weights, and for several at a time.
        """
        adapters: dict[str, ExpertAdapter] = {}
        module: Any = self.module
        while isinstance(module, ParamWrapper):
            if module.merged:
                raise ValueError("adapters on packed experts cannot be merged in place; use `halfbyte merge`")
            active = [name for name in module.active_adapters if name in module.lora_A]
            if len(active) > 1:
                raise ValueError(
                    f"packed experts take one adapter at a time, and {', '.join(active)} are active"
                )
            if active and not module.disable_adapters:
                name = active[0]
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                adapters[module.parameter_name] = ExpertAdapter(
                    a, b, module.scaling[name], module.num_experts
                )
            module = module.base_layer
        first = _first(module)
        assert adapters.keys() <= {first, "down_proj"}, adapters.keys()
        return Map(module, first, adapters.get(first)), Map(module, "down_proj", adapters.get("down_proj"))


class _Experts(torch.autograd.Function):
    """Tokens, routing weights and adapters in, the weighted sums out, computed by the module ``way``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        index: Tensor,
        way: ModuleType,
        maps: tuple[Map, Map],
        activation: Activation,
        *parameters: Tensor,
    ) -> Tensor:
        x, flat = hidden.to(maps[0].dtype), weights.reshape(-1).float()
        with torch.autocast(x.device.type, enabled=False):
            result, kept = way.forward(x, index, flat, maps, activation)
        ctx.save_for_backward(*vars(kept).values(), *parameters)
        ctx.way, ctx.maps, ctx.activation = way, maps, activation
        ctx.dtypes = hidden.dtype, weights.dtype
        return result.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = Pass(*ctx.saved_tensors[: len(fields(Pass))])
        with torch.autocast(grad.device.type, enabled=False):
            found: Gradients = ctx.way.backward(grad, kept, ctx.maps, ctx.activation)
        hidden_dtype, weights_dtype = ctx.dtypes
        routing = found.weights.view(kept.index.shape).to(weights_dtype)
        return found.x.to(hidden_dtype), routing, None, None, None, None, *found.up, *found.down
