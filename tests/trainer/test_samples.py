"""Completions while training: what they are, and that training does not notice them."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from halfbyte import QLoRAPlugin
from halfbyte.trainer import completions, samples
from halfbyte.trainer.completions import complete
from tests import plain_trl, tiny
from tests.checkpoint.runs import ROWS, Finished, assert_equal, interrupted, options, run
from tests.launch import accelerate

ModelDir = Callable[..., Path]
PROMPTS = ["the quick fox", "one two three four"]
NEW = 12


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return str(path)


def rounds(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def sampled(finished: Finished, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run once more, with samples every third step."""
    output = tmp_path_factory.mktemp("sampled") / "run"
    given = {"sample_prompts": prompts, "sample_steps": "3", "sample_max_new_tokens": str(NEW)}
    assert run("sft", finished.options(output, **given)) == 0
    return output


def test_training_does_not_notice(finished: Finished, sampled: Path) -> None:
    assert_equal(finished.output, sampled)
    assert [(row["step"], row["number"]) for row in rounds(sampled)] == [(3, 1), (3, 2), (6, 1), (6, 2)]
    assert [row["prompt"] for row in rounds(sampled)] == PROMPTS * 2


def test_a_resumed_run_has_every_round_once(
    finished: Finished, sampled: Path, prompts: str, tmp_path: Path
) -> None:
    parts = interrupted(sampled, tmp_path / "parts", 4)
    text = (sampled / "samples.jsonl").read_text()
    (parts / "samples.jsonl").write_text(text + '{"step": 6, "num')
    given = {"sample_prompts": prompts, "sample_steps": "3", "sample_max_new_tokens": str(NEW)}
    assert run("sft", finished.options(parts, **given), "--resume_from_checkpoint", "auto") == 0
    assert_equal(sampled, parts)
    assert (parts / "samples.jsonl").read_text() == text
    assert len((parts / "_earlier" / "1" / "samples.jsonl").read_text().splitlines()) == 5


def test_completions_are_those_of_plain_libraries(finished: Finished, sampled: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sampled)
    model = PeftModel.from_pretrained(plain_trl.base(finished.model), sampled).eval()
    for prompt, row in zip(PROMPTS, rounds(sampled)[2:], strict=True):
        turns = [{"role": "user", "content": prompt}]  # the rows are conversations
        given = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        made = model.generate(
            **given, max_new_tokens=NEW, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=3
        )
        expected = tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["completion"] == expected


