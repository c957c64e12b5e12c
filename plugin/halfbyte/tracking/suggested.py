"""The commands that a run suggests: the one that resumes it, without secrets, and the one that comes next."""

import shlex

from halfbyte import distributed
from halfbyte.tracking.redaction import redact


def resume_command(name: str, argv: list[str]) -> str:
    """The command that resumes the run ``halfbyte NAME ARGV`` from its newest checkpoint."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--resume_from_checkpoint", "--overwrite_output_dir"):
            if not equals and option == "--resume_from_checkpoint":
                next(words, None)
            continue
        if equals:
            word = f"{option}={redact(value, option)}"
        elif kept and kept[-1].startswith("--") and not word.startswith("--"):
            word = str(redact(word, kept[-1]))
        kept.append(word)
    launcher = distributed.launch_command([name, *argv])
    return shlex.join([*(launcher or ["halfbyte"]), name, *kept, "--resume_from_checkpoint", "auto"])


def next_command(template: str | None, output_dir: str, base: str, *, adapter: bool) -> str | None:
    """A recipe's ``next`` filled in: what is run once ``output_dir`` holds an ``adapter``, or a whole model."""
    if template is None:
        return None
    option = "adapter_name_or_path" if adapter else "model_name_or_path"
    return template.format(output_dir=output_dir, model=base, start=f"--{option} {output_dir}")
