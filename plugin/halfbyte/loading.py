"""A base in four bits with its adapter, loaded for this rank: settings and decisions in, one value out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import get_peft_config, get_quantization_config

from halfbyte import adapters, data, distributed, quantization
from halfbyte.adapters import config as saved
from halfbyte.distributed import fsdp2
from halfbyte.errors import UserError
from halfbyte.fast import experts, stand_in
from halfbyte.model_options import ModelOptions
from halfbyte.quantization import Coverage
from halfbyte.resolve import Decisions
from halfbyte.task import by_peft_type
from halfbyte.terminal.wording import say

# Bytes of weights that take longer to load than their model on meta takes to make, a second for the largest.
_LONG = 2**30


@dataclass(frozen=True)
class Loaded:
    """A base on this rank's device, with its adapter if there is one, and how much of it is in four bits."""

    model: PreTrainedModel | PeftModel
    coverage: Coverage


def load(
    options: ModelOptions,
    decisions: Decisions,
    *,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    added_token_ids: Iterable[int] = (),
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load the base that ``decisions`` name for this rank: quantized, adapters on in float32.

    With ``tokenizer`` the embeddings grow where its vocabulary is larger. Without ``use_peft`` all of the model's
    weights are trained, in float32. Raises :class:`UserError` for a checkpoint or adapter that does not fit.
    """
    adapter, revision = decisions.adapter, decisions.revision
    added_token_ids = list(added_token_ids)
    quantization.require(decisions.base, revision)
    if adapter is not None:
        _check_saved(options, decisions, adapter, added_token_ids)
    _check_sharded(options, adapter, added_token_ids)
    init_kwargs = _init_kwargs(options, model_init_kwargs)
    if (quantization.weight_bytes(decisions.base, revision) or _LONG) >= _LONG:
        _check_ahead(options, decisions, trust_remote_code, init_kwargs)
    base, coverage = _load_base(options, decisions, trust_remote_code, init_kwargs)
    _grow(base, tokenizer)
    if not options.use_peft:
        return Loaded(base, coverage)
    if adapter is not None:
        # Again: a base that was not on this machine has a fingerprint now.
        adapters.same_base(
            adapter, decisions.base, revision, quantization.fingerprint(decisions.base, revision)
        )
        model = adapters.continue_from(base, adapter)
    else:
        model = adapters.attach(
            base,
            lora_config(options),
            initialization=options.init_lora_weights,
            added_token_ids=added_token_ids,
            stacks=quantization.stacks_of(base),
        )
    experts.require(model)
    return Loaded(model, coverage)


def planned(
    options: ModelOptions,
    decisions: Decisions,
    *,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    added_token_ids: Iterable[int] = (),
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> Loaded:
    """Return what :func:`load` would, without weights and on meta, and raise :class:`UserError` as it does.

    The base's configuration is all that is read.
    """
    if decisions.adapter is not None:
        _check_saved(options, decisions, decisions.adapter, list(added_token_ids))
    _check_sharded(options, decisions.adapter, list(added_token_ids))
    base = _on_meta(options, decisions, trust_remote_code, _init_kwargs(options, model_init_kwargs))
    coverage = _covered(options, base)
    say(*coverage.parts(), error=True)
    _grow(base, tokenizer)
    model: PreTrainedModel | PeftModel = base
    if options.use_peft:
        with torch.device("meta"), quantization.shown_dense(base):
            if decisions.adapter is not None:
                model = adapters.continue_from(base, decisions.adapter, planned=True)
            else:
                model = adapters.attach(
                    base,
                    lora_config(options),
                    added_token_ids=list(added_token_ids),
                    stacks=quantization.stacks_of(base),
                    shown_by=stand_in.made(base),
                )
        experts.require(model)
    model.__class__ = type(type(model).__name__, (_Weightless, type(model)), {})
    return Loaded(model, coverage)


def _init_kwargs(options: ModelOptions, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of ``from_pretrained``: those ``given`` as ``model_init_kwargs``, and the option that is one."""
    attention = options.attn_implementation
    return {**(given or {}), **({} if attention is None else {"attn_implementation": attention})}


def _on_meta(
    options: ModelOptions, decisions: Decisions, trust_remote_code: bool, init_kwargs: dict[str, Any]
) -> PreTrainedModel:
    dtype = getattr(torch, decisions.dtype) if options.use_peft else torch.float32
    attention = None
    if decisions.device.type == "cuda" and not torch.cuda.is_available():
        # transformers refuses the kernels of a GPU where there is none: a run that is planned here has it.
        init_kwargs = dict(init_kwargs)
        attention = init_kwargs.pop("attn_implementation", None)
    base = quantization.planned(
        decisions.base,
        quantization=_quantization_config(options, decisions, dtype),
        dtype=dtype,
        revision=decisions.revision,
        trust_remote_code=trust_remote_code,
        task=by_peft_type(options.lora_task_type),
        entire=not options.use_peft,
        **init_kwargs,
    )
    if attention is not None:
        base.config._attn_implementation = attention
    return base


class _Weightless:
    """What a model on meta does where a trainer would move it, or give it another adapter."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model: it has nothing to move."""
        return self

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Add the adapter where the model is."""
        model: Any = self
        with torch.device("meta"), quantization.shown_dense(model):
            return super().add_adapter(*args, **kwargs)  # type: ignore[misc]


def lora_config(options: ModelOptions) -> LoraConfig:
    """The PEFT configuration of a fresh adapter."""
    config = get_peft_config(options)
    targets = config.target_modules
    if isinstance(targets, str) and targets.isidentifier():
        # TRL makes a list of one a string, which PEFT would read as a pattern for whole module paths.
        config.target_modules = {targets}
    if options.lora_exclude_modules:
        config.exclude_modules = set(options.lora_exclude_modules)
    config.revision = options.model_revision if options.model_revision != "main" else None
    return config


def load_tokenizer(
    options: ModelOptions, decisions: Decisions, args: Any
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Load the tokenizer of the adapter to start from, else of the base, with its chat template in place.

    ``args`` is the trainer's config. Returns the tokenizer with the ids of the tokens that were added by name
    (``additional_special_tokens``). Raises :class:`UserError` if ``chat_template_path`` contradicts the template that
    an adapter was trained with.
    """
    quantization.require(decisions.base, decisions.revision)
    adapter = decisions.adapter
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer, added = data.prepare_tokenizer(
        str(adapter) if own else decisions.base,
        revision="main" if own else decisions.revision,
        trust_remote_code=getattr(args, "trust_remote_code", False),
        training=args,
        additional_special_tokens=options.additional_special_tokens,
    )
    if own:
        adapters.same_template(str(adapter), tokenizer, getattr(args, "chat_template_path", None))
    if adapter is not None:
        adapters.same_tokenizer(adapter, tokenizer)
    return tokenizer, added


def _check_saved(
    options: ModelOptions, decisions: Decisions, adapter: str, added_token_ids: list[int]
) -> None:
    """Raise :class:`UserError` for what a saved adapter would silently not do; before the base is loaded."""
    if not options.use_peft:
        raise UserError(
            f"false trains the base without the adapter {adapter!r}; take one of the two out",
            option="use_peft",
        )
    if added_token_ids:
        raise UserError(
            f"the adapter {adapter!r} was trained without them, and their rows would stay as they are; name them "
            f"where the adapter is made, or start a fresh one",
            option="additional_special_tokens",
        )
    adapters.same_task(adapter, by_peft_type(options.lora_task_type))
    sha = quantization.fingerprint(decisions.base, decisions.revision)
    adapters.same_base(adapter, decisions.base, decisions.revision, sha)


def _check_sharded(options: ModelOptions, adapter: str | None, added_token_ids: list[int]) -> None:
    """Raise :class:`UserError` for an adapter, fresh or saved, that is not supported on a sharded base."""
    rows, dora = bool(added_token_ids), options.use_dora
    if adapter is not None:
        made = saved.read(adapter)
        rows, dora = bool(made.get("trainable_token_indices")), bool(made.get("use_dora"))
    if options.use_peft:
        distributed.check_adapters(rows=rows, dora=dora)


def _check_ahead(
    options: ModelOptions, decisions: Decisions, trust_remote_code: bool, init_kwargs: dict[str, Any]
) -> None:
    """Raise :class:`UserError` for what the base's configuration alone decides, before its weights are loaded."""
    try:
        with torch.random.fork_rng(devices=[]):
            base = _on_meta(options, decisions, trust_remote_code, init_kwargs)
    except Exception:  # loading says what is wrong with it
        return
    _covered(options, base)
    if options.use_peft and decisions.adapter is None:
        adapters.check_targets(base, lora_config(options), quantization.stacks_of(base))


def _load_base(
    options: ModelOptions, decisions: Decisions, trust_remote_code: bool, init_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, Coverage]:
    # Full-parameter training keeps its master weights in float32.
    dtype = getattr(torch, decisions.dtype) if options.use_peft else torch.float32
    base = quantization.load_base(
        decisions.base,
        quantization=_quantization_config(options, decisions, dtype),
        dtype=dtype,
        device=decisions.device,
        revision=decisions.revision,
        trust_remote_code=trust_remote_code,
        task=by_peft_type(options.lora_task_type),
        entire=not options.use_peft,
        **init_kwargs,
    )
    if fsdp2.requested():
        fsdp2.check_base(base, dtype)
    coverage = _covered(options, base)
    say(*coverage.parts(), error=True)
    return base, coverage


def _covered(options: ModelOptions, base: PreTrainedModel) -> Coverage:
    """Return how much of ``base`` is in four bits.

    Raises :class:`UserError` if it is too little, and for experts that would stay in 16 bits or cannot be sharded.
    """
    stacks = quantization.stacks_of(base)
    if options.load_in_8bit and stacks:
        raise UserError("experts would stay in 16 bits; write `load_in_4bit: true`", option="load_in_8bit")
    coverage = quantization.measure_coverage(base)
    if options.load_in_4bit:
        distributed.check_experts(stacks)
        coverage.require()
    return coverage


def _grow(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Grow the embeddings of ``base`` where the vocabulary of ``tokenizer`` is larger."""
    if tokenizer is not None and len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        # Mean resizing draws at random: the new rows must be the same on every rank and after a reload.
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def _quantization_config(
    options: ModelOptions, decisions: Decisions, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    config = get_quantization_config(options)
    if config is not None and config.load_in_4bit:
        config.bnb_4bit_compute_dtype = dtype
        if fsdp2.requested():
            fsdp2.install()
            config.bnb_4bit_quant_storage = getattr(torch, decisions.quant_storage or "uint8")
    return config
