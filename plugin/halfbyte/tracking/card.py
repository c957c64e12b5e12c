"""README.md: the model card of a run."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from halfbyte import task
from halfbyte.names import is_local, public
from halfbyte.terminal.redaction import redact
from halfbyte.terminal.streams import printable
from halfbyte.tracking.figures import DEFAULT, Figures, are_ties
from halfbyte.tracking.record import RunRecord

# What a reader of the card looks for first, the recipe's own between these two; run.json has the rest.
_DATA_AND_SCHEDULE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
)
_OPTIMIZER_AND_ADAPTER = (
    "optim",
    "weight_decay",
    "max_grad_norm",
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "dtype",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "seed",
)

_UNREMARKABLE = ("runtime", "per_second", "num_tokens")


def model_card(
    record: RunRecord, title: str | None = None, *, figures: Figures = DEFAULT, where: str | None = None
) -> str:
    """Return the card's text: metadata, what was trained on what, the settings, the results, how to load it.

    It has no secret, and of a local path only the last name. The code loads the weights from the repository ``where``,
    or what the run has written: the final weights, else those of the newest checkpoint.
    """
    values = record.as_dict()
    config = values["config"]
    adapter = bool(config.get("use_peft"))
    base = str(values["base"].get("name") or config.get("model_name_or_path") or "unknown")
    title = title or str(redact(record.output_dir.resolve().name))
    data = _datasets(config)
    tags = ["halfbyte", "trl", values["recipe"]]
    if adapter:
        tags.append("qlora" if config.get("load_in_4bit") else "lora")
    metadata = ModelCardData(
        base_model=None if base == "unknown" or is_local(base) else base,
        datasets=[name for name in data if not is_local(name)] or None,
        library_name="peft" if adapter else "transformers",
        model_name=title,
        tags=tags,
    )
    settings = dict.fromkeys((*_DATA_AND_SCHEDULE, *figures.settings, *_OPTIMIZER_AND_ADAPTER))
    what = "a LoRA adapter for" if adapter else "a model trained from"
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        f"This is {what} `{public(base)}`, trained with the `{values['recipe']}` recipe of halfbyte"
        + (f" on {', '.join(f'`{public(name)}`' for name in data)}" if data else "")
        + f", {values['steps']} steps{_ended(values)}. `run.json` has every setting and `metrics.jsonl` every figure"
        + " where it was trained.",
        "## Settings",
        _table(("setting", "value"), [(key, config[key]) for key in settings if config.get(key) is not None]),
        *_results(values["metrics"]),
        *_lineage(values.get("lineage") or []),
        "## Use",
        *_use(values, base, adapter, where),
        "## Versions",
        _table(("package", "version"), list(values["versions"].items())),
    ]
    return printable("\n\n".join(sections)) + "\n"


def _results(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    before, after = metrics["before"], metrics["eval"]
    names = [
        key
        for key in {**before, **after}
        if key.startswith("eval_") and not any(word in key for word in _UNREMARKABLE)
    ]
    if not names:
        return []
    columns = ("evaluation", "before", "after")
    rows = [
        (name, *("ties" if are_ties(p, name) else p.get(name) for p in (before, after))) for name in names
    ]
    return ["## Results", _table(columns, rows)]


def _lineage(chain: list[Mapping[str, Any]]) -> list[str]:
    """The adapters that this one was trained from, oldest first."""
    if not chain:
        return []
    rows = [
        (
            public(str(run["name"])),
            run["recipe"],
            run["run_id"],
            run["steps"],
            public(str(run["base"]["name"])),
            run["adapter_sha256"] and run["adapter_sha256"][:12],
        )
        for run in chain
    ]
    columns = ("adapter", "recipe", "run", "steps", "base", "sha256")
    return ["## Lineage", "Trained from these adapters, oldest first:", _table(columns, rows)]


def _ended(values: Mapping[str, Any]) -> str:
    return "" if values["status"] in ("completed", "running") else f", {values['status']}"


def _use(values: Mapping[str, Any], base: str, adapter: bool, where: str | None) -> list[str]:
    """How to load the weights: from the hub, or in the directory of this file, where they are named relative to it."""
    config, checkpoints = values["config"], values["checkpoints"]
    if where is None and values.get("files"):
        where = "."
    elif where is None and checkpoints:
        where = f"./{checkpoints[0]}"
    if where is None:
        return ["The run has saved no weights."]
    lines = ["In the directory of this file:\n"] if where.startswith(".") else []
    if adapter and is_local(base):
        lines.append(
            f"`path/to/{public(base)}` stands for the base, a local directory where this was trained.\n"
        )
    if adapter and not config.get("load_in_8bit"):
        lines.append(
            "`halfbyte merge` makes a model of it that needs no PEFT, in the base as it was trained on. Merged into "
            "the 16-bit base it is another one.\n"
        )
    name = f"path/to/{public(base)}" if is_local(base) else base
    code = _usage(name, where, config, adapter, values["base"].get("auto_class"))
    return ["\n".join([*lines, f"```python\n{code}\n```"])]


def _usage(base: str, name: str, config: Mapping[str, Any], adapter: bool, whole: str | None) -> str:
    trained = task.by_peft_type(config.get("lora_task_type") or task.CAUSAL_LM.peft_type)
    auto, extra = (
        (trained is task.CAUSAL_LM and whole) or trained.auto_class,
        "".join(f", {key}={value!r}" for key, value in trained.model_kwargs.items()),
    )
    if not adapter:
        return f"""from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}", device_map="auto"{extra})
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
    # A sequence is scored at the last token that is not padding, and an adapter's directory does not say which that is.
    scores = trained is task.SEQUENCE_CLASSIFICATION
    dtype = config.get("dtype")
    dtype = dtype if dtype in ("bfloat16", "float16", "float32") else "bfloat16"
    lines = ["import torch", "from peft import PeftModel"]
    if config.get("load_in_4bit"):
        lines += [
            f"from transformers import {auto}, AutoTokenizer, BitsAndBytesConfig",
            "",
            "quantization = BitsAndBytesConfig(",
            "    load_in_4bit=True,",
            f'    bnb_4bit_quant_type="{config.get("bnb_4bit_quant_type") or "nf4"}",',
            f"    bnb_4bit_use_double_quant={bool(config.get('use_bnb_nested_quant'))},",
            f"    bnb_4bit_compute_dtype=torch.{dtype},",
            ")",
        ]
        options = f'quantization_config=quantization, dtype=torch.{dtype}, device_map="auto"'
    else:
        lines += [f"from transformers import {auto}, AutoTokenizer", ""]
        options = f'dtype=torch.{dtype}, device_map="auto"'
    lines += [
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = {auto}.from_pretrained("{base}", {options}{extra})',
    ]
    if config.get("additional_special_tokens"):
        lines.append("model.resize_token_embeddings(len(tokenizer))")
    if scores:
        lines.append("model.config.get_text_config().pad_token_id = tokenizer.pad_token_id")
    lines.append(f'model = PeftModel.from_pretrained(model, "{name}")')
    return "\n".join(lines)


def _datasets(config: Mapping[str, Any]) -> list[str]:
    mixture = [entry.get("path") for entry in config.get("datasets") or () if isinstance(entry, Mapping)]
    return [str(name) for name in [config.get("dataset_name"), *mixture] if name]


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *(tuple(_cell(value) for value in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
