"""The compute dtype: native bfloat16, float16 on older GPUs, the faster of two on CPUs."""

from pathlib import Path

import pytest
import torch

from halfbyte.quantization import Shape, choose_compute_dtype, dtype, shape_of

CUDA = torch.device("cuda", 0)
SHAPE = Shape(64, 128, 4)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_cuda_goes_by_compute_capability(capability: tuple[int, int], expected: torch.dtype) -> None:
    assert choose_compute_dtype(CUDA, capability=lambda _: capability) == expected


@pytest.mark.parametrize(("faster", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cpu_goes_by_measurement(faster: bool, expected: torch.dtype) -> None:
    assert choose_compute_dtype(torch.device("cpu"), bfloat16_is_faster=lambda _: faster) == expected


def test_the_cpu_measurement_runs() -> None:
    assert choose_compute_dtype(torch.device("cpu"), SHAPE) in (torch.bfloat16, torch.float32)
    times = dtype._best_times(SHAPE)
    assert times.keys() == {"bfloat16", "float32"}
    assert all(0 < seconds < 60 for seconds in times.values())


class Clock:
    """Times that are given, and how often they were asked for."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    def __call__(self, shape: Shape) -> dict[str, float]:
        self.asked += 1
        return dict(self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    made = Clock(bfloat16=1.0, float32=2.0)
    monkeypatch.setattr(dtype, "_best_times", made)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


def files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_the_cpu_is_measured_once(clock: Clock, tmp_path: Path) -> None:
    assert [dtype.cpu_bfloat16_is_faster(SHAPE) for _ in range(3)] == [True] * 3
    assert clock.asked == 1
    (kept,) = files(tmp_path)
    assert kept.parent == tmp_path / "halfbyte" / "dtype"


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"seconds": {"bfloat16": 1.0}}', '{"seconds": null}', "\x00"]
)
def test_a_corrupt_record_is_measured_again(clock: Clock, tmp_path: Path, content: str) -> None:
    dtype.cpu_bfloat16_is_faster(SHAPE)
    (kept,) = files(tmp_path)
    whole = kept.read_text()
    kept.write_text(content)
    assert dtype.cpu_bfloat16_is_faster(SHAPE)
    assert clock.asked == 2
    assert kept.read_text() == whole


def test_another_machine_is_measured_anew(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype.cpu_bfloat16_is_faster(SHAPE)
    for count, (name, value) in enumerate(
        [("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ATEN_CPU_CAPABILITY", "default")], start=2
    ):
        monkeypatch.setenv(name, value)
        clock.seconds["bfloat16"] = 3.0
        assert not dtype.cpu_bfloat16_is_faster(SHAPE)
        assert len(files(tmp_path)) == count
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    dtype.cpu_bfloat16_is_faster(SHAPE)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    dtype.cpu_bfloat16_is_faster(SHAPE)
    assert len(files(tmp_path)) == 5


def test_each_shape_is_timed_and_kept(clock: Clock, tmp_path: Path) -> None:
    """The same CPU is faster in bfloat16 with wide layers, and in float32 with narrow ones."""
    assert dtype.cpu_bfloat16_is_faster(Shape(4096, 14336, 32))
    clock.seconds["bfloat16"] = 3.0
    assert not dtype.cpu_bfloat16_is_faster(Shape(128, 512, 4))
    assert dtype.cpu_bfloat16_is_faster(Shape(4096, 14336, 32))
    assert dtype.cpu_bfloat16_is_faster(Shape(8192, 28672, 64))  # in the same proportions
    assert clock.asked == 2
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("arch", ["llama", "opt", "qwen3_moe"])
def test_the_shape_is_the_configuration_s(model_dir, arch: str) -> None:
    assert shape_of(str(model_dir(arch))) == Shape(64, 128, 4)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_configuration_that_says_nothing_is_no_error_here(tmp_path: Path, content: str | None) -> None:
    """Loading reports what is wrong with it."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert shape_of(str(tmp_path)) == Shape()
    assert shape_of("no/such-model") == Shape()


def test_a_cache_that_cannot_be_written_is_done_without(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "halfbyte").write_text("a file")
    assert [dtype.cpu_bfloat16_is_faster(SHAPE) for _ in range(2)] == [True] * 2
    assert clock.asked == 2