@pytest.mark.faults
def test_a_signal_cuts_a_round_off_and_the_resumed_run_makes_up_for_it(
    finished: Finished, sampled: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, calls = tmp_path / "run", []

    def stopped(*args: Any, ends: Callable[[], bool], **kwargs: Any) -> Any:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        while not ends():
            time.sleep(0.01)
        return complete(*args, ends=ends, **kwargs)

    monkeypatch.setattr(samples, "complete", stopped)
    given = {"sample_prompts": prompts, "sample_steps": "3", "sample_max_new_tokens": str(NEW)}
    assert run("sft", finished.options(output, **given)) == 128 + signal.SIGTERM
    assert not (output / "samples.jsonl").exists()
    monkeypatch.setattr(samples, "complete", complete)
    assert run("sft", finished.options(output, **given), "--resume_from_checkpoint", "auto") == 0
    assert calls == [1]
    assert rounds(output) == rounds(sampled)
    weights = "adapter_model.safetensors"
    assert (output / weights).read_bytes() == (sampled / weights).read_bytes()


@pytest.mark.faults
def test_rounds_that_take_too_long_or_fail_stop_nothing(
    finished: Finished, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, caplog
) -> None:
    output, limits = tmp_path / "run", iter([-1.0, 60.0])

    def failing(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(samples, "SECONDS", next(limits))
        if samples.SECONDS > 0:
            raise RuntimeError("no kernel")
        return complete(*args, **kwargs)

    monkeypatch.setattr(samples, "complete", failing)
    given = {"sample_prompts": prompts, "sample_steps": "1", "max_steps": "3"}
    assert run("sft", finished.options(output, **given)) == 0
    assert "step 1: 2 prompts of sample_prompts left out after -1 s" in capsys.readouterr().err
    assert [record.message for record in caplog.records if record.name.startswith("halfbyte")] == [
        "step 2: sample_prompts failed, and is left out from here on: RuntimeError: no kernel"
    ]
    assert not (output / "samples.jsonl").exists()


def pairs(finished: Finished, tmp_path: Path, recipe: str, **more: str) -> Path:
    """Train from the finished run's adapter, evaluating at every step and before the first."""
    rows, output = (
        tiny.write_rows(tmp_path / "rows", ROWS[recipe](12)),
        tmp_path / ("run" if more else "plain"),
    )
    evaluated = {
        "eval_strategy": "steps",
        "eval_steps": "1",
        "eval_on_start": "true",
        "learning_rate": "1e-1",
    }
    given = {"adapter_name_or_path": str(finished.output), "save_steps": "2", "max_steps": "2", **evaluated}
    assert run(recipe, options(finished.model, rows, output, **given, **more)) == 0
    return output


def check_pairs(finished: Finished, tmp_path: Path, recipe: str) -> Path:
    output = pairs(finished, tmp_path, recipe, sample_prompts="test:3", sample_max_new_tokens=str(NEW))
    found, held_out = rounds(output), ROWS[recipe](12)[-4:]
    assert [(row["step"], row["number"]) for row in found] == [(s, n) for s in range(3) for n in (1, 2, 3)]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in held_out[:3]] * 3
    references = [row["reference"] for row in found]
    assert references == references[:3] * 3
    assert [row["completion"] for row in found[:3]] == references[:3]  # the policy starts as the reference
    assert [row["completion"] for row in found[6:]] != references[:3]
    return output


def test_dpo_has_its_reference_beside_it(finished: Finished, tmp_path: Path) -> None:
    check_pairs(finished, tmp_path, "dpo")


@pytest.mark.faults
@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_training_on_preferences_does_not_notice(finished: Finished, tmp_path: Path, recipe: str) -> None:
    sampled = check_pairs(finished, tmp_path, recipe)
    assert_equal(pairs(finished, tmp_path, recipe), sampled, 2)


@pytest.fixture(scope="module")
def trained(model_dir: ModelDir) -> Any:
    return QLoRAPlugin(dtype="float32", lora_r=4).load(str(model_dir("llama"))).train()


def _complete(model: Any, prompts: list[list[int]], **given: Any) -> list[completions.Completion]:
    options = {"stops": frozenset(), "pad": 3, "batch_size": 8, "ends": lambda: False, "max_new_tokens": 6}
    return complete(model, prompts, **{**options, **given})


def test_the_model_and_the_generators_are_as_before(trained: Any) -> None:
    layer = trained.base_model.model.model.layers[0]
    layer.eval()  # one module unlike the others

    def state() -> list[Any]:
        return [
            {name: module.training for name, module in trained.named_modules()},
            {name: parameter.requires_grad for name, parameter in trained.named_parameters()},
            trained.is_gradient_checkpointing,
            trained.config.to_dict(),
            trained.generation_config.to_dict(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ]

    before = state()
    found = _complete(trained, [[5, 6, 7], [8, 9]])
    assert all(len(completion.ids) == 6 for completion in found)
    assert state() == before
    layer.train()


def test_prompts_of_unequal_length_do_not_see_each_other(trained: Any) -> None:
    prompts = [[5, 6, 7, 40, 41, 42], [8, 9], [100]]
    together = _complete(trained, prompts)
    alone = [_complete(trained, [prompt])[0] for prompt in prompts]
    assert together == alone == _complete(trained, prompts, batch_size=2)


def test_why_a_completion_ends(trained: Any) -> None:
    (whole,) = _complete(trained, [[5, 6, 7]])
    assert whole.ended == "length"
    at = whole.ids.index(whole.ids[-1])
    (stopped,) = _complete(trained, [[5, 6, 7]], stops=frozenset({whole.ids[at]}))
    assert (stopped.ids, stopped.ended) == (whole.ids[:at], "stop")
    left = iter([False, False, False, True, True])
    found = _complete(trained, [[5, 6, 7], [5, 6]], batch_size=1, ends=lambda: next(left))
    assert [(completion.ids, completion.ended) for completion in found] == [(whole.ids[:3], "time")]


def test_a_prompt_that_leaves_no_room_is_refused(
    finished: Finished, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = {"sample_prompts": prompts, "sample_max_new_tokens": "250"}
    assert run("sft", finished.options(tmp_path / "run", **given)) == 2
    assert "prompt 1 has" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


REFUSED = {
    "no such file": ("sft", {"sample_prompts": "prompt.txt"}, "no such file; did you mean prompts.txt?"),
    "no such split": ("sft", {"sample_prompts": "tset:2"}, "no split 'tset'; did you mean test?"),
    "a scorer": ("reward", {"sample_prompts": "test:2"}, "completes none; take it out"),
    "steps alone": ("sft", {"sample_steps": "2"}, "sample_steps: has no effect without `sample_prompts`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused_before_training(
    finished: Finished, prompts: str, tmp_path: Path, case: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(prompts).parent)
    recipe, given, expected = REFUSED[case]
    assert run(recipe, finished.options(tmp_path / "run", **given)) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_rank_0_completes_for_both(model_dir: ModelDir, prompts: str, tmp_path: Path, recipe: str) -> None:
    rows = tiny.write_rows(tmp_path / "rows", ROWS[recipe](28))
    given = {"per_device_train_batch_size": "1", "eval_strategy": "steps", "eval_steps": "2"}
    more = {"sample_prompts": prompts, "sample_max_new_tokens": str(NEW)}
    outputs = tmp_path / "plain", tmp_path / "sampled"
    for output, extra in zip(outputs, ({}, more), strict=True):
        done = accelerate(recipe, *options(model_dir("llama"), rows, output, **given, **extra))
        assert done.returncode == 0, done.stderr[-4000:]
    assert_equal(*outputs)
    assert [(row["step"], row["number"]) for row in rounds(outputs[1])] == [
        (step, number) for step in (2, 4, 6) for number in (1, 2)
    ]
    assert done.stdout.count("step 2/6  sample 1") == 1
    parts = interrupted(outputs[1], tmp_path / "parts")
    again = [*options(model_dir("llama"), rows, parts, **given, **more), "--resume_from_checkpoint", "auto"]
    (parts / "samples.jsonl").write_text((outputs[1] / "samples.jsonl").read_text())
    done = accelerate(recipe, *again)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_equal(outputs[1], parts)
    assert rounds(parts) == rounds(outputs[1])


@pytest.mark.faults
def test_a_signal_to_the_rank_that_waits_cuts_the_round_off(
    saboteur_options: Callable[..., list[str]], sabotaged_site: str, prompts: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    given = {"max_steps": 4, "eval_strategy": "no", "sample_prompts": prompts, "sample_steps": 3}
    fault = ["--fault", "SIGTERM", "--fault_place", "step", "--fault_target", "1"]
    words = saboteur_options(**given)
    done = accelerate("saboteur", *words, *fault, PYTHONPATH=sabotaged_site)
    assert "stopped by SIGTERM at step 3: checkpoint-3 is saved" in done.stderr, done.stderr[-4000:]
    assert not (output / "samples.jsonl").exists()
    changed = ["--allow_config_change", "fault", "fault_place", "fault_target"]
    again = ["--resume_from_checkpoint", "auto", *changed]
    done = accelerate("saboteur", *words, *again, PYTHONPATH=sabotaged_site)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [(row["step"], row["number"]) for row in rounds(output)]
    assert found == [(3, 1), (3, 2), (4, 1), (4, 2)]
