"""Load a base model for this rank: quantize a 16-bit checkpoint, or load one that is quantized already."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.reward_trainer import suppress_seqcls_warning

from halfbyte import multimodal, state_kernels, store
from halfbyte.errors import UserError
from halfbyte.quantization import mxfp4, quantizer, stored
from halfbyte.quantization.compute import compute_in
from halfbyte.quantization.skeleton import configured, selective, without_weights
from halfbyte.task import CAUSAL_LM, Task
from halfbyte.terminal.wording import first_line, shorten

# Arguments of from_pretrained that leave the bytes of a base as they are.
_KEEPS_BYTES = {"attn_implementation"}


def load_base(
    name_or_path: str,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    revision: str = "main",
    trust_remote_code: bool = False,
    task: Task = CAUSAL_LM,
    entire: bool = False,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """Load a 16-bit or pre-quantized checkpoint onto ``device`` and make it safe to train on.

    Of a multimodal checkpoint the language model is loaded, and with ``entire`` the rest, frozen.
    ``quantization`` applies to a 16-bit checkpoint. A checkpoint that is quantized already keeps its own
    quantization, which must be bitsandbytes' 4-bit; only its compute dtype is replaced by ``dtype``. The random
    state of torch is left as it was.

    Raises :class:`UserError` when the checkpoint is missing, is in another quantization format, or requires
    its own code without ``trust_remote_code``.
    """
    with _explained(name_or_path, task), _random_state_kept(device):
        model = _load(
            name_or_path,
            quantization,
            dtype,
            device,
            task,
            entire,
            {"revision": revision, "trust_remote_code": trust_remote_code},
            {**task.model_kwargs, **model_init_kwargs},
        )
    # No caller of a training model reads the cache, and padding-free attention is wrong with one.
    model.config.use_cache = model.config.get_text_config().use_cache = False
    for part in multimodal.other_parts(model):
        model.get_submodule(part).requires_grad_(False)
    compute_in(model, dtype)
    if any(isinstance(each, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for each in model.modules()):
        state_kernels.leave_out_reading_weights(model)
    return model


@contextmanager
def _explained(name_or_path: str, task: Task) -> Iterator[None]:
    """Raise what a model's class makes of a configuration or of files that do not fit as a :class:`UserError`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any class
        if "DefaultCPUAllocator" in str(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"the model {name_or_path!r} contains its own Python code; read it, and if you trust it write "
                f"`trust_remote_code: true`",
                option="model_name_or_path",
            ) from error
        expected = isinstance(error, OSError | ValueError | ImportError | SafetensorError)
        reason = first_line(error) if expected else f"{type(error).__name__}: {first_line(error)}"
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights do not have the shapes that its config.json says"
        said = f"cannot load the model {name_or_path!r}: {reason}"
        if "Unrecognized configuration class" in said:
            said = f"{name_or_path!r}: transformers has no class for {task.name} with it; use another model"
        raise UserError(said, option="model_name_or_path") from error


