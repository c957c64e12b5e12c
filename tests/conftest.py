"""Shared fixtures: the offline environment, and tiny models saved once for the whole run."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    WANDB_MODE="disabled",
    # Bases of tiny models are no use to anyone's later runs.
    XDG_CACHE_HOME=tempfile.mkdtemp(prefix="halfbyte-cache-"),
)

import pytest
import torch

from tests.tiers import is_quick

torch.set_num_threads(1)
# A shell in the background and nohup leave these ignored, and a run that inherits that is right not to stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Not by `item.keywords`, which has the names of folders as well.
        if is_quick(item.nodeid) and not {"distributed", "faults"} & {m.name for m in item.iter_markers()}:
            item.add_marker(pytest.mark.quick)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_environment() -> Iterator[None]:
    """`Dataset.map` by several processes puts a copy in the place of ``os.environ``; rich reads the first one."""
    kept = os.environ
    yield
    os.environ = kept  # noqa: B003


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model_dir("llama")``: the directory of a tiny random model with its tokenizer."""
    from tests import tiny

    saved: dict[tuple, Path] = {}

    def get(arch: str = "llama", **options) -> Path:
        key = (arch, *sorted(options.items()))
        if key not in saved:
            saved[key] = tiny.save_model(tmp_path_factory.mktemp(arch), arch, **options)
        return saved[key]

    return get


pytest_plugins = ["tests.checkpoint.fixtures"]
