"""What a recipe shows of a run: figures in log lines and the closing summary, plots, and settings in the card.

Keys are those that TRL logs, without ``eval_``; a figure whose key no row has is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

_FORM = re.compile(r"[-+ ]?\d?,?(\.\d)?[a-zA-Z%]?")


@dataclass(frozen=True)
class Figure:
    """One number: ``key`` is TRL's name, ``form`` a format specification.

    ``logged`` puts it in the lines printed while training and evaluating. ``compared`` puts it in the closing summary,
    with its values before and after training, and beside those of other runs. ``better`` is which of two values is the
    better one; unset, it is as in transformers: the lesser of what ends in ``loss``, else the greater. ``scaled``: the
    recipe's settings and the tokens decide its scale, so that runs in which they differ are not compared by it.
    """

    key: str
    label: str
    form: str = ".3g"
    logged: bool = True
    compared: bool = False
    better: Literal["greater", "less", "neither"] | None = None
    scaled: bool = False

    @property
    def direction(self) -> Literal["greater", "less", "neither"]:
        """Which of two values is the better one."""
        return self.better or ("less" if self.key.endswith("loss") else "greater")


@dataclass(frozen=True)
class Plot:
    """One picture, ``plots/NAME.png``: ``keys`` are drawn in this order, each of training and of evaluation.

    ``bounds`` fix the vertical axis, ``chance`` draws a horizontal line, and ``noisy`` smooths a long training line.
    """

    name: str
    title: str
    label: str
    keys: tuple[str, ...]
    bounds: tuple[float, float] | None = None
    chance: float | None = None
    noisy: bool = True


@dataclass(frozen=True)
class Figures:
    """The figures in the order in which they are printed, the plots, and the options that the model card lists.

    The card lists the options that all recipes share; ``settings`` are the recipe's own, by their names.
    """

    figures: tuple[Figure, ...]
    plots: tuple[Plot, ...]
    settings: tuple[str, ...] = ()

    @property
    def logged(self) -> tuple[Figure, ...]:
        """The figures of a log line."""
        return tuple(figure for figure in self.figures if figure.logged)

    @property
    def compared(self) -> tuple[Figure, ...]:
        """The figures that the closing summary compares before and after training."""
        return tuple(figure for figure in self.figures if figure.compared)

    def as_dict(self) -> dict[str, Any]:
        """Return what run.json keeps, so that a run can be shown without its recipe."""
        return {
            "figures": _by_name(self.figures, "key"),
            "plots": _by_name(self.plots, "name"),
            "settings": list(self.settings),
        }

    @classmethod
    def from_dict(cls, found: Any) -> Self:
        """Return what :meth:`as_dict` made; raises KeyError, TypeError, ValueError or AttributeError for else."""
        figures = tuple(_figure(key, each) for key, each in found["figures"].items())
        plots = tuple(_plot(name, each) for name, each in found["plots"].items())
        return cls(figures, plots, tuple(map(str, found["settings"])))


def _figure(key: str, found: Mapping[str, Any]) -> Figure:
    form, better = found.get("form", ".3g"), found.get("better")
    if not _FORM.fullmatch(form) or better not in (None, "greater", "less", "neither"):
        raise ValueError(f"no figure of a recipe: {key}")
    flags = {name: bool(found[name]) for name in ("logged", "compared", "scaled") if name in found}
    return Figure(key, str(found["label"]), form, better=better, **flags)


def _plot(name: str, found: Mapping[str, Any]) -> Plot:
    if not re.fullmatch(r"\w[\w.-]*", name):  # a file's name
        raise ValueError(f"no plot of a recipe: {name}")
    low, high = map(float, found.get("bounds") or (0, 0))
    return Plot(
        name,
        str(found["title"]),
        str(found["label"]),
        tuple(map(str, found["keys"])),
        bounds=(low, high) if low < high else None,
        chance=None if found.get("chance") is None else float(found["chance"]),
        noisy=bool(found.get("noisy", True)),
    )


def _by_name(entries: tuple[Any, ...], name: str) -> dict[str, dict[str, Any]]:
    """The fields of ``entries`` that are no defaults, by the first; a value under the name `key` would be redacted."""
    return {
        getattr(each, name): {
            field.name: value
            for field in fields(each)
            if field.name != name and (value := getattr(each, field.name)) != field.default
        }
        for each in entries
    }


_ROUNDING = 1e-5  # of a reward, the mean over the pairs of a row of the log


def are_ties(row: Mapping[str, Any], key: str) -> bool:
    """Whether ``key`` is a preference accuracy that means ties: policy and reference are equal, but for rounding.

    So it is before the first step. TRL counts a tie as lost, and what rounding decides as won or lost: a reference that
    was computed ahead of training was computed in other batches.
    """
    prefix, found, _ = key.partition("rewards/accuracies")
    rewards = [row.get(f"{prefix}rewards/{side}") for side in ("chosen", "rejected")]
    return bool(found) and all(each is not None and abs(each) < _ROUNDING for each in rewards)


LOSS = Figure("loss", "loss", ".4g", compared=True, scaled=True)
LEARNING_RATE = Figure("learning_rate", "lr", ".1e")
GRAD_NORM = Figure("grad_norm", "grad", ".2g")
TOKEN_ACCURACY = Figure("mean_token_accuracy", "token accuracy", ".3f", compared=True, scaled=True)
REWARD_ACCURACY = Figure("rewards/accuracies", "accuracy", ".3f", compared=True)
MARGIN = Figure("rewards/margins", "margin", ".3g", compared=True, scaled=True)
NLL = Figure("nll_loss", "nll", ".3g", compared=True, scaled=True)
REWARD = Figure("reward", "reward", ".3g", compared=True)
SCORE_ACCURACY = Figure("accuracy", "accuracy", ".3f", compared=True)
SCORE_MARGIN = Figure("margin", "margin", ".3g", compared=True, scaled=True)
SCORE = Figure("mean_reward", "score", ".3g", logged=False, compared=True, better="neither")
KL = Figure("kl", "kl", ".3g", better="less")

LOSS_PLOT = Plot("loss", "Loss", "loss", ("loss",))
LEARNING_RATE_PLOT = Plot("learning_rate", "Learning rate", "learning rate", ("learning_rate",), noisy=False)
GRAD_NORM_PLOT = Plot("grad_norm", "Gradient norm, before clipping", "gradient norm", ("grad_norm",))
TOKEN_ACCURACY_PLOT = Plot(
    "token_accuracy", "Next-token accuracy", "share of tokens", ("mean_token_accuracy",)
)
REWARD_ACCURACY_PLOT = Plot(
    "accuracy", "Preference accuracy", "share of pairs", ("rewards/accuracies",), (0, 1), chance=0.5
)
MARGIN_PLOT = Plot("margin", "Reward margin, chosen minus rejected", "margin", ("rewards/margins",))
REWARDS_PLOT = Plot("rewards", "Implicit rewards", "reward", ("rewards/chosen", "rewards/rejected"))
NLL_PLOT = Plot("nll", "Negative log-likelihood of the chosen answer", "nats per token", ("nll_loss",))
LOG_PROBABILITIES_PLOT = Plot(
    "logps", "Log-probabilities of both answers", "nats", ("logps/chosen", "logps/rejected")
)
REWARD_PLOT = Plot("reward", "Reward", "reward", ("reward",))
SCORE_ACCURACY_PLOT = Plot(
    "accuracy", "Preference accuracy", "share of pairs", ("accuracy",), (0, 1), chance=0.5
)
SCORE_MARGIN_PLOT = Plot("margin", "Margin of scores, chosen minus rejected", "margin", ("margin",))
SCORES_PLOT = Plot("scores", "Scores of both sides", "score", ("min_reward", "mean_reward", "max_reward"))
KL_PLOT = Plot("kl", "KL divergence from the reference", "nats", ("kl",))

TRAINING = (LOSS, LEARNING_RATE, GRAD_NORM)
"""What every Trainer logs."""
TRAINING_PLOTS = (LOSS_PLOT, LEARNING_RATE_PLOT, GRAD_NORM_PLOT)

LANGUAGE_MODELING = Figures(
    (*TRAINING, TOKEN_ACCURACY),
    (*TRAINING_PLOTS, TOKEN_ACCURACY_PLOT),
    settings=("packing", "completion_only_loss", "assistant_only_loss", "loss_type"),
)
PREFERENCES = Figures(
    (*TRAINING, REWARD_ACCURACY, MARGIN),
    (*TRAINING_PLOTS, TOKEN_ACCURACY_PLOT, REWARD_ACCURACY_PLOT, MARGIN_PLOT, REWARDS_PLOT),
    settings=("beta", "loss_type"),
)
LABELLED_ANSWERS = Figures(
    (*TRAINING, KL, MARGIN),
    (*TRAINING_PLOTS, KL_PLOT, MARGIN_PLOT, REWARDS_PLOT),
    settings=("beta", "loss_type", "desirable_weight", "undesirable_weight"),
)
SCORES = Figures(
    (*TRAINING, SCORE_ACCURACY, SCORE_MARGIN, SCORE),
    (*TRAINING_PLOTS, SCORE_ACCURACY_PLOT, SCORE_MARGIN_PLOT, SCORES_PLOT),
    settings=("center_rewards_coefficient",),
)
WITHOUT_REFERENCE = Figures(
    (*TRAINING, NLL, REWARD_ACCURACY, MARGIN),
    (*TRAINING_PLOTS, NLL_PLOT, REWARD_ACCURACY_PLOT, MARGIN_PLOT, LOG_PROBABILITIES_PLOT),
    settings=("beta", "loss_type", "cpo_alpha", "simpo_gamma", "alpha", "label_smoothing"),
)
"""Preferences without a reference model: ORPO, CPO, SimPO."""
DEFAULT = Figures(
    (*TRAINING, TOKEN_ACCURACY, REWARD_ACCURACY, MARGIN, REWARD),
    (*TRAINING_PLOTS, TOKEN_ACCURACY_PLOT, REWARD_ACCURACY_PLOT, MARGIN_PLOT, REWARDS_PLOT, REWARD_PLOT),
    settings=("packing", "completion_only_loss", "assistant_only_loss", "beta", "loss_type"),
)
"""Any of these that the rows have: for a recipe that names no figures."""
