"""Which options decide a run's trajectory, and what a resume may change of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint.manifest import Manifest
from halfbyte.errors import UserError
from halfbyte.files import digest_of
from halfbyte.tracking.redaction import redact
from halfbyte.wording import shorten, suggestion

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
        "per_device_eval_batch_size",
        "prediction_loss_only",
        "project",
        "push_to_hub",
        "report_to",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
        "run_name",
        "skip_memory_metrics",
        "torch_empty_cache_steps",
        "trust_remote_code",
    }
)
_SHOWN = 6


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


def compare(
    manifest: Manifest | None, where: str | None, allowed: Sequence[str] | None, now: Mapping[str, Any]
) -> list[str]:
    """Compare ``now`` with what the checkpoint ``where`` was made with; return a line for each allowed change.

    ``now`` holds options, ``world_size``, or fingerprints of the inputs; a key that either side lacks is not
    compared, and without a ``manifest`` nothing is. Raises :class:`UserError` with the difference when ``allowed``
    does not name what changed.
    """
    if manifest is None:
        return []
    then = {**relevant(manifest.config), "world_size": manifest.world_size, **manifest.inputs}
    now = relevant(now)
    changed = {key: (then[key], now[key]) for key in now.keys() & then.keys() if then[key] != now[key]}
    refused = sorted(changed.keys() - set(allowed or ()))
    if refused:
        lines = [f"  {key}: {_arrow(*changed[key])}" for key in refused]
        if len(lines) > _SHOWN:
            lines = [*lines[:_SHOWN], f"  ... and {len(lines) - _SHOWN} more"]
        raise UserError(
            "\n".join(
                [
                    f"{where} was made with other options; resuming with these would change the run:",
                    *lines,
                    f"write the old values, or allow it: --allow_config_change {' '.join(refused)}",
                ]
            )
        )
    return [
        f"changed by allow_config_change: {key}: {_arrow(*values)}" for key, values in sorted(changed.items())
    ]


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
