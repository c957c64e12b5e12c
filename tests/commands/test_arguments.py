"""What a command cannot take or read is said in a sentence with exit code 2, and nothing is written."""

import shlex
from pathlib import Path

import pytest

from halfbyte.cli import main

FILES = {
    "file": b"x",
    "damaged/run.json": b"{",
    "listed/run.json": b"[]",
    "outside/run.json": b'{"files": {"../x": {"size": 1, "sha256": ""}}}',
    "counted/run.json": b'{"files": 3}',
    "utf16.yaml": b"\xff\xfea\0",
    "nul.yaml": b"a: \0",
    "deep.yaml": b"[" * 100_000,
    "date.yaml": b"a: 2020-13-45",
    "long.yaml": b"#" * 2_000_000,
    "list.yaml": b"- 1",
    "words.yaml": b"num_processes: many\ndistributed_type: MULTI_GPU",
    "machines.yaml": b"num_machines: 0\ndistributed_type: MULTI_GPU",
    "nested.yaml": b"fsdp_config: 3\ndistributed_type: FSDP",
    "no_launch.sh": b"echo",
    "job.yaml": b"kind: TrainJob\nspec: 3",
}
LONG = "x" * 300
REFUSED = {
    "verify": "the following arguments are required: DIR",
    "verify nowhere": "cannot read nowhere: No such file or directory",
    "verify file": "cannot read file: Not a directory",
    "verify file/x": "cannot read file/x: Not a directory",
    f"verify {LONG}": "File name too long",
    "verify 'a\0b'": "cannot read",
    "verify damaged": "damaged/run.json is damaged",
    "verify listed": "listed/run.json is damaged",
    "verify outside": "outside/run.json is damaged",
    "verify counted": "counted/run.json is damaged",
    "verify -- -x": "cannot read -x",
    "verify a b": "unknown argument b",
    "doctor --launch": "expected one argument",
    "doctor --launch=": "--launch: no file .",
    "doctor --launch nowhere.yaml": "--launch: no file nowhere.yaml",
    "doctor --launch damaged": "--launch: no file damaged",
    f"doctor --launch {LONG}": "File name too long",
    "doctor --launch utf16.yaml": "--launch: cannot read utf16.yaml",
    "doctor --launch nul.yaml": "--launch: nul.yaml is not valid YAML",
    "doctor --launch deep.yaml": "--launch: deep.yaml is not valid YAML",
    "doctor --launch date.yaml": "--launch: date.yaml is not valid YAML",
    "doctor --launch long.yaml": "--launch: cannot read long.yaml",
    "doctor --launch list.yaml": "list.yaml is not a configuration of accelerate",
    "doctor --launch words.yaml": "words.yaml has a value of the wrong type",
    "doctor --launch machines.yaml": "machines.yaml has a value of the wrong type",
    "doctor --launch nested.yaml": "nested.yaml has a value of the wrong type",
    "doctor --launch job.yaml": "job.yaml has a value of the wrong type",
    "doctor --launch no_launch.sh": "does not call `accelerate launch --config_file FILE`",
    "doctor x": "unknown argument x",
    "cache": "the following arguments are required",
    "cache clear": "invalid choice: 'clear'",
    "cache ls x": "ls takes no KEY",
    "cache rm": "rm takes KEY... or --all",
    "cache rm --all x": "unknown argument x",
    "cache rm ''": "nothing is stored as ''",
    "cache rm ../file": "nothing is stored as '../file'",
    "runs": "the following arguments are required: DIR",
    "runs nowhere": "nowhere: cannot be read: No such file or directory",
    "runs damaged": "run.json is damaged",
    "runs counted": "run.json is damaged, or not one of halfbyte's",
    "runs 'a\0b'": "cannot be read",
    f"runs {LONG}": "File name too long",
    "runs file": "file: cannot be read: Not a directory",
    "plot": "the following arguments are required: DIR",
    "plot damaged": "run.json is damaged",
    "plot damaged --smooth x": "argument --smooth: invalid float value: 'x'",
    "recipes x": "unknown argument x",
    "recipes --json=3": "ignored explicit argument '3'",
    "demo x": "unknown argument x",
    "demo --output_dir": "expected one argument",
    "demo --output_dir file": "is a file; name a directory",
    "demo --output_dir file/x": "Not a directory",
    "demo --output_dir .": "holds counted, which is not a demo's",
    "demo --output_dir=": "holds counted, which is not a demo's",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(shlex.split(line)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert REFUSED[line] in printed.err
    assert len(printed.err.splitlines()) <= 2  # the sentence, and the usage of the command
    assert sorted(tmp_path.rglob("*")) == before
