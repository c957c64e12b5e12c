"""A signal at any place, to any process: every rank stops at one step, with one good checkpoint, and soon."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfbyte import run
from halfbyte.errors import Stopped
from halfbyte.resilience import signals
from tests import launch
from tests.checkpoint import saboteur
from tests.checkpoint.fixtures import ENDED_SECONDS

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}


def checkpoints(output: Path) -> list[int]:
    return sorted(int(path.name[11:]) for path in output.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("name", "place", "step"),
    [("SIGTERM", "step", 3), ("SIGINT", "evaluation", 5), ("SIGUSR1", "save", 5)],
)
def test_a_signal_stops_at_the_next_boundary(
    saboteur_options, tmp_path: Path, name: str, place: str, step: int, capfd: pytest.CaptureFixture
) -> None:
    before = signal.getsignal(signal.Signals[name])
    with pytest.raises(Stopped) as stopped:
        run.main("saboteur", saboteur.recipe, saboteur_options(fault=name, fault_place=place))
    output = tmp_path / "run"
    assert stopped.value.code == CODES[name]
    assert stopped.value.signal == name
    assert (output / "left-0").read_text() == f"{step}\n"
    assert checkpoints(output) == [step]
    assert (output / f"checkpoint-{step}" / "trainer_state.json").is_file()
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("interrupted", step)
    assert record["next"].startswith("halfbyte saboteur --model_name_or_path ")
    assert record["next"].endswith(" --resume_from_checkpoint auto")
    assert not (output / "adapter_model.safetensors").exists()
    assert f"{name} received" in capfd.readouterr().err
    assert signal.getsignal(signal.Signals[name]) is before


def test_a_closed_terminal_stops_a_run_as_sigterm_does(saboteur_options, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped:
        run.main("saboteur", saboteur.recipe, saboteur_options(fault="SIGHUP"))
    assert (stopped.value.code, stopped.value.signal) == (143, "SIGTERM")
    assert checkpoints(tmp_path / "run") == [3]


def test_under_nohup_a_closed_terminal_stops_nothing(saboteur_options, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ending = saboteur_options(fault="SIGHUP", max_steps=4, eval_strategy="no")
        assert run.main("saboteur", saboteur.recipe, ending) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_before_training_leaves_nothing(saboteur_options, tmp_path: Path, name: str) -> None:
    there = set(tmp_path.iterdir()) | {tmp_path / "rows"}
    ending = saboteur_options(fault=name, fault_place="build", output_dir=tmp_path / "a" / "b" / "run")
    with pytest.raises((Stopped, KeyboardInterrupt)) as stopped:
        run.main("saboteur", saboteur.recipe, ending)
    if isinstance(stopped.value, Stopped):
        assert stopped.value.code == CODES.get(name, 143)
    assert set(tmp_path.iterdir()) == there
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def logged(output: Path) -> list[dict]:
    """The rows of a run without what the clock decides."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "loss" in key or key == "step"} for row in rows]


def assert_made_up_for(saboteur_options, tmp_path: Path, *fault: str, **chosen: object) -> None:
    """Stopped by SIGTERM and resumed: the rows and the weights of a run that never was, dropout on."""
    chosen = {"max_steps": 7, "lora_dropout": 0.1, "logging_steps": 2, "learning_rate": 1e-2, **chosen}
    whole = saboteur_options(**{**chosen, "output_dir": tmp_path / "whole"})
    assert run.main("saboteur", saboteur.recipe, whole) == 0
    cut = saboteur_options(**chosen)
    with pytest.raises(Stopped):
        run.main("saboteur", saboteur.recipe, [*cut, "--fault", "SIGTERM", *fault])
    faults = ("fault", "fault_place", "fault_step")
    resumed = [*cut, "--resume_from_checkpoint", "auto", "--allow_config_change", *faults]
    assert run.main("saboteur", saboteur.recipe, resumed) == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    assert logged(tmp_path / "whole") == logged(tmp_path / "run")


def test_what_a_signal_cut_off_is_made_up_for(saboteur_options, tmp_path: Path) -> None:
    assert_made_up_for(saboteur_options, tmp_path, "--fault_place", "evaluation")


