"""``python -m tests.checkpoint.chaos --kills 100 --pairs 30 --seed 0``: nothing is lost, and nothing is mixed.

Kills: an SFT run, then DPO runs from its adapter, each killed (SIGKILL) at random moments and resumed by
`resume_from_checkpoint: auto` until it ends; every checkpoint that a kill left must be whole and stay as it was, and
the end must be the uninterrupted run's, bit for bit. Pairs: two runs that differ in their seed, started together in one
directory; one of them trains, as if it were alone, and the other is refused.

Runs are forks of this process, which has imported what they need. The moments are drawn from ``--seed``; what a
process was doing at one of them depends on the machine.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from halfbyte.checkpoint import usable
from halfbyte.checkpoint.history import checkpoints
from tests import tiny
from tests.checkpoint.runs import STEPS, assert_equal, interrupted, options

MOST_SECONDS = 300  # of one run
_WARM = (
    *("halfbyte.run", "halfbyte_recipes.sft", "halfbyte_recipes.dpo", "halfbyte.tracking.plots"),
    *("transformers.models.llama.modeling_llama", "transformers.integrations.bitsandbytes"),
    *("peft.tuners.lora.bnb", "torch._dynamo"),
)


class Run:
    """``halfbyte ARGUMENTS`` in a fork, which prints to ``log``."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log, self.started = log, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _child(arguments, log)
        self.status: int | None = None
        self.over = 0.0  # in seconds since the epoch

    def wait(self, seconds: float = MOST_SECONDS) -> int | None:
        """The exit code, negative for a signal; None if the run has not ended after ``seconds`` since its start."""
        while self.status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.status, self.over = os.waitstatus_to_exitcode(status), time.time()
            elif time.monotonic() - self.started > seconds:
                return None
            else:
                time.sleep(0.002)
        return self.status

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def ended(self) -> int:
        """The exit code of a run that must end by itself."""
        code = self.wait()
        if code is None:
            self.kill()
            raise AssertionError(f"no end after {MOST_SECONDS} s: {self.printed()}")
        return code

    def began(self) -> float:
        """When the fork got to run, in seconds since the epoch: on a busy machine much later than it was made."""
        return self.log.with_suffix(".began").stat().st_mtime

    def printed(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def _child(arguments: list[str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    log.with_suffix(".began").touch()
    code = 1
    try:
        from halfbyte.cli import main

        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Site:
    """What all runs share: a base, rows, an adapter to start DPO from, and uninterrupted runs by seed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = tiny.save_model(root / "base")
        self.rows = {
            "sft": tiny.write_rows(root / "conversations", tiny.conversations(12)),
            "dpo": tiny.write_rows(root / "preferences", tiny.preferences(12)),
        }
        self.seconds = 0.0  # of an uninterrupted DPO run
        self._whole: dict[int, Path] = {}
        self.adapter = root / "sft"
        made = Run(["sft", *options(self.base, self.rows["sft"], self.adapter)], root / "sft.log")
        assert made.ended() == 0, made.printed()

    def arguments(self, output: Path, seed: int = 42) -> list[str]:
        given = {"save_steps": "1", "seed": str(seed), "learning_rate": "1e-3", "logging_steps": "1"}
        start = ["--adapter_name_or_path", str(self.adapter)]
        return ["dpo", *options(self.base, self.rows["dpo"], output, **given), *start]

    def whole(self, seed: int = 42) -> Path:
        if seed not in self._whole:
            output = self.root / f"whole-{seed}"
            run = Run(self.arguments(output, seed), self.root / f"whole-{seed}.log")
            assert run.ended() == 0, run.printed()
            self.seconds = time.monotonic() - run.started
            self._whole[seed] = output
        return self._whole[seed]


def sealed(output: Path) -> dict[str, str]:
    """The checkpoints of a run by name, with their manifests. Raises AssertionError if one is not whole."""
    for path in checkpoints(output):
        assert usable.check(path)[1] == [], (path, usable.check(path)[1])
    return {path.name: (path / "manifest.json").read_text() for path in checkpoints(output)}


def chain(site: Site, output: Path, draw: random.Random, most: int) -> list[str]:
    """One DPO run, killed at most ``most`` times, until it ends as the uninterrupted one; where each kill came."""
    reference, log = site.whole(), output.with_suffix(".log")
    kills: list[str] = []
    before: dict[str, str] = {}
    while True:
        resumed = ["--resume_from_checkpoint", "auto"]
        run = Run([*site.arguments(output), *resumed], log)
        if len(kills) < most:
            # After none to three more checkpoints, so that the moments are spread however fast the machine is.
            more = draw.randint(0, 3)
            wanted = min(len(checkpoints(output)) + more, STEPS)
            while len(checkpoints(output)) < wanted and run.wait(0) is None:
                time.sleep(0.002)
            begun = time.monotonic() - run.started
            run.wait(begun + draw.uniform(0, site.seconds / (6 if more else 2)))
            if run.status is None:
                run.kill()
                pending = (output / "_pending-checkpoint").exists()
                now = sealed(output)
                assert before.items() <= now.items(), f"lost or changed: {before.keys() - now.keys()}"
                kills.append(_moment(output, before, now, pending))
                before = now
                continue
        assert run.ended() == 0, run.printed()
        break
    assert_equal(reference, output, STEPS)
    assert debris(output) == []
    return kills


def _moment(output: Path, before: dict[str, str], now: dict[str, str], pending: bool) -> str:
    if pending:
        return "in a save"
    if (output / "adapter_model.safetensors").exists():
        return "after the last step"
    if now.keys() - before.keys():
        return "between saves"
    return "before the first step"


def pair(site: Site, output: Path, draw: random.Random) -> list[str]:
    """Two runs in ``output``, started up to a fifth of a run apart: one trains as if alone, the other is refused.

    Nothing is returned, and counted, where the second got to run only when the first was over. They
    start a new run with different seeds, the same over a finished one, or both continue what a kill left.
    """
    wholes = {seed: site.whole(seed) for seed in (42, 43)}
    mode = draw.choice(("new", "resumed", "overwritten"))
    seeds = (42, 42) if mode == "resumed" else tuple(draw.sample(sorted(wholes), 2))
    more = {"resumed": ["--resume_from_checkpoint", "auto"], "overwritten": ["--overwrite_output_dir"]}
    if mode == "resumed":
        interrupted(wholes[42], output)
    elif mode == "overwritten":
        shutil.copytree(wholes[42], output)
    apart = draw.choice((0.0, draw.uniform(0, site.seconds / 5)))
    runs = []
    for place, seed in enumerate(seeds):
        time.sleep(apart * place)
        log = output.with_name(f"{output.name}-{place}.log")
        runs.append(Run([*site.arguments(output, seed), *more.get(mode, [])], log))
    codes = [run.ended() for run in runs]
    if runs[1].began() > runs[0].over:
        return []
    assert sorted(codes) == [0, 2], (codes, [run.printed() for run in runs])
    refused = runs[codes.index(2)].printed()
    assert "is in use by another run: process " in refused, refused
    assert_equal(wholes[seeds[codes.index(0)]], output, STEPS)
    assert debris(output) == []
    moved = list(output.parent.glob(f"{output.name}.[0-9]*"))
    assert len(moved) == (mode == "overwritten"), moved
    for place in moved:
        assert_equal(wholes[42], place, STEPS)
    return [mode]


def debris(output: Path) -> list[str]:
    """What a run leaves beside and in its directory that is no result of it."""
    found = [*output.glob("**/*.tmp"), *output.glob("**/_pending*"), *output.glob("**/.pending")]
    return [str(path) for path in [*found, *output.parent.glob(f".{output.name}.lock")]]


def _counted(what: str, wanted: int, do: Callable[[int], list[str]]) -> Iterator[tuple[str, bool]]:
    """Each event that ``do`` reports until ``wanted`` are counted, with whether it went well."""
    counted = number = 0
    while counted < wanted:
        number += 1
        start = time.monotonic()
        try:
            events = do(wanted - counted)
            counted += len(events)
            print(
                f"{what} {number}: {', '.join(events) or 'ended first'} ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
            yield from ((event, True) for event in events)
        except AssertionError as error:
            counted += 1
            print(f"{what} {number}: FAILED: {error}", flush=True)
            yield "failed", False


def main() -> int:
    """Run the kills and the pairs; print each, then a summary. Return 1 if anything was lost or mixed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", type=Path, help="where runs are made and kept; a temporary one by default"
    )
    chosen = parser.parse_args()
    root = (chosen.directory or Path(tempfile.mkdtemp(prefix="halfbyte-chaos-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        XDG_CACHE_HOME=str(root / "cache"), HF_HOME=str(root / "hf"), HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled",
    )  # fmt: skip
    for name in _WARM:
        __import__(name)
    draw, site, start = random.Random(chosen.seed), Site(root), time.monotonic()
    site.whole()
    print(f"an uninterrupted run takes {site.seconds:.1f} s; all is in {root}", flush=True)
    kills, pairs, sound = Counter[str](), Counter[str](), True
    chains = iter(range(1, 10_000))
    for event, good in _counted(
        "chain", chosen.kills, lambda left: chain(site, root / f"chain-{next(chains)}", draw, min(left, 8))
    ):
        kills[event] += 1
        sound = sound and good
    numbers = iter(range(1, 10_000))
    for event, good in _counted(
        "pair", chosen.pairs, lambda left: pair(site, root / f"pair-{next(numbers)}", draw)
    ):
        pairs[event] += 1
        sound = sound and good
    print(json.dumps({
        "seed": chosen.seed, "kills": dict(kills), "pairs": dict(pairs), "sound": sound,
        "minutes": round((time.monotonic() - start) / 60, 1),
    }))  # fmt: skip
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
