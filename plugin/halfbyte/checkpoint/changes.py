"""Which options decide a run's trajectory, and what a resume may change of them."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint.manifest import Manifest
from halfbyte.errors import UserError
from halfbyte.tracking.redaction import redact

# Options that leave the weights, the optimizer and the order of the data as they are. Every other option
# counts, those of a stranger's recipe among them. Evaluation draws no random numbers here: see `exactness`.
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
    return hashlib.sha256(json.dumps(relevant(config), sort_keys=True).encode()).hexdigest()


def refuse(
    manifest: Manifest, now: Mapping[str, Any], allowed: Sequence[str] | None, where: str
) -> list[str]:
    """Hold ``now`` against what the checkpoint was made with; return a line for each change that is allowed.

    ``now`` holds options, ``world_size``, or fingerprints of the inputs; a key that either side lacks is not
    compared. Raises :class:`UserError` with the difference when ``allowed`` does not name what changed.
    """
    then = {**relevant(manifest.config), "world_size": manifest.world_size, **manifest.inputs}
    now = relevant(now)
    changed = {key: (then[key], now[key]) for key in now.keys() & then.keys() if then[key] != now[key]}
    refused = sorted(changed.keys() - set(allowed or ()))
    if refused:
        lines = [f"  {key}: {_short(changed[key][0])} -> {_short(changed[key][1])}" for key in refused]
        if len(lines) > _SHOWN:
            lines = [*lines[:_SHOWN], f"  ... and {len(lines) - _SHOWN} more"]
        raise UserError(
            "\n".join(
                [
                    f"{where} was made with other options; going on with these would be another run:",
                    *lines,
                    f"write the old values, or allow it: --allow_config_change {' '.join(refused)}",
                ]
            )
        )
    return [
        f"changed by allow_config_change: {key}: {_short(then)} -> {_short(new)}"
        for key, (then, new) in sorted(changed.items())
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
    """Refuse names in ``allow_config_change`` that nothing goes by."""
    known = {*config, "world_size", "data", "base", "chat_template"}
    for key in allowed or ():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"allow_config_change: {key!r} is no option{hint}")


def _short(value: Any, width: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."
