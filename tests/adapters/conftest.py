"""An adapter that SFT trained, for what continues from it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte import QLoRAPlugin
from tests.adapters.build import sft

ModelDir = Callable[..., Path]


@pytest.fixture(scope="session")
def sft_adapter(model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sft")
    trainer = sft(QLoRAPlugin(dtype="float32"), model_dir("llama"), output, max_steps=4, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(output))
    return output
