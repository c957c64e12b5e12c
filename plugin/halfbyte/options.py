"""The options of one run as they were decided, and the dataclasses that they make."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from trl import DatasetMixtureConfig

from halfbyte.config import RunArguments, Settings
from halfbyte.plugin import QLoRAPlugin
from halfbyte.resolve import Decisions
from halfbyte.trainer.build import with_values

# Names that a run gives, and does not read.
_NO_INPUTS = frozenset({"output_dir", "run_name", "hub_model_id", "project"})


def _texts(value: Any) -> Iterator[str]:
    """Every text in the value of an option: data_files in a part of a mixture, a file of the accelerator's."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _texts(item))
    elif is_dataclass(value):
        yield from _texts(vars(value))


@dataclass(frozen=True)
class Options:
    """Every option with its value, and the instances of the dataclasses that declare them.

    ``args`` are the trainer's, with what holds for this session only.
    """

    settings: Settings
    script: RunArguments
    args: Any
    plugin: QLoRAPlugin
    mixture: DatasetMixtureConfig

    def paths(self, decisions: Decisions) -> list[str]:
        """What the run reads: names that may be paths, the configuration's file and all that it names among them."""
        named = [
            decisions.base,
            decisions.adapter,
            self.settings["model_name_or_path"],
            self.script.dataset_name,
        ]
        named += [getattr(self.args, "chat_template_path", None), self.settings["resume_from_checkpoint"]]
        given = self.settings.given
        named += [source.file for source in given.values()]
        named += [text for key in given if key not in _NO_INPUTS for text in _texts(self.settings[key])]
        return list(dict.fromkeys(str(name) for name in named if name))

    @classmethod
    def decided(cls, settings: Settings, decisions: Decisions) -> "Options":
        """The options that ``decisions`` make of ``settings``.

        Two training arguments are never the user's to decide, and are not recorded. The hub token moves to where
        huggingface_hub looks for it: checkpoints store the arguments. The Trainer's filter logs a loss that is not
        finite as 0.0, and reads each loss back from the device.
        """
        settings = settings.with_values(**decisions.values)
        script, args, plugin, mixture = settings.build()
        if args.hub_token is not None:
            os.environ["HF_TOKEN"] = args.hub_token
        args = with_values(args, {**decisions.session, "hub_token": None, "logging_nan_inf_filter": False})
        return cls(settings, script, args, plugin, mixture)
