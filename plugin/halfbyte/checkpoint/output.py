"""The output directory: claimed without losing what it holds, and the final weights renamed into it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import Trainer

from halfbyte.checkpoint.resume import Resume
from halfbyte.files import follow_umask, next_free, remove_leftovers

_ADAPTER = "default"


def claim(output_dir: str, resume: Resume, *, overwrite: bool) -> list[str]:
    """Make ``output_dir`` this run's, on rank 0; a barrier. Return lines to print about what was moved.

    With ``overwrite`` what it holds is moved aside first; what lies after the checkpoint of a resume is set aside.
    """
    lines: list[str] = []
    if PartialState().is_main_process:
        directory = Path(output_dir)
        if overwrite and directory.is_dir() and any(directory.iterdir()):
            moved = next_free(directory.parent, f"{directory.name}.")
            directory.rename(moved)
            lines.append(f"the earlier run in {output_dir} is now in {moved}")
        directory.mkdir(parents=True, exist_ok=True)
        for folder in (directory, directory / "plots"):
            remove_leftovers(folder)
        lines += resume.prepare(output_dir)
    PartialState().wait_for_everyone()
    return lines


@contextlib.contextmanager
def left_as_it_was(output_dir: str) -> Iterator[None]:
    """Remove ``output_dir`` again if a block that fails made it: a Trainer does while it is constructed."""
    directory = Path(output_dir)
    there = directory.exists()
    try:
        yield
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):  # not made, removed by another rank, or not empty after all
                directory.rmdir()
        raise


def save_final(
    trainer: Trainer, output_dir: str, weights: dict[str, torch.Tensor] | None = None
) -> list[str]:
    """Write the trained weights and the tokenizer into ``output_dir``: written aside, then renamed.

    An adapter run writes PEFT's format, without the frozen reference adapter of a preference run; a
    full-parameter run writes the model. ``weights`` are the model's, gathered, where ranks hold shards.
    Returns the names of the files; only rank 0 has any.
    """
    names: list[str] = []
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        pending = Path(output_dir) / ".pending"
        shutil.rmtree(pending, ignore_errors=True)
        if isinstance(model, PeftModel):
            model.save_pretrained(pending, selected_adapters=[_ADAPTER], state_dict=weights)
        else:
            model.save_pretrained(pending)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(pending)
        # PEFT writes a model card of its own; the run's is written at the end.
        (pending / "README.md").unlink(missing_ok=True)
        follow_umask(pending)
        for file in sorted(pending.iterdir()):
            file.replace(Path(output_dir) / file.name)
            names.append(file.name)
        pending.rmdir()
    trainer.accelerator.wait_for_everyone()
    return names
