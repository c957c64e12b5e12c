"""The help of one recipe: the most used options on one page, or every option by the class that declares it."""

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.config.conversion import described
from halfbyte.config.fields import Field
from halfbyte.config.limits import range_for
from halfbyte.terminal.wording import shorten

LINES, WIDTH = 80, 100

# What the short help shows, of these the options that the recipe has, and what each does in a few words.
USED: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "model and data",
        (
            ("model_name_or_path", "base model: a hub id or a directory"),
            ("adapter_name_or_path", "adapter to start from"),
            ("dataset_name", "training data: a hub id, a file or a directory"),
            ("dataset_train_split", "its split to train on"),
            ("dataset_test_split", "its split to evaluate on"),
            ("test_split_size", "share or rows to split off for evaluation"),
            ("datasets", "several datasets instead, each a mapping"),
            ("max_length", "longest row in tokens"),
            ("packing", "fill rows with several examples"),
            ("completion_only_loss", "train on the completions only"),
            ("assistant_only_loss", "train on the assistant's turns only"),
            ("chat_template_path", "chat template: a .jinja file, or a model's"),
            ("additional_special_tokens", "template tokens to add and train"),
            ("user_special_tokens", "delimiters in the data: error, escape, allow"),
            ("output_dir", "where the run is written"),
        ),
    ),
    (
        "quantization and adapters",
        (
            ("load_in_4bit", "quantize the base to NF4"),
            ("dtype", "compute dtype; unset: the best of this device"),
            ("use_peft", "train adapters; false trains all weights"),
            ("lora_r", "rank of the adapters"),
            ("lora_alpha", "scale of the adapters: lora_alpha / lora_r"),
            ("lora_dropout", "dropout before the adapters"),
            ("lora_target_modules", "modules that get an adapter"),
            ("lora_exclude_modules", "modules that get none although a target matches"),
            ("init_lora_weights", "default, gaussian or eva"),
            ("loraplus_lr_ratio", "LoRA+: learning rate of B over that of A"),
        ),
    ),
    (
        "training",
        (
            ("learning_rate", "peak learning rate"),
            ("lr_scheduler_type", "learning rate schedule"),
            ("warmup_steps", "steps, or a share of all steps below 1"),
            ("num_train_epochs", "epochs"),
            ("max_steps", "optimizer steps; -1: by epochs"),
            ("per_device_train_batch_size", "rows of a micro-batch on each device"),
            ("gradient_accumulation_steps", "micro-batches of an optimizer step"),
            ("optim", "optimizer"),
            ("max_grad_norm", "gradient clipping"),
            ("seed", "random seed"),
            ("beta", "KL regularization to the reference model"),
            ("loss_type", "loss function"),
        ),
    ),
    (
        "speed and memory",
        (
            ("fast", "auto: the fused step; none: plain TRL"),
            ("max_tokens_per_batch", "token budget of a micro-batch, beside its rows"),
            ("memory_budget", "auto, min (recompute everything) or a size"),
            ("gradient_checkpointing", "recompute activations in the backward"),
            ("on_oom", "out of memory: stop, or accumulate"),
        ),
    ),
    (
        "evaluation, saving and reporting",
        (
            ("eval_strategy", "no, steps or epoch"),
            ("eval_steps", "steps between evaluations; unset: logging_steps"),
            ("sample_prompts", "prompts to complete: a file, or test:4"),
            ("sample_steps", "steps between that; unset: at evaluations"),
            ("sample_max_new_tokens", "most tokens of a completion"),
            ("logging_steps", "steps between log lines"),
            ("save_steps", "steps between checkpoints"),
            ("save_total_limit", "checkpoints to keep"),
            ("report_to", "trackers: wandb, none, ..."),
            ("peak_flops", "FLOP/s of one device, for mfu in the log"),
            ("run_name", "name of the run in the tracker"),
            ("push_to_hub", "upload the result to the hub"),
            ("on_nonfinite", "nan or inf in a step: stop, or skip the step"),
            ("resume_from_checkpoint", "auto, or a checkpoint directory"),
            ("allow_config_change", "options that a resume may change"),
            ("overwrite_output_dir", "move an earlier run aside"),
        ),
    ),
)
_UPSTREAM = ("halfbyte", "transformers", "trl")


def print_short(
    prog: str, summary: str, classes: Sequence[type], fields: Mapping[str, Field], values: Mapping[str, Any]
) -> None:
    """Print our own, the recipe's own and the most used options, in at most 80 lines of 100 columns.

    ``values`` are the defaults.
    """
    head = [*([shorten(summary, WIDTH), ""] if summary else []), *_usage(prog)]
    foot = [
        "",
        f"{prog} --help all lists all {len(fields)} options.",
    ]
    sections = [(title, [entry for entry in used if entry[0] in fields]) for title, used in USED]
    shown = {name for _, entries in sections for name, _ in entries}
    own = [
        (name, field.help)
        for name, field in fields.items()
        if name not in shown and _declared_in(field) not in _UPSTREAM
    ]
    room = LINES - len(head) - len(foot) - sum(len(entries) + 2 for _, entries in sections) - 2
    if own and room > 0:
        sections.insert(0, ("this recipe's own", own[:room]))
    width = max(len(name) for _, entries in sections for name, _ in entries)
    lines = []
    for title, entries in sections:
        lines += ["", f"{title}:"] if entries else []
        for name, meaning in entries:
            default = shorten(_default(values[name]), 18)
            lines.append(shorten(f"  --{name:<{width}}  {default:<18}  {meaning}".rstrip(), WIDTH))
    print(*head, *lines, *foot, sep="\n")


def print_all(
    prog: str, summary: str, classes: Sequence[type], fields: Mapping[str, Field], values: Mapping[str, Any]
) -> None:
    """Print every option by the class that declares it; ``values`` are the defaults."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    for line in [*([summary, ""] if summary else []), *_usage(prog), ""]:
        console.print(Text(line))
    for owner in classes:
        options = [field for field in fields.values() if field.owner is owner]
        table = Table(
            title=owner.__name__, title_justify="left", title_style="bold", box=None, pad_edge=False
        )
        # A long default must not crop the names.
        longest = max((len(field.name) + 2 for field in options), default=0)
        table.add_column("option", no_wrap=True, min_width=longest)
        for heading in ("default", "meaning"):
            table.add_column(heading, overflow="fold")
        for field in options:
            default = shorten(_default(values[field.name]))
            table.add_row(Text(f"--{field.name}"), Text(default), Text(_meaning(field)))
        if options:
            console.print(table)
            console.print()


def _usage(prog: str) -> list[str]:
    return [
        f"usage: {prog} --config FILE [--key value] [--key=value] [--list a b] [--flag]",
        "Every option is a key of the YAML file too; the command line takes precedence.",
    ]


def _declared_in(field: Field) -> str:
    """The top-level package of the class that declares ``field`` for the first time."""
    declaring = [c for c in field.owner.__mro__ if field.name in vars(c).get("__annotations__", {})]
    return (declaring or [field.owner])[-1].__module__.partition(".")[0]


def _default(value: Any) -> str:
    value = getattr(value, "value", value)
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _meaning(field: Field) -> str:
    limit = range_for(field.name, field.default)
    kind = f"one of {', '.join(map(str, field.choices))}" if field.choices else described(field.type)
    return f"{field.help} [{kind}{', ' + limit[0] if limit else ''}]".strip()
