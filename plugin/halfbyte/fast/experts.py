"""The experts of a layer as one autograd function: their packed weights are dequantized one expert at a time.

    y_t = sum over the experts e of token t:  g_te (D_e act(U_e x_t)),   U_e, D_e with the LoRA of the expert

transformers dequantizes all experts of a layer for a pass, and PEFT adds a dense update to each; autograd keeps both
until the backward. Here an expert that no token reaches is not read, nothing dequantized outlives its expert, and an
adapter is two thin products. Tokens x are ``[N, H]``, routing weights g and indices ``[N, K]``; E experts, width F.
On a GPU in bfloat16 one stack is dequantized at a time: :mod:`halfbyte.fast.grouped_experts`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from halfbyte.errors import UserError
from halfbyte.fast import grouped_experts
from halfbyte.fast.expert_maps import Activation, ExpertAdapter, Map
from halfbyte.quantization import experts

_ROWS = 64


def fuse(module: nn.Module) -> bool:
    """Compute the experts that ``module`` is, or wraps for PEFT, fused from now on; return whether they are covered.

    Only the instance's ``forward`` changes.
    """
    held = _experts(module)
    if held is None or not _is_covered(held):
        return False
    module.forward = ExpertsForward(module, held)
    return True


def require(model: nn.Module) -> None:
    """Fuse every module of experts in ``model`` that has adapters on packed stacks.

    PEFT's own forward is wrong there: it leaves its update on a parameter that is parametrized already (peft 0.21,
    ``ParamWrapper._remove_parametrizations``), once more at every call. Raises :class:`UserError` for experts that the
    fused form does not cover.
    """
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or module in inside:
            continue
        inside.add(module.base_layer)
        held = _experts(module)
        if held is None or experts.packed(held, module.parameter_name) is None or fuse(module):
            continue
        raise UserError(
            f"{name}: {type(held).__mro__[1].__name__} computes its experts in a way of its own, and adapters on them "
            "would not be right in 4 bits; take it out",
            option="lora_target_parameters",
        )


def unfuse(module: nn.Module) -> None:
    """Undo :func:`fuse` where transformers' own forward is right: not with adapters, see :func:`require`."""
    if not isinstance(module, ParamWrapper) and isinstance(module.__dict__.get("forward"), ExpertsForward):
        del module.forward


def _experts(module: nn.Module) -> nn.Module | None:
    """The module of experts under ``module``, if that is one or PEFT's outermost wrapper of one."""
    held = module
    while isinstance(held, ParamWrapper):
        held = held.base_layer
    return held if experts.names_of(held) else None


def _is_covered(held: nn.Module) -> bool:
    """Whether ``held`` is as transformers' own implementations of experts require, and packed."""
    names = ("gate_up_proj" if getattr(held, "has_gate", False) else "up_proj", "down_proj")
    return (
        hasattr(held, "is_transposed")
        and not held.has_post_expert_norm
        and all(experts.packed(held, name) is not None for name in names)
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
        grouped = grouped_experts.is_used(hidden_states.device, maps)
        function = grouped_experts.GroupedExperts if grouped else _Experts
        result: Tensor = function.apply(
            hidden_states, weights, index, maps, Activation(self.held), *parameters
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
        first = "gate_up_proj" if module.has_gate else "up_proj"
        assert adapters.keys() <= {first, "down_proj"}, adapters.keys()
        return Map(module, first, adapters.get(first)), Map(module, "down_proj", adapters.get("down_proj"))


class _Experts(torch.autograd.Function):
    """Tokens, routing weights and adapters in, the weighted sums out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weights: Tensor,
        index: Tensor,
        maps: tuple[Map, Map],
        activation: Activation,
        *parameters: Tensor,
    ) -> Tensor:
        up, down = maps
        up_weights, down_weights = up.read(), down.read()
        dtype = up.dtype
        x = hidden.to(dtype)
        order, counts = _by_expert(index, up.experts)
        flat, tokens = weights.reshape(-1).float(), order // weights.shape[1]
        kept = x.new_empty(len(order), up_weights.outputs)
        result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for expert, rows in _reached(counts):
                mine, count = tokens[rows], rows.stop - rows.start
                inner = up.forward(_rows(x, mine), expert, up_weights.of(expert, dtype))
                kept[rows] = inner[:count]
                y = down.forward(activation.forward(inner), expert, down_weights.of(expert, dtype))
                result.index_add_(0, mine, y[:count] * flat[order[rows], None])
        ctx.save_for_backward(x, flat, order, kept, *parameters)
        ctx.counts, ctx.maps, ctx.activation = counts, maps, activation
        ctx.dtypes, ctx.routed = (hidden.dtype, weights.dtype), weights.shape
        return result.to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, flat, order, kept, *_ = ctx.saved_tensors
        up, down = ctx.maps
        tokens = order // ctx.routed[1]
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        dweights = torch.zeros_like(flat)
        gradients = up.gradients(), down.gradients()
        up_weights, down_weights = up.read(), down.read()
        with torch.autocast(x.device.type, enabled=False):
            for expert, rows in _reached(ctx.counts):
                mine, here, count = tokens[rows], order[rows], rows.stop - rows.start
                inner, dy = _rows(kept, rows), _rows(grad, mine).to(x.dtype)
                share = _rows(flat[:, None], here).to(x.dtype)
                activations = ctx.activation.forward(inner)
                # The weights g are left out of dy and put into what it meets, so that <dy, y> = <D' dy, a> + <dy, b>.
                weight = down_weights.of(expert, x.dtype)
                dactivations = down.backward(dy, activations * share, expert, weight, gradients[1])
                dweights[here] = torch.linalg.vecdot(dactivations.float(), activations.float())[:count]
                if down.bias is not None:
                    dweights[here] += torch.mv(dy.float(), down.bias[expert].float())[:count]
                dinner = ctx.activation.backward(dactivations.mul_(share), inner)
                weight = up_weights.of(expert, x.dtype)
                part = up.backward(dinner, _rows(x, mine), expert, weight, gradients[0])
                dx.index_add_(0, mine, part[:count].float())
        hidden_dtype, weights_dtype = ctx.dtypes
        routing = dweights.view(ctx.routed).to(weights_dtype)
        return dx.to(hidden_dtype), routing, None, None, None, *gradients[0], *gradients[1]


def _rows(tensor: Tensor, at: Tensor | slice) -> Tensor:
    """The rows ``at`` of ``tensor``, on a CPU with zeros behind them up to a number that few products have.

    oneDNN compiles and keeps a kernel for every shape, and the tokens of an expert are of another number every time.
    """
    found = tensor[at]
    if found.is_cuda:
        return found
    count = len(found)
    padded = max(8, 1 << (count - 1).bit_length()) if count < _ROWS else -(-count // _ROWS) * _ROWS
    return functional.pad(found, (0, 0, 0, padded - count))


def _by_expert(index: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Return the places in ``index`` ``[N, K]``, flattened, ordered by expert, and how many each expert has."""
    flat = index.reshape(-1)
    counts: list[int] = torch.bincount(flat, minlength=experts)[:experts].tolist()
    return torch.argsort(flat, stable=True), counts


def _reached(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has tokens, with its rows among those that are ordered by expert."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count
