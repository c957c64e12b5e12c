"""What the configuration tests share: option classes like a run's, and the words of a refusal."""

from dataclasses import dataclass, field

import pytest
from trl import DPOConfig, ModelConfig, SFTConfig
from trl.scripts.utils import DatasetMixtureConfig

from halfbyte.config import RunArguments, Settings, read
from halfbyte.errors import UserError


@dataclass
class FourBit(ModelConfig):
    load_in_4bit: bool = field(default=True)
    use_peft: bool = field(default=True)


CLASSES = (RunArguments, SFTConfig, FourBit, DatasetMixtureConfig)
DPO = (RunArguments, DPOConfig, FourBit, DatasetMixtureConfig)


def parse(*argv: str, classes: tuple[type, ...] = CLASSES, **options: object) -> Settings:
    return read(list(argv), classes, prog="halfbyte sft", **options)  # type: ignore[arg-type]


def refusal(call, *arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert len(text.splitlines()) <= 10
    return text
