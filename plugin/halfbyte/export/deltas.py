"""Saved adapters, merged into one parameter of their base at a time: PEFT computes each update on that layer alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.adapters import REFUSED_INITIALIZATIONS
from halfbyte.adapters import config as saved
from halfbyte.adapters.targets import is_named
from halfbyte.adapters.tensors import check_tensors
from halfbyte.errors import UserError
from halfbyte.export.stacked import Experts, module_at

_PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"
_RESIZED = ("base_layer.weight", "token_adapter.base_layer.weight")  # an embedding that grew, saved whole


class Deltas:
    """What the adapters in ``directories`` change, each by its weight of ``weights``.

    Several are combined as PEFT's ``add_weighted_adapter`` does by ``combination``; `cat` is the sum of the updates.
    ``stacks`` are the shapes of the base's experts by path.
    """

    def __init__(
        self,
        directories: Sequence[Path],
        weights: Sequence[float] | None = None,
        combination: str = "cat",
        stacks: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        self._adapters = [_Saved(path, stacks) for path in directories]
        self._weights = list(weights) if weights is not None else [1.0] * len(self._adapters)
        self._combination, self._stacks = combination, stacks
        if self.combines and any(each.config.use_dora for each in self._adapters):
            raise UserError(
                "DoRA adapters change the norm of a weight, and cannot be weighed or added; merge one"
            )
        if self._combination != "cat" and any(each.config.target_parameters for each in self._adapters):
            raise UserError(
                "adapters on experts are added up; write `cat`, or merge one", option="--combination_type"
            )

    @property
    def combines(self) -> bool:
        """Whether this is another update than that of one adapter as it was trained."""
        return self._weights != [1.0]

    @property
    def unused(self) -> list[str]:
        """Tensors of the adapters that no parameter of the base has taken."""
        return sorted(f"{each.directory}: {name}" for each in self._adapters for name in each.left)

    def of(self, parameter: str) -> bool:
        """Whether an adapter changes ``parameter``."""
        return any(True for each in self._adapters for _ in each.names(parameter))

    def part(self, head: str, embedding: str) -> bool:
        """Whether the adapters change one of two tied parameters only, so that they are no longer equal.

        Trained rows of tokens, and an embedding that grew, PEFT has in both.
        """
        return any(each.is_own(name) for each in self._adapters for name in (head, embedding))

    def take(self, parameter: str) -> None:
        """Count what is saved of ``parameter`` as used: a tied head has what the embedding has."""
        for each in self._adapters:
            each.left -= set(each.names(parameter))

    def apply(self, parameter: str, weight: Tensor, module: nn.Module) -> Tensor:
        """Return ``weight``, float32, of ``module``'s ``parameter`` with what the adapters change in it.

        ``module`` says the kind of layer; its own weights are not read. A weight that an adapter saves whole takes the
        place of the base's. Raises :class:`UserError` where two adapters do so.
        """
        whole = [value for each in self._adapters if (value := each.whole(parameter)) is not None]
        rows = [found for each in self._adapters if (found := each.rows(parameter)) is not None]
        if len(whole) > 1 or len(rows) > 1:
            raise UserError(f"several adapters have {parameter} whole; merge one of them")
        weight = whole[0].float() if whole else weight
        factors = {
            str(number): (each.config, factors)
            for number, each in enumerate(self._adapters)
            if (factors := each.factors(parameter))
        }
        if factors and parameter in self._stacks:
            for number, (_, tensors) in factors.items():
                update = self._adapters[int(number)].experts.update(parameter, tensors, module)
                weight = weight + self._weights[int(number)] * update
        elif factors:
            weight = self._merged(parameter, weight, module, factors)
        for indices, values in rows:
            weight = weight.index_copy(0, torch.tensor(indices), values.float())
        return weight

    def _merged(
        self,
        parameter: str,
        weight: Tensor,
        module: nn.Module,
        factors: Mapping[str, tuple[LoraConfig, dict[str, Tensor]]],
    ) -> Tensor:
        path = parameter.removesuffix(".weight")
        transposed = isinstance(module, Conv1D)
        model = _one_layer(path, weight.T if transposed else weight, embeds=isinstance(module, nn.Embedding))
        peft: PeftModel | None = None
        for name, (config, tensors) in factors.items():
            own = _for_layer(config, path)
            if peft is None:
                peft = get_peft_model(model, own, adapter_name=name)
            else:
                peft.add_adapter(name, own)
            set_peft_model_state_dict(peft, tensors, adapter_name=name)
        assert peft is not None
        names = list(factors)
        if self.combines:
            weights = [self._weights[int(name)] for name in names]
            lora: Any = peft.base_model
            lora.add_weighted_adapter(names, weights, "merged", combination_type=self._combination)
            names = ["merged"]
        layer: Any = next(each for each in peft.modules() if isinstance(each, LoraLayer))
        layer.merge(safe_merge=True, adapter_names=names)
        found: Tensor = layer.get_base_layer().weight.detach()
        return found.T if transposed else found


class _Saved:
    """One adapter's configuration, and its tensors that have not been taken yet."""

    def __init__(self, directory: Path, stacks: Mapping[str, Sequence[int]]) -> None:
        check_tensors(str(directory), saved.read(str(directory)))
        self._file = directory / SAFETENSORS_WEIGHTS_NAME
        if not self._file.is_file():
            raise UserError(
                f"{directory} has its weights in PyTorch's own format; save the adapter again with PEFT"
            )
        config = PeftConfig.from_pretrained(str(directory))
        if not isinstance(config, LoraConfig):
            raise UserError(
                f"{directory} is an adapter of PEFT's {config.peft_type}; LoRA adapters are merged"
            )
        begun = str(config.init_lora_weights)
        if any(begun.startswith(name) for name in REFUSED_INITIALIZATIONS):
            raise UserError(
                f"{directory} began with {begun!r}, which changes the base; merge it where it was trained"
            )
        self.directory, self.config = directory, config
        self.experts = Experts(config, stacks)
        with safe_open(self._file, framework="pt") as file:
            self.left = set(file.keys())

    def names(self, parameter: str) -> Iterator[str]:
        path, _, last = parameter.rpartition(".")
        yield from (name for name in self.left if name == f"{_PREFIX}{parameter}")
        yield from self.experts.names(parameter, self.left)
        if last == "weight":
            start = f"{_PREFIX}{path}."
            yield from (
                name
                for name in self.left
                if name.startswith(start)
                and name.removeprefix(start).startswith(("lora_", "token_adapter.", "base_layer.weight"))
            )

    def is_own(self, parameter: str) -> bool:
        """Whether this parameter alone is changed, though it is tied to another."""
        path = parameter.removesuffix(".weight")
        shared = {f"{_PREFIX}{path}.{name}" for name in (*_RESIZED, _ROWS)}
        own = set(self.names(parameter)) - shared
        return bool(own) and not getattr(self.config, "ensure_weight_tying", False)

    def whole(self, parameter: str) -> Tensor | None:
        path = parameter.removesuffix(".weight")
        candidates = [f"{_PREFIX}{parameter}", *(f"{_PREFIX}{path}.{name}" for name in _RESIZED)]
        name = next((name for name in candidates if name in self.left), None)
        return self._take(name) if name is not None else None

    def rows(self, parameter: str) -> tuple[list[int], Tensor] | None:
        path = parameter.removesuffix(".weight")
        name = f"{_PREFIX}{path}.{_ROWS}"
        if name not in self.left:
            return None
        indices = self.config.trainable_token_indices
        if isinstance(indices, dict):
            indices = next(found for key, found in indices.items() if is_named(path, key))
        return list(indices or []), self._take(name)

    def factors(self, parameter: str) -> dict[str, Tensor]:
        start = f"{_PREFIX}{parameter.removesuffix('.weight')}.lora_"
        names = list(self.experts.names(parameter, self.left))
        if parameter.endswith(".weight"):
            names += [name for name in self.left if name.startswith(start)]
        return {name: self._take(name).float() for name in sorted(names)}

    def _take(self, name: str) -> Tensor:
        self.left.discard(name)
        with safe_open(self._file, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found


def _one_layer(path: str, weight: Tensor, *, embeds: bool) -> nn.Module:
    """A model of one layer at ``path``, which PEFT finds by its name; biases are not merged into."""
    if embeds:
        layer: nn.Module = nn.Embedding.from_pretrained(weight)
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return module_at(path, layer)


def _for_layer(config: LoraConfig, path: str) -> LoraConfig:
    """``config`` for the one layer at ``path``: its rank, scale and kind, found as in the whole model."""
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=[path],
    )