ENDS = [
    pytest.param(place, chosen, id=f"{place} {chosen}", marks=() if quick else pytest.mark.faults)
    for place, kept in (("step", 0), ("evaluation", 1), ("save", 2), ("saved", -1))
    for number, chosen in enumerate(({}, {"save_strategy": "epoch"}, {"logging_strategy": "epoch"}))
    for quick in (number == kept,)
]


@pytest.mark.parametrize(("place", "chosen"), ENDS)
def test_so_is_what_ends_an_epoch(saboteur_options, tmp_path: Path, place: str, chosen: dict) -> None:
    """Five steps are an epoch, which upstream evaluates and logs after the save of its last step."""
    given = {"gradient_accumulation_steps": 4, "eval_strategy": "epoch", **chosen}
    assert_made_up_for(saboteur_options, tmp_path, "--fault_place", place, "--fault_step", "5", **given)
    evaluated = [row["step"] for row in logged(tmp_path / "run") if "eval_loss" in row]
    assert evaluated == [5, 7]


def test_so_is_what_ends_training_within_an_epoch(saboteur_options, tmp_path: Path) -> None:
    given = {"gradient_accumulation_steps": 4, "eval_strategy": "epoch"}
    assert_made_up_for(saboteur_options, tmp_path, "--fault_step", "7", **given)


