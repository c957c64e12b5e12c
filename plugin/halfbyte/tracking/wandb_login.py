"""Whether a W&B run could start here: a login, or offline or disabled by the environment."""

from collections.abc import Iterable

from wandb.errors import AuthenticationError
from wandb.sdk import wandb_setup
from wandb.sdk.lib import wbauth

from halfbyte.errors import UserError


def check_wandb(report_to: str | Iterable[str] | None) -> None:
    """Raise :class:`UserError` if ``report_to`` names wandb and no run could start; prompts and connects nowhere.

    That is so without a login, unless W&B is offline or disabled.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if not {"wandb", "all"}.intersection(names):
        return
    try:
        ready = wandb_ready()
    except AuthenticationError as error:
        raise UserError(
            f"wandb: {error}. Log in again with `wandb login --relogin`.", option="report_to"
        ) from None
    if not ready:
        raise UserError(
            "wandb: there is no W&B login on this machine. Run `wandb login`, or set\n"
            "WANDB_MODE=offline to record the run here and upload it later with `wandb sync`,\n"
            "or write `report_to: none`.",
            option="report_to",
        )


def wandb_ready() -> bool:
    """Return whether a W&B run could start without a prompt: a login, or offline or disabled by the environment.

    Raises ``wandb.errors.AuthenticationError`` if the login that was found is malformed.
    """
    # The public wandb.login() prompts on a terminal; these are what it calls before it does.
    settings = wandb_setup.singleton().settings
    if settings.mode in ("offline", "dryrun", "disabled"):
        return True
    login = wbauth.authenticate_session(
        host=settings.base_url, source="halfbyte", prompt=False, update_session=False
    )
    return login is not None


def wandb_missing() -> str | None:
    """Return why no W&B run could start here, or None."""
    try:
        return None if wandb_ready() else "no login found"
    except AuthenticationError as error:
        return f"invalid W&B credentials ({error})"
