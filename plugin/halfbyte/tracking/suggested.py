"""The commands that a run suggests, without secrets: to resume it, to start it over, and what comes next."""

import shlex

from halfbyte import distributed
from halfbyte.terminal.redaction import redact

_DROPPED = ("resume_from_checkpoint", "overwrite_output_dir")  # with the words that follow them


def resume_command(name: str, argv: list[str]) -> str:
    """The command that resumes the run ``halfbyte NAME ARGV`` from its newest checkpoint."""
    return _command(name, argv, "--resume_from_checkpoint", "auto")


def again_command(name: str, argv: list[str]) -> str:
    """The command that starts the run ``halfbyte NAME ARGV`` over, and moves aside what it left."""
    return _command(name, argv, "--overwrite_output_dir")


def merge_command(output_dir: str) -> str:
    """The command that merges the adapter in ``output_dir`` into its base."""
    return shlex.join(["halfbyte", "merge", output_dir, "--output_dir", f"{output_dir.rstrip('/')}-merged"])


def _command(name: str, argv: list[str], *more: str) -> str:
    kept: list[str] = []
    option = ""
    for word in argv:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            option = option.replace("-", "_").strip("_")
            if option not in _DROPPED:
                kept.append(f"{word[: -len(value)]}{redact(value, option)}" if equals and value else word)
        elif option not in _DROPPED:
            kept.append(str(redact(word, option)))
    launcher = distributed.launch_command([name, *argv])
    return shlex.join([*(launcher or ["halfbyte"]), name, *kept, *more])


def next_command(template: str | None, output_dir: str, base: str, *, adapter: bool) -> str | None:
    """A recipe's ``next`` filled in, quoted for a shell: what is run once ``output_dir`` holds an ``adapter``.

    Without ``adapter`` it holds a whole model.
    """
    if template is None:
        return None
    option = "adapter_name_or_path" if adapter else "model_name_or_path"
    place = shlex.quote(output_dir)
    return template.format(output_dir=place, model=shlex.quote(base), start=f"--{option} {place}")