def planned(
    name_or_path: str,
    *,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    revision: str = "main",
    trust_remote_code: bool = False,
    task: Task = CAUSAL_LM,
    entire: bool = False,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """Return what :func:`load_base` would load, without weights and on meta.

    Raises :class:`UserError` for a configuration that is missing, or that no class takes.
    """
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(name_or_path, task):
        own = _own_quantization(_configuration(name_or_path, origin), quantization)
        _check_own_quantization(name_or_path, own, quantization)
        model = without_weights(
            name_or_path,
            quantization=quantization,
            dtype=dtype,
            task=task,
            entire=entire,
            init_kwargs=model_init_kwargs,
            **origin,
        )
    model.config.use_cache = model.config.get_text_config().use_cache = False
    compute_in(model, dtype)
    return model


def _load(
    name: str,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    task: Task,
    entire: bool,
    origin: dict[str, Any],
    options: dict[str, Any],
) -> PreTrainedModel:
    config = _configuration(name, origin)
    own = _own_quantization(config, quantization)
    _check_own_quantization(name, own, quantization)
    changed, of_class = configured(name, options, origin)
    auto = multimodal.model_class(config, task, entire=entire)

    def load(source: str | Path, *, to: torch.device = device, **more: Any) -> PreTrainedModel:
        # Not warned: a new head in the place of the language model's was requested.
        with suppress_seqcls_warning(), quantizer.registered():
            return auto.from_pretrained(
                source,
                dtype=dtype,
                # Under gloo accelerate numbers even the CPU, which as a device map would mean a GPU.
                # Under ZeRO-3 transformers takes no device map, and loads onto this rank's device by itself.
                device_map=None if is_deepspeed_zero3_enabled() else {"": "cpu" if to.type == "cpu" else to},
                **{**options, **more} if "config" not in more else {**of_class, **more},
            )

    if quantization is None or own is not None:
        return load(name, **origin)
    quantization = selective(quantization, config, task)
    description = None
    if quantization.load_in_4bit and _can_be_stored(task, origin, options):
        stored.download(name, origin["revision"])
        settings = {**quantization.to_dict(), "dtype": dtype, "device": device.type}
        if task != CAUSAL_LM:
            settings["auto_class"] = task.auto_class
        description = stored.describe(name, origin["revision"], settings)

    given: dict[str, Any] = {"quantization_config": quantization, **origin}
    if hasattr(config, "quantization_config"):  # one that is not the base's any more
        del changed.quantization_config
        given["config"] = changed

    def quantize() -> PreTrainedModel:
        return load(name, **given)

    if description is None:
        return quantize()
    model = store.obtain(
        store.BASES,
        description,
        name,
        quantize,
        load,
        lambda made, directory: stored.save(made, directory, lambda path: load(path, to=torch.device("cpu"))),
    )
    # What is trained on this base must name the base, not the store.
    model.name_or_path = model.config._name_or_path = name
    return model


def _configuration(name: str, origin: dict[str, Any]) -> Any:
    """Read the base's configuration. Raises :class:`UserError` for one that its class does not take."""
    try:
        config = AutoConfig.from_pretrained(name, **origin)
        config.get_text_config()
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # of JSON's shape, or of any configuration class
        said = " ".join(str(error).split())
        raise UserError(
            f"{name}: its config.json is not that of a model: {type(error).__name__}: {shorten(said, 200)}",
            option="model_name_or_path",
        ) from error
    return config


def _can_be_stored(task: Task, origin: dict[str, Any], options: dict[str, Any]) -> bool:
    """Return whether the description in the store covers everything that decides the model's bytes."""
    if task.unquantized or origin["trust_remote_code"] or not options.keys() <= _KEEPS_BYTES:
        return False
    return not is_deepspeed_zero3_enabled()  # a base loaded there is sharded: no rank holds all of it


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they were.

    Loading draws random numbers for some architectures (DiffLlama, Qwen3.5), and another count from the store
    than from 16 bits. What is drawn afterwards, such as new adapters, must depend on the seed alone.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _own_quantization(config: Any, requested: BitsAndBytesConfig | None) -> dict[str, Any] | None:
    """How a checkpoint is quantized already, unless it is dequantized and packed in NF4 while it is read."""
    own = getattr(config, "quantization_config", None)
    if own is None or isinstance(own, dict):
        return None if quantizer.is_packed_anew(own, requested) else own
    if not hasattr(own, "to_dict"):
        raise ValueError(f"quantization_config must be a mapping, is {shorten(repr(own))}")
    found: dict[str, Any] = own.to_dict()
    return found


def _check_own_quantization(
    name: str, own: dict[str, Any] | None, requested: BitsAndBytesConfig | None
) -> None:
    """Raise :class:`UserError` if a checkpoint that is quantized already is not quantized as ``requested``."""
    if own is None:
        return
    method = own.get("quant_method")
    if method == mxfp4.METHOD:
        raise UserError(
            f"{name!r} is in MXFP4, which is read into 4 bits alone; write `load_in_4bit: true`, or name the 16-bit "
            f"checkpoint",
            option="load_in_4bit",
        )
    if method != "bitsandbytes":
        raise UserError(
            f"{name!r} is quantized with {method}; halfbyte trains on bitsandbytes 4-bit bases: "
            f"name the 16-bit checkpoint",
            option="model_name_or_path",
        )
    if requested is None:
        raise UserError(
            f"{name!r} is quantized already, but `load_in_4bit` is false; name the 16-bit checkpoint",
            option="load_in_4bit",
        )
    if requested.load_in_8bit and own.get("load_in_4bit"):
        raise UserError(
            f"{name!r} is quantized in 4 bits; remove `load_in_8bit`, or name the 16-bit checkpoint",
            option="load_in_8bit",
        )
    if requested.load_in_4bit and not own.get("load_in_4bit"):
        raise UserError(
            f"{name!r} is quantized in 8 bits; write `load_in_8bit: true`, or name the 16-bit checkpoint",
            option="model_name_or_path",
        )
    for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if requested.load_in_4bit and own.get(key) != getattr(requested, key):
            option = {"bnb_4bit_use_double_quant": "use_bnb_nested_quant"}.get(key, key)
            raise UserError(
                f"{name!r} was quantized with {key}={own.get(key)}, but {option} is {getattr(requested, key)}; "
                f"write `{option}: {str(own.get(key)).lower()}`, or name the 16-bit checkpoint",
                option=option,
            )
