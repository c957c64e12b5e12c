"""The options of one run as they were decided, and the dataclasses that they make."""

import os
from dataclasses import dataclass
from typing import Any

from trl import DatasetMixtureConfig

from halfbyte.config import RunArguments, Settings
from halfbyte.plugin import QLoRAPlugin
from halfbyte.resolve import Decisions
from halfbyte.trainer.build import with_values


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
        """What the run reads: names that may be paths."""
        named = [
            decisions.base,
            decisions.adapter,
            self.settings["model_name_or_path"],
            self.script.dataset_name,
        ]
        named += [getattr(self.args, "chat_template_path", None), self.settings["resume_from_checkpoint"]]
        named += [part.path for part in self.mixture.datasets or ()]
        return [str(name) for name in named if name]

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
