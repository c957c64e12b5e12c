"""Names match whole paths and their ends, from a dot on, as PEFT matches them."""

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING

from halfbyte.adapters.targets import is_named, layer_of


@pytest.mark.parametrize(
    "path", ["q_proj", "layers.0.q_proj", "layers.0.seq_proj", "q_proj.base", "layers.10.q_proj"]
)
@pytest.mark.parametrize("names", [("q_proj",), ("0.q_proj", "k_proj"), ("layers.0.q_proj",), ("proj",), ()])
def test_names_match_what_peft_matches(path: str, names: tuple[str, ...]) -> None:
    assert is_named(path, *names) == bool(
        check_target_module_exists(LoraConfig(target_modules=list(names)), path)
    )


@pytest.mark.parametrize("mapping", _MOE_TARGET_MODULE_MAPPING.values(), ids=_MOE_TARGET_MODULE_MAPPING)
def test_every_layer_that_peft_takes_for_experts_is_read_as_one_when_saved(mapping: dict[str, str]) -> None:
    taken = [name for name, parameter in mapping.items() if parameter != f"{name}.weight"]
    assert len(taken) < len(mapping), "routers are named by their weight, which an option can name too"
    for path in (f"model.layers.0.mlp.{name}" for name in taken):
        assert layer_of(f"{path}.weight") == path