def test_a_save_that_cannot_fit_is_not_begun(
    saboteur_options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save is slow by the clock that the guard reads; the signal comes after it, in a step."""
    real = time.monotonic
    late = [0.0]
    save = saboteur.SaboteurTrainer._save_checkpoint

    def slow(self: saboteur.SaboteurTrainer, *args: object, **kwargs: object) -> None:
        save(self, *args, **kwargs)
        late[0] += 28.0

    monkeypatch.setattr(saboteur.SaboteurTrainer, "_save_checkpoint", slow)
    monkeypatch.setattr(signals.time, "monotonic", lambda: real() + late[0])
    with pytest.raises(Stopped, match="no checkpoint: the last took 28 s"):
        run.main("saboteur", saboteur.recipe, saboteur_options(fault="SIGTERM", fault_step=7))
    assert checkpoints(tmp_path / "run") == [5]


def child(code: str) -> subprocess.Popen[str]:
    text = (
        "import os, signal, sys, time\nfrom types import SimpleNamespace\n"
        "from halfbyte.resilience import signals\n"
        "said = lambda number: print('abandoned', number, flush=True)\n"
        f"watch = signals.Signals(said)\nwatch.__enter__()\n{code}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", text], text=True, stdout=subprocess.PIPE, env=launch.environment()
    )


def test_a_rank_that_hangs_is_ended_by_the_watchdog() -> None:
    """The main thread is inside a C call that no signal interrupts, as in a collective without its peer."""
    hang = (
        "signals.BOUNDARY_SECONDS = 0.2\nimport ctypes\nsignal.pthread_sigmask\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "while True: ctypes.PyDLL(None) and ctypes.CDLL(None).sleep(60)\n"
    )
    process = child(hang)
    printed, _ = process.communicate(timeout=120)
    assert (process.returncode, printed) == (143, "abandoned 15\n")


def test_a_second_signal_stops_at_once_and_an_echo_does_not() -> None:
    twice = (
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"  # what a launcher passes on
        "print('still here', flush=True)\nsignals.SAME_SECONDS = 0.0\n"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    process = child(twice)
    printed, _ = process.communicate(timeout=120)
    assert (process.returncode, printed) == (130, "still here\nabandoned 2\n")


def test_a_forked_worker_does_not_answer_for_its_parent() -> None:
    code = (
        "pid = os.fork()\n"
        "if pid == 0:\n    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2); os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), watch.received, flush=True); os._exit(0)\n"
    )
    printed, _ = child(code).communicate(timeout=120)
    assert printed == "7 None\n"


def assert_stopped_together(run, output: Path, name: str, step: int | None = None) -> None:
    try:
        code = run.process.wait(timeout=180)
    except subprocess.TimeoutExpired:
        pytest.fail(run.printed[-4000:])
    signalled = time.monotonic()
    while run.left() and time.monotonic() - signalled < ENDED_SECONDS:
        time.sleep(0.05)
    assert run.left() == []
    assert code != 0
    ranks = sorted(output.glob("left-*"))
    steps = {int(path.read_text()) for path in ranks}
    assert len(steps) == 1, run.printed[-4000:]
    (stopped,) = steps
    assert step is None or stopped == step
    assert stopped in checkpoints(output), run.printed[-4000:]
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("interrupted", stopped)
    assert f"stopped by {name} at step {stopped}: checkpoint-{stopped} is saved" in run.printed
    assert run.printed.count("stopped by ") == 1, "one rank prints"


def test_a_signal_to_one_rank_stops_both_at_one_step(launched, tmp_path: Path) -> None:
    run = launched("accelerate", fault="SIGTERM", fault_target="1")
    assert_stopped_together(run, tmp_path / "run", "SIGTERM", 3)
    assert len(list((tmp_path / "run").glob("left-*"))) == 2


@pytest.mark.faults
@pytest.mark.parametrize(("name", "target"), [("SIGTERM", "0"), ("SIGTERM", "1"), ("SIGTERM", "all"),
                                              ("SIGINT", "0"), ("SIGTERM", "launcher")])  # fmt: skip
def test_a_signal_before_training_ends_both_at_once(launched, tmp_path: Path, name: str, target: str) -> None:
    """One rank dies of it or leaves, the other waits for it to be built: both end, and nothing is left."""
    run = launched("torchrun", fault=name, fault_target=target, fault_place="build")
    assert run.process.wait(timeout=180) != 0
    ended = time.monotonic()
    while run.left() and time.monotonic() - ended < ENDED_SECONDS:
        time.sleep(0.05)
    assert run.left() == []
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "rows"}
    if target == "0":
        assert run.printed.count("stopped by SIGTERM outside of training\n") == (name == "SIGTERM")
        assert "error: " not in run.printed.replace("error: <N/A>", ""), run.printed[-3000:]


@pytest.mark.faults
@pytest.mark.parametrize("place", ["step", "evaluation", "save"])
@pytest.mark.parametrize("target", ["launcher", "0", "1", "all"])
def test_signals_to_any_process_at_any_place(launched, tmp_path: Path, target: str, place: str) -> None:
    run = launched("torchrun", fault="SIGTERM", fault_target=target, fault_place=place)
    assert_stopped_together(
        run, tmp_path / "run", "SIGTERM", None if target == "launcher" else {"step": 3}.get(place, 5)
    )
    assert len(list((tmp_path / "run").glob("left-*"))) == 2


@pytest.mark.faults
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_other_signals_to_all_ranks(launched, tmp_path: Path, name: str) -> None:
    target = "all" if name == "SIGINT" else "1"  # torchrun itself dies of SIGUSR1
    run = launched("torchrun", fault=name, fault_target=target)
    assert_stopped_together(run, tmp_path / "run", name, 3)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("launcher", "name"), [("accelerate-1", "SIGTERM"), ("accelerate-1", "SIGKILL"), ("torchrun", "SIGTERM")]
)
def test_a_dead_launcher_leaves_no_orphan(launched, tmp_path: Path, launcher: str, name: str) -> None:
    run = launched(launcher, fault=name, fault_target="launcher")
    assert_stopped_together(run, tmp_path / "run", "SIGTERM")


@pytest.mark.faults
def test_a_killed_torchrun_leaves_no_orphan_and_no_half_checkpoint(launched, tmp_path: Path) -> None:
    """It takes the ranks' store with it, so that they cannot agree on a new checkpoint: the last one stays."""
    run = launched("torchrun", fault="SIGKILL", fault_target="launcher", fault_step=7)
    run.process.wait(timeout=180)
    killed = time.monotonic()
    while run.left() and time.monotonic() - killed < ENDED_SECONDS:
        time.sleep(0.05)
    assert run.left() == []
    assert 5 in checkpoints(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] in ("failed", "interrupted")
