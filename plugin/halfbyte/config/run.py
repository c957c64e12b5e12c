"""The options of the run itself, beside those of TRL's scripts."""

from dataclasses import dataclass, field

from trl import ScriptArguments


@dataclass
class RunArguments(ScriptArguments):
    """TRL's script arguments and what a run does with its directory."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Move an earlier run in output_dir aside instead of refusing; nothing is deleted."},
    )
    allow_config_change: list[str] | None = field(
        default=None,
        metadata={
            "help": "Options that a resume may change although they change the run; `world_size` for the number of "
            "processes; `data`, `base` and `chat_template` for what the options name."
        },
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What a loss, gradient or weight that is not finite does: stop the run, or skip that step.",
            "choices": ["stop", "skip"],
        },
    )
    on_oom: str = field(
        default="stop",
        metadata={
            "help": "What a step that runs out of memory does: stop the run with advice, or accumulate: halve the "
            "micro-batches on all ranks, double their number and do the step again.",
            "choices": ["stop", "accumulate"],
        },
    )
    user_special_tokens: str = field(
        default="error",
        metadata={
            "help": "What the chat template's turn delimiters inside a message are: an error, escaped, or allowed.",
            "choices": ["error", "escape", "allow"],
        },
    )
