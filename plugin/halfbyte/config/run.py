"""The options of the run itself, in addition to those of TRL's scripts."""

from dataclasses import dataclass, field

from trl import ScriptArguments


@dataclass
class RunArguments(ScriptArguments):
    """TRL's script arguments, the run directory, and what a run does on a failure."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Move an earlier run in output_dir aside instead of refusing to start; nothing is deleted."
        },
    )
    allow_config_change: list[str] | None = field(
        default=None,
        metadata={
            "help": "Options that a resume may change although this changes the run; also `world_size` (number of "
            "processes), `data`, `base` and `chat_template` (their content)."
        },
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "On a non-finite loss, gradient or weight: stop the run, or skip that step.",
            "choices": ["stop", "skip"],
        },
    )
    on_oom: str = field(
        default="stop",
        metadata={
            "help": "On a step that runs out of memory: stop the run with advice, or accumulate: halve the "
            "micro-batches on all ranks, double their number and repeat the step.",
            "choices": ["stop", "accumulate"],
        },
    )
    user_special_tokens: str = field(
        default="error",
        metadata={
            "help": "Turn delimiters of the chat template inside a message: error, escape or allow them.",
            "choices": ["error", "escape", "allow"],
        },
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={
            "help": "Prompts to complete while training: a .txt file (one a line), a .jsonl file (prompt or messages), "
            "or rows of a split such as test:4."
        },
    )
    sample_steps: int | None = field(
        default=None,
        metadata={
            "help": "Complete sample_prompts every so many steps; unset: at each evaluation. At the end in any case."
        },
    )
    sample_max_new_tokens: int = field(
        default=64, metadata={"help": "Most tokens of a completion of sample_prompts."}
    )
    peak_flops: float | None = field(
        default=None,
        metadata={
            "help": "FLOP/s that one device reaches at most in the dtype of the run: the log then has `mfu`, the share "
            "of it that the model's own products use."
        },
    )
