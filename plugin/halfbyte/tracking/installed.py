"""Whether the trackers of `report_to` could start here, and what to install where one could not."""

from collections.abc import Iterable

from transformers.integrations import get_available_reporting_integrations

from halfbyte.errors import UserError
from halfbyte.tracking.wandb_login import check_wandb

_INSTALL = {
    "azure_ml": "`pip install azureml-sdk`, and no mlflow beside it",
    "clearml": "`pip install clearml`",
    "codecarbon": "`pip install codecarbon`",
    "comet_ml": "`pip install comet-ml`, and set COMET_API_KEY",
    "dagshub": "`pip install dagshub mlflow`",
    "dvclive": "`pip install dvclive`",
    "flyte": "not supported by this version of transformers",
    "kubeflow": "set KUBEFLOW_TRAINER_SERVER_URL, as its trainer does",
    "mlflow": "`pip install mlflow`, and leave DISABLE_MLFLOW_INTEGRATION unset",
    "neptune": "`pip install neptune`",
    "swanlab": "`pip install swanlab`",
    "tensorboard": "`pip install tensorboard`, or tensorboardX to write its files only",
    "trackio": "`pip install trackio`",
    "wandb": "`pip install wandb`",
}


def check_trackers(report_to: str | Iterable[str] | None) -> None:
    """Raise :class:`UserError` for the trackers of ``report_to`` that could not start here; connects nowhere."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if missing := sorted({*names} - {"none", "all", *get_available_reporting_integrations()}):
        hints = "; ".join(dict.fromkeys(_INSTALL[name] for name in missing if name in _INSTALL))
        raise UserError(
            f"{', '.join(missing)}: not installed here; {hints or 'install it'}, or leave it out",
            option="report_to",
        )
    check_wandb(names)
