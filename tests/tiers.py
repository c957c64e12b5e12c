"""Which tests `make quick` leaves to `make test`: those that start processes, and those that train for seconds.

A prefix of a test's id. What stays finds most: every error message, decision, format, save, resume, gradient and
number that one process can show in a second or two.
"""

NOT_QUICK = (
    "tests/adapters/test_fresh.py::test_a_fresh_adapter_changes_nothing",
    "tests/benchmarks/test_gpu_script.py",
    "tests/checkpoint/test_faults.py",
    "tests/checkpoint/test_changes.py::test_a_learning_rate_that_is_changed_trains_from_the_first_step[lr_",
    "tests/checkpoint/test_changes.py::test_a_learning_rate_that_is_changed_trains_from_the_first_step[max_",
    "tests/checkpoint/test_changes.py::test_a_learning_rate_that_is_changed_trains_from_the_first_step[warmup_",
    "tests/checkpoint/test_held.py",
    "tests/checkpoint/test_resume.py::test_a_resumed_run_has_each_row_once",
    "tests/checkpoint/test_security.py",
    "tests/config/test_fields.py::test_every_field",
    "tests/demo/test_control.py",
    "tests/demo/test_corpus.py",
    "tests/demo/test_demo.py",
    "tests/demo/test_stages.py",
    "tests/demo/test_tokenizer.py",
    "tests/distributed/test_ddp.py",
    "tests/distributed/test_failures.py",
    "tests/distributed/test_fsdp2.py",
    "tests/distributed/test_matrix.py",
    "tests/distributed/test_sharded_matrix.py",
    "tests/fast/test_fusion.py::test_importing",
    "tests/fast/test_parity.py::test_bfloat16",
    "tests/fast/test_parity.py::test_dropout",
    "tests/fast/test_parity.py::test_every_save_level",
    "tests/fast/test_parity.py::test_preferences",
    "tests/fast/test_parity.py::test_thirty_steps",
    "tests/resilience/test_signals.py::test_a_forked_worker",
    "tests/resilience/test_signals.py::test_a_rank_that_hangs",
    "tests/resilience/test_signals.py::test_a_save_that_cannot_fit",
    "tests/resilience/test_signals.py::test_a_second_signal",
    "tests/resilience/test_signals.py::test_a_signal_to_one_rank",
    "tests/resilience/test_signals.py::test_what_a_signal_cut_off",
    "tests/store/test_bases.py::test_loading_grows_memory",
    "tests/store/test_bases.py::test_one_of_many_processes",
    "tests/test_faults.py",
    "tests/test_parity.py",
    "tests/test_plugin.py::test_two_processes",
    "tests/test_special_tokens.py::test_named_tokens",
    "tests/test_descriptors.py::test_a_command",
    "tests/test_descriptors.py::test_a_run",
    "tests/test_third_party.py",
    "tests/tracking/test_wandb_run.py",
    "tests/trainer/test_accumulation.py",
    "tests/trainer/test_exact_resume.py::test_a_finished_run",
    "tests/trainer/test_exact_resume.py::test_resumed_equals_uninterrupted[dpo]",
    "tests/trainer/test_exact_resume.py::test_resumed_equals_uninterrupted[stream",
    "tests/trainer/test_finite.py::test_a_ruined_weight",
    "tests/trainer/test_finite.py::test_skip",
    "tests/trainer/test_invariants.py::test_a_rank_that_differs",
    "tests/test_umask.py::test_a_finished_run_and_the_store[True-23]",
    "tests/trainer/test_hub.py::test_a_push_that_fails",
    "tests/trainer/test_hub.py::test_each_strategy_pushes_named_files_only[all",
    "tests/trainer/test_hub.py::test_each_strategy_pushes_named_files_only[end]",
    "tests/trainer/test_hub.py::test_each_strategy_pushes_named_files_only[every",
    "tests/trainer/test_saving.py::test_a_full_disk",
    "tests/trainer/test_saving.py::test_rotation",
)


def is_quick(test_id: str) -> bool:
    """Whether the test ``test_id`` is part of `make quick`."""
    return not test_id.startswith(NOT_QUICK)
