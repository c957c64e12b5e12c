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
