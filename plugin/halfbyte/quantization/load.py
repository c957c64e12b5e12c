"""Load a base model for this rank: quantized on the way in, or as it was quantized before."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file

from halfbyte import store
from halfbyte.errors import UserError
from halfbyte.quantization import stored
from halfbyte.task import CAUSAL_LM, Task
from halfbyte.wording import first_line


def load_base(
    name_or_path: str,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    revision: str = "main",
    trust_remote_code: bool = False,
    task: Task = CAUSAL_LM,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """Load a 16-bit or pre-quantized checkpoint onto ``device`` and make it safe to train on.

    ``quantization`` says how to quantize a 16-bit checkpoint; one that is quantized already keeps its own
    quantization, which must be bitsandbytes' 4-bit, and only its compute dtype is replaced by ``dtype``. torch's
    random generators are left as they were: some architectures draw while they load, and another count from the store.

    Raises :class:`UserError` when the checkpoint is missing, is in another quantization format, or requires code of
    its own without ``trust_remote_code``.
    """
    if quantization is not None and task.unquantized:
        # A new head is trained from scratch: four bits would freeze it.
        quantization.llm_int8_skip_modules = list(task.unquantized)
    options = {**task.model_kwargs, **model_init_kwargs}
    with _refused(name_or_path), _random_state_kept(device):
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
        own = _own_quantization(config)
        _check_own_quantization(name_or_path, own, quantization)
        making = quantization if own is None else None

        def load(
            source: str | Path, *, revision: str = "main", to: torch.device = device, **more: Any
        ) -> PreTrainedModel:
            return getattr(transformers, task.auto_class).from_pretrained(
                source,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                # Under gloo accelerate numbers even the CPU, which as a device map would mean a GPU.
                # Under ZeRO-3 transformers takes no device map, and loads onto this rank's device by itself.
                device_map=None if is_deepspeed_zero3_enabled() else {"": "cpu" if to.type == "cpu" else to},
                **options,
                **more,
            )

        def make() -> PreTrainedModel:
            if making is None:
                return load(name_or_path, revision=revision)
            return load(name_or_path, revision=revision, quantization_config=making)

        def reload(entry: Path, to: torch.device = device) -> PreTrainedModel:
            return load(entry, to=to)

        # What else could change the model's bytes is not in the store's key. Under ZeRO-3 a loaded base is
        # partitioned already: no rank has it whole to keep.
        plain = task is CAUSAL_LM and not (trust_remote_code or is_deepspeed_zero3_enabled())
        description = None
        if making is not None and making.load_in_4bit and plain and options.keys() <= {"attn_implementation"}:
            _download(name_or_path, revision)
            settings = {**making.to_dict(), "dtype": dtype, "device": device.type}
            description = stored.describe(name_or_path, revision, settings)
        if description is None:
            model = make()
        else:
            model = store.obtain(
                store.BASES,
                description,
                name_or_path,
                make,
                reload,
                lambda made, entry: stored.save(made, entry, reload),
            )
            # What is trained on this base must name the base, not the store.
            model.name_or_path = model.config._name_or_path = name_or_path
    # No caller of a training model reads the cache, and padding-free attention is wrong with one.
    model.config.use_cache = False
    _prepare_linears(model, dtype)
    return model


@contextmanager
def _refused(name_or_path: str) -> Iterator[None]:
    """Turn what transformers raises while it loads a model into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the model {name_or_path!r} brings Python code of its own; read it, and if you trust it write "
                f"`trust_remote_code: true`",
                option="model_name_or_path",
            ) from error
        raise UserError(
            f"cannot load the model {name_or_path!r}: {first_line(error)}", option="model_name_or_path"
        ) from error


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _download(name: str, revision: str) -> None:
    """Bring the weight files of a hub model here, so that the store can tell what they are."""
    if Path(name).is_dir():
        return
    with suppress(OSError):  # other formats, or no connection: loading itself says what is wrong
        index = cached_file(
            name,
            "model.safetensors.index.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
        shards = {"model.safetensors"}
        if index is not None:
            shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        for shard in sorted(shards):
            cached_file(name, shard, revision=revision, _raise_exceptions_for_missing_entries=False)


def _own_quantization(config: Any) -> dict[str, Any] | None:
    own = getattr(config, "quantization_config", None)
    if own is None or isinstance(own, dict):
        return own
    return own.to_dict()


def _check_own_quantization(name: str, own: dict[str, Any] | None, wanted: BitsAndBytesConfig | None) -> None:
    """Raise :class:`UserError` if a checkpoint that is quantized already is not quantized as ``wanted``."""
    if own is None:
        return
    method = own.get("quant_method")
    if method != "bitsandbytes":
        raise UserError(
            f"{name!r} is quantized with {method}; halfbyte trains on bitsandbytes 4-bit bases: name the 16-bit "
            f"checkpoint",
            option="model_name_or_path",
        )
    if wanted is None:
        raise UserError(
            f"false, but {name!r} is quantized already; name the 16-bit checkpoint", option="load_in_4bit"
        )
    if wanted.load_in_8bit and own.get("load_in_4bit"):
        raise UserError(
            f"{name!r} is quantized in 4 bits; take load_in_8bit out, or name the 16-bit checkpoint",
            option="load_in_8bit",
        )
    if wanted.load_in_4bit and not own.get("load_in_4bit"):
        raise UserError(
            f"{name!r} is quantized in 8 bits; write `load_in_8bit: true`, or name the 16-bit checkpoint",
            option="model_name_or_path",
        )
    for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if wanted.load_in_4bit and own.get(key) != getattr(wanted, key):
            option = {"bnb_4bit_use_double_quant": "use_bnb_nested_quant"}.get(key, key)
            raise UserError(
                f"{name!r} was quantized with {key}={own.get(key)}, but {option} is {getattr(wanted, key)}; "
                f"write `{option}: {str(own.get(key)).lower()}`, or name the 16-bit checkpoint",
                option=option,
            )


def _prepare_linears(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Fix the compute dtype of every 4-bit linear, and keep bitsandbytes from repacking its weights.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 (nn/modules.py, Linear4bit.forward) repacks a weight in place for
    inference at the first evaluation without gradients; gradients computed through it afterwards are wrong, and so is
    what is saved.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype
            module.compute_type_is_set = True
