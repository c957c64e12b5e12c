"""Reference log-probabilities that a constructor computes: by the forward that trains, cached under what made them."""

from typing import Any

from halfbyte.files import digest_of
from halfbyte.trainer.base import Mixin


class PrecomputedReferences(Mixin):
    """Has DPO and KTO precompute references with the finished model, as every step is computed.

    TRL runs the model inside its constructor, and names its cache by weights and rows alone: references from another
    forward or dtype would be taken for these.
    """

    _precompute_model_hash: str
    _named_by_forward: bool = False

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._make_ready_once()
        if not self._named_by_forward:
            self._named_by_forward = True
            fusion = self.report.fusion
            made_by = [fusion.mode, fusion.layers, fusion.linears, self.accelerator.mixed_precision]
            self._precompute_model_hash = digest_of([self._precompute_model_hash, *made_by])
        return super()._precompute_ref_logps(*args, **kwargs)
