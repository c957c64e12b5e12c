"""A chat template that never ends, or prints without end: tried out in a process of its own, which has limits.

Jinja has none: a sandboxed ``range`` ends at 100,000, but not a loop within a loop, nor ``'a' * 10**10``. Run as a
script, this file is that process; it imports Jinja alone.
"""

import json
import resource
import subprocess
import sys
from functools import lru_cache
from typing import Any

SECONDS = 5  # of the processor, and twelve times that by the clock
MEMORY = 1 << 30  # bytes, of which the process itself takes a twentieth
LENGTH = 1 << 24  # characters

_TURNS = ("user", "assistant")
_TALKS = (
    _TURNS,
    ("system", *_TURNS),
    ("user",),
    ("user", "assistant", "tool", "assistant"),
    _TURNS * 20,
)
_MEMORY, _LENGTH = 3, 4  # exit statuses


@lru_cache
def excess(template: str) -> str | None:
    """What is wrong with a chat template on a few short conversations: ``runs for more than 5 s``, or None.

    An error of the template is no excess.
    """
    limits = {"seconds": SECONDS, "memory": MEMORY, "length": LENGTH}
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps({"template": template, **limits}).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=12 * SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"runs for more than {12 * SECONDS} s"
    except OSError:  # a user who may start no more processes: a run goes on without the trial
        return None
    if done.returncode < 0:
        return f"runs for more than {SECONDS} s"
    if done.returncode == _MEMORY:
        return f"takes more than {MEMORY >> 30} GiB of memory"
    return f"prints more than {LENGTH:,} characters" if done.returncode == _LENGTH else None


def _render(asked: dict[str, Any]) -> int:
    """Render every short conversation within limits; return the exit status."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def refuse(message: object = None) -> None:
        raise ValueError(message)

    seconds, memory = asked["seconds"], asked["memory"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
    try:
        template = environment.from_string(asked["template"])
    except MemoryError:
        return _MEMORY
    except Exception:
        return 0
    for number, roles in enumerate(_TALKS):
        turns = [{"role": role, "content": "a word"} for role in roles]
        length = 0
        try:
            for piece in template.generate(
                messages=turns, add_generation_prompt=number % 2 == 0, bos_token="", eos_token="", tools=None
            ):
                length += len(piece)
                if length > asked["length"]:
                    return _LENGTH
        except MemoryError:
            return _MEMORY
        except Exception:
            continue
    return 0


if __name__ == "__main__":
    sys.exit(_render(json.load(sys.stdin)))
