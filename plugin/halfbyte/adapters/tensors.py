"""The tensors in a saved adapter's file: readable, consistent with its configuration, and all of them loaded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from halfbyte.errors import UserError
from halfbyte.terminal.wording import first_line, plural

_ADVICE = "save the adapter again, or start a fresh one"
_DTYPES = ("F64", "F32", "F16", "BF16")
# The factors of a layer's update by PEFT's names, with the name of the other factor and the dimension that is r.
_FACTORS = (
    (".lora_A.weight", ".lora_B.weight", 0),
    (".lora_B.weight", ".lora_A.weight", 1),
    (".lora_embedding_A", ".lora_embedding_B", 0),
    (".lora_embedding_B", ".lora_embedding_A", 1),
)


def check_tensors(adapter: str, config: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` if the weights of the directory ``adapter`` contradict its ``config``.

    Reads the safetensors header alone, before a base is loaded: the file is whole, every A ``[r, H]`` has its B
    ``[F, r]``, and r is that of the configuration. Weights in PyTorch's own format are checked when they are loaded.
    """
    if (kind := config.get("peft_type")) not in list(PeftType):
        raise UserError(f"{Path(adapter) / CONFIG_NAME}: unknown peft_type {kind!r}")
    file, shapes = _header(adapter)
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    for name, shape in sorted(shapes.items()):
        for factor, partner, dimension in _FACTORS:
            if not name.endswith(factor):
                continue
            if (other := name.removesuffix(factor) + partner) not in shapes:
                raise UserError(f"{file}: {other} is missing; {_ADVICE}")
            # PEFT stacks the factors of experts (target_parameters): E * r.
            if shape[dimension] not in ranks and not config.get("target_parameters"):
                raise UserError(
                    f"{file}: {name} has rank {shape[dimension]}, and {CONFIG_NAME} says r = {ranks[0]}; {_ADVICE}"
                )


def check_parts(adapter: str, absent: Sequence[str]) -> None:
    """Raise :class:`UserError` if ``adapter`` has weights of the ``absent`` parts of a multimodal model."""
    for part in absent:
        if any(f".{part}." in name for name in _header(adapter)[1]):
            raise UserError(
                f"the adapter {adapter!r} has weights of {part}, and training on text loads the language model alone; "
                "start a fresh adapter"
            )


def load(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Put the adapter in the directory ``adapter`` on ``model``, trainable, and return the PEFT model.

    Raises :class:`UserError` as :func:`load_weights` does.
    """
    with _refusing(adapter):
        peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    load_weights(peft_model, adapter)  # again: from_pretrained does not return what was missing
    return peft_model


def planned(model: PreTrainedModel, adapter: str) -> PeftModel:
    """Return what :func:`load` would on a ``model`` without weights: its parameters by name and shape, on meta.

    Raises :class:`UserError` as :func:`check_names` does.
    """
    with _refusing(adapter), torch.device("meta"):
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode, config.init_lora_weights = False, True  # no initialization has weights to read
        peft_model = get_peft_model(model, config)
    check_names(peft_model, adapter, "default")
    return peft_model


def load_weights(model: PeftModel, adapter: str, name: str = "default") -> None:
    """Load the weights of the directory ``adapter`` into the adapter ``name`` of ``model``, in place.

    Raises :class:`UserError`, naming the first tensor, if the file lacks one that ``model`` has, has one that
    ``model`` has not, or has one of another shape. PEFT leaves missing tensors at random values, with a warning.
    """
    with _refusing(adapter):
        result = model.load_adapter(adapter, name, is_trainable=True, torch_device="cpu")
    for parameter, tensor in model.named_parameters():
        if tensor.requires_grad and not tensor.isfinite().all():
            raise UserError(f"{adapter}: {parameter} has values that are not finite; {_ADVICE}")
    missing = [key.replace(f".{name}", "") for key in result.missing_keys]
    unexpected = [key for key in result.unexpected_keys if key not in _tied_rows(model)]
    _refuse_mismatch(adapter, missing, unexpected)


def check_names(model: PeftModel, adapter: str, name: str) -> None:
    """Raise :class:`UserError` if the file of ``adapter`` does not hold the tensors of ``model``'s adapter ``name``.

    Compares names, and shapes where no weight is partitioned, with the header of the file.
    """
    _, shapes = _header(adapter)
    if not shapes:
        return
    expected = get_peft_model_state_dict(model, adapter_name=name)
    rows = [key for key in expected if key.endswith("trainable_tokens_delta") and key not in shapes]
    if rows:
        raise UserError(f"{adapter}: the adapter does not match this base: {max(rows)} is missing; {_ADVICE}")
    missing = sorted(expected.keys() - shapes.keys())
    _refuse_mismatch(adapter, missing, sorted(shapes.keys() - expected.keys() - _tied_rows(model)))
    for key, tensor in expected.items():
        if tensor.numel() and list(tensor.shape) != shapes[key]:  # none under ZeRO-3, which partitions them
            raise UserError(
                f"cannot load the adapter {adapter!r}: size mismatch for {key}: {shapes[key]} in the file, "
                f"{list(tensor.shape)} in this run"
            )


def _refuse_mismatch(adapter: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    problems = [
        f"{plural(len(keys), 'tensor')} {verb}, the first {keys[0]}"
        for keys, verb in ((missing, "missing"), (unexpected, "unexpected"))
        if keys
    ]
    if problems:
        raise UserError(f"{adapter}: the adapter does not match this base: {'; '.join(problems)}; {_ADVICE}")


def _tied_rows(model: PeftModel) -> set[str]:
    """Trained rows of a head tied to the embedding: PEFT saves them twice and reads the embedding's."""
    return {
        f"{name}.token_adapter.trainable_tokens_delta"
        for name, module in model.named_modules()
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is not None
    }


def _header(adapter: str) -> tuple[Path, dict[str, list[int]]]:
    """The weight file of ``adapter``, and the shape of each tensor in it; none in PyTorch's own format."""
    file = Path(adapter) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if (Path(adapter) / WEIGHTS_NAME).is_file():
            return Path(adapter) / WEIGHTS_NAME, {}
        raise UserError(f"{adapter} holds no adapter weights: it has no {SAFETENSORS_WEIGHTS_NAME}")
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            shapes = {name: each.get_shape() for name, each in slices.items()}
            dtypes = {name: each.get_dtype() for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {first_line(error)}; {_ADVICE}") from error
    if (wrong := next((name for name in sorted(dtypes) if dtypes[name] not in _DTYPES), None)) is not None:
        raise UserError(f"{file}: {wrong} is in {dtypes[wrong]}, not in floating point; {_ADVICE}")
    return file, shapes


@contextmanager
def _refusing(adapter: str) -> Iterator[None]:
    """Turn what PEFT raises while it loads ``adapter`` into a :class:`UserError`."""
    try:
        yield
    except KeyError as error:  # a trained embedding row, or a module that is trained in full
        raise UserError(
            f"{adapter}: the adapter does not match this base: {error.args[0]} is missing; {_ADVICE}"
        ) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
    ) as error:  # of the configuration as well
        lines = [line.strip() for line in str(error).splitlines()]
        sizes = next((line for line in lines if line.startswith("size mismatch")), None)
        raise UserError(f"cannot load the adapter {adapter!r}: {sizes or first_line(error)}") from error
