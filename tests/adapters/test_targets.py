"""Names match whole paths and their ends, from a dot on, as PEFT matches them."""

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from halfbyte.adapters.targets import is_named


@pytest.mark.parametrize(
    "path", ["q_proj", "layers.0.q_proj", "layers.0.seq_proj", "q_proj.base", "layers.10.q_proj"]
)
@pytest.mark.parametrize("names", [("q_proj",), ("0.q_proj", "k_proj"), ("layers.0.q_proj",), ("proj",), ()])
def test_names_match_what_peft_matches(path: str, names: tuple[str, ...]) -> None:
    assert is_named(path, *names) == bool(
        check_target_module_exists(LoraConfig(target_modules=list(names)), path)
    )
