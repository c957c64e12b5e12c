"""Which options decide a run's trajectory, and what a resume may change of them."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from halfbyte.checkpoint.manifest import Manifest
from halfbyte.errors import UserError
from halfbyte.files import digest_of
from halfbyte.terminal.redaction import redact
from halfbyte.terminal.wording import shorten, suggestion

# Options that leave the weights, the optimizer and the order of the data as they are. Every other option
# counts, those of third-party recipes among them. Evaluation draws no random numbers here: see `ExactResume`.
_HARMLESS_PREFIXES = ("eval_", "hub_", "log_", "logging_", "save_", "trackio_", "dataloader_p")
_HARMLESS = frozenset(
    {
        "allow_config_change",
        "batch_eval_metrics",
        "bf16_full_eval",
        "dataloader_in_order",
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataset_num_proc",
        "dataset_test_split",
        "ddp_timeout",
        "debug",
        "disable_tqdm",
        "do_eval",
        "do_predict",
        "do_train",
        "enable_jit_checkpoint",
        "fp16_full_eval",
        "greater_is_better",
        "include_for_metrics",
        "include_num_input_tokens_seen",
        "load_best_model_at_end",
        "local_rank",
        "metric_for_best_model",
        "on_nonfinite",
        "on_oom",
        "output_dir",
        "overwrite_output_dir",
        "peak_flops",
        "per_device_eval_batch_size",
        "prediction_loss_only",
        "project",
        "push_to_hub",
        "report_to",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
        "run_name",
        "sample_max_new_tokens",
        "sample_prompts",
        "sample_steps",
        "skip_memory_metrics",
        "torch_empty_cache_steps",
        "trust_remote_code",
    }
)
_SHOWN = 6

# Options that no resume may change: what they decided at step 0 is in the checkpoint, and nothing reads them again.
_SHAPES = "it decides the shapes of the adapter and of its optimizer state"
_START = "it decided how the adapter began at step 0"
_OPTIMIZER = "it decides what the optimizer state consists of"
_FIXED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "additional_special_tokens",
            "lora_exclude_modules",
            "lora_modules_to_save",
            "lora_r",
            "lora_target_modules",
            "lora_target_parameters",
            "lora_task_type",
            "use_dora",
            "use_peft",
        ),
        _SHAPES,
    ),
    "init_lora_weights": _START,
    **dict.fromkeys(("loraplus_lr_ratio", "optim", "optim_args", "optim_target_modules"), _OPTIMIZER),
}
# Options that optimizer and schedule keep in their state: see `halfbyte.trainer.changed_options`.
_RATES = (
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "warmup_steps",
)
_IN_STATE = (*_RATES, "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
# Schedules whose learning rate follows from what the run has seen, not from the step alone.
_WITH_HISTORY = ("greedy", "reduce_lr_on_plateau")


def relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``config`` that decide the trajectory, redacted and in JSON's types."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in _HARMLESS and not key.startswith(_HARMLESS_PREFIXES)
    }
    return dict(json.loads(json.dumps(redact(kept))))


def config_hash(config: Mapping[str, Any]) -> str:
    """One hash over the options that decide the trajectory."""
    return digest_of(relevant(config))


def fixed(strategy: str, now: Mapping[str, Any], manifest: Manifest | None) -> dict[str, str]:
    """Options that this resume cannot change even where it is allowed, each with the reason."""
    found = dict(_FIXED)
    if strategy == "zero3":
        found.update(dict.fromkeys(_IN_STATE, "DeepSpeed restores it with the optimizer state"))
    schedules = {str(now.get("lr_scheduler_type"))}
    if manifest is not None:
        schedules.add(str(manifest.config.get("lr_scheduler_type")))
    if schedule := next((name for name in _WITH_HISTORY if name in schedules), None):
        found.update(dict.fromkeys(_RATES, f"the learning rate of {schedule} depends on the steps before"))
    return found


def differences(manifest: Manifest, now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What of ``now`` a checkpoint was made with otherwise: by key, the value then and the value now.

    ``now`` holds options, ``world_size``, or fingerprints of the inputs; a key that either side lacks is not compared.
    """
    then = {**relevant(manifest.config), "world_size": manifest.world_size, **manifest.inputs}
    now = relevant(now)
    return {key: (then[key], now[key]) for key in now.keys() & then.keys() if then[key] != now[key]}


def compare(
    manifest: Manifest | None,
    where: str | None,
    allowed: Sequence[str] | None,
    now: Mapping[str, Any],
    fixed: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Compare ``now`` with what the checkpoint ``where`` was made with; return a line for each allowed change.

    ``fixed`` are keys that cannot be allowed, with the reasons. Without a ``manifest`` nothing is compared; see
    :func:`differences`. Raises :class:`UserError` with the difference when ``allowed`` does not name what changed.
    """
    if manifest is None:
        return []
    changed = differences(manifest, now)
    if impossible := sorted(changed.keys() & fixed.keys()):
        lines = _some([f"  {key}: {_arrow(*changed[key])} ({fixed[key]})" for key in impossible])
        raise UserError(
            "\n".join(
                [
                    f"{where} cannot be resumed with other values of these, not even by allow_config_change:",
                    *lines,
                    "write the old values, or start another run in a new output_dir",
                ]
            )
        )
    refused = sorted(changed.keys() - set(allowed or ()))
    if refused:
        raise UserError(
            "\n".join(
                [
                    f"{where} was made with other options; resuming with these would change the run:",
                    *_some([f"  {key}: {_arrow(*changed[key])}" for key in refused]),
                    f"write the old values, or allow it: --allow_config_change {' '.join(refused)}",
                ]
            )
        )
    return [
        f"changed by allow_config_change from step {manifest.step + 1} on: {key}: {_arrow(*values)}"
        for key, values in sorted(changed.items())
    ]


def _some(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return lines if more <= 0 else [*lines[:_SHOWN], f"  ... and {more} more"]


def other_versions(manifest: Manifest, now: Mapping[str, str]) -> list[str]:
    """A line when other versions of the libraries are installed than those that wrote the checkpoint."""
    changed = [
        f"{name} {then} -> {now[name]}"
        for name, then in manifest.versions.items()
        if name in now and now[name] != then
    ]
    return [f"resume: other versions, so it may not be bit for bit: {', '.join(changed)}"] if changed else []


def check_keys(allowed: Sequence[str] | None, config: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for a name in ``allow_config_change`` that is not an option."""
    known = {*config, "world_size", "data", "base", "chat_template"}
    for key in allowed or ():
        if key not in known:
            raise UserError(f"{key!r} is not an option{suggestion(key, known)}", option="allow_config_change")


def _arrow(then: Any, now: Any) -> str:
    return f"{shorten(json.dumps(then))} -> {shorten(json.dumps(now))}"
