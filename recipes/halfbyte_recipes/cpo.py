"""Contrastive preference optimization (arXiv 2401.08417), SimPO (2405.14734) and AlphaPO (2501.03884).

No reference model. The trainer is experimental in TRL.
"""

from dataclasses import dataclass, field

from trl.experimental.cpo import CPOConfig, CPOTrainer

from halfbyte.data import PreferencePairs
from halfbyte.errors import UserError
from halfbyte.recipe import Recipe
from halfbyte.tracking.figures import WITHOUT_REFERENCE

# Losses over mean log-probabilities of a token; those of a whole answer vanish when they are exponentiated.
_BY_TOKEN = ("simpo", "ipo")


@dataclass
class CPOArguments(CPOConfig):
    """TRL's CPO options with the learning rate of its LoRA examples."""

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate."})
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Chat template to use: a .jinja file, or a model whose template to take."},
    )

    def __post_init__(self) -> None:
        """Raise UserError for options of one loss that another would ignore, or fail on."""
        if self.loss_type == "alphapo" and self.alpha == 0:
            raise UserError(
                "alphapo with `alpha: 0` is SimPO; set `alpha`, or `loss_type: simpo`", option="loss_type"
            )
        super().__post_init__()  # which turns alphapo into simpo with `cpo_alpha: 0.0`
        if self.alpha != 0 and self.loss_type not in _BY_TOKEN:
            raise UserError(
                f"{self.alpha} takes powers of the probability of a whole answer under `loss_type: {self.loss_type}`, "
                "which is 0 in float32; write `loss_type: alphapo`, or take it out",
                option="alpha",
            )
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise UserError(f"`loss_type: {self.loss_type}` has none; take it out", option="label_smoothing")
        if self.simpo_gamma != CPOConfig.simpo_gamma and self.loss_type != "simpo":
            raise UserError(
                "only `loss_type: simpo` and `alphapo` read it; take it out", option="simpo_gamma"
            )


recipe = Recipe(
    config=CPOArguments,
    trainer=CPOTrainer,
    data=PreferencePairs,
    figures=WITHOUT_REFERENCE,
    summary="Contrastive preference optimization and SimPO, without a reference model (experimental in TRL)",
)
