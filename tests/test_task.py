"""Tasks are found by PEFT's name of them, and each names classes that exist."""

import peft
import pytest
import transformers

from halfbyte.errors import UserError
from halfbyte.task import CAUSAL_LM, SEQ2SEQ, SEQUENCE_CLASSIFICATION, by_peft_type


@pytest.mark.parametrize("task", [CAUSAL_LM, SEQUENCE_CLASSIFICATION, SEQ2SEQ], ids=lambda task: task.name)
def test_a_task_is_found_by_its_peft_type(task) -> None:
    assert by_peft_type(task.peft_type) is task
    assert peft.TaskType(task.peft_type)
    assert hasattr(transformers, task.auto_class)


def test_a_task_that_is_not_supported() -> None:
    with pytest.raises(
        UserError, match=r"lora_task_type: .*'SEQ_CLF' is not supported; did you mean SEQ_CLS"
    ):
        by_peft_type("SEQ_CLF")
