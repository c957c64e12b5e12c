"""The commands of ``halfbyte``, one module each, and the one table of their names.

The command line, the names that recipes must not take and the help all read the table. A command's module is
imported when the command is called.
"""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A name that the command line keeps for itself."""

    name: str
    summary: str
    arguments: str = ""

    @property
    def usage(self) -> str:
        """How the command is typed."""
        return f"halfbyte {self.name} {self.arguments}".rstrip()

    def main(self, arguments: list[str]) -> int:
        """Run the command and return its exit code."""
        code: int = import_module(f"{__name__}.{self.name}").main(arguments)
        return code


TABLE = {
    command.name: command
    for command in (
        Command("recipes", "list the installed recipes", "[--json]"),
        Command("doctor", "check this machine, and what a launch file would run", "[--launch FILE] [--json]"),
        Command("cache", "list or remove what is cached on disk", "ls | rm KEY... | rm --all"),
        Command("verify", "check a run, a checkpoint or a merged model", "DIR"),
        Command("demo", "the offline quick start: base, sft, dpo", "[--output_dir DIR]"),
        Command("merge", "write a model that plain transformers loads", "ADAPTER... --output_dir DIR"),
        Command("plan", "would a run fit, how long would it take, on what", "RECIPE --config FILE"),
        Command("plot", "draw curves of runs in one picture", "DIR... [--output FILE]"),
        Command("quantize", "write a pre-quantized checkpoint", "MODEL --output_dir DIR"),
        Command("report", "compare quantization schemes on a model", "MODEL [--data ROWS]"),
        Command("runs", "compare runs: figures, what differs", "DIR... [--sort KEY] [--json]"),
    )
}
