"""Private upstream names that halfbyte reads or calls: what an upgrade may break, beside :mod:`halfbyte.upstream`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Private:
    """A private upstream name that is read or called.

    An attribute set in a method is ``Class.method:attribute``.
    """

    name: str
    place: str
    parameters: str = ""


_SDPA_MASK = (
    "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask local_size allow_is_causal_skip "
    "allow_is_bidirectional_skip use_vmap device kwargs"
)

PRIVATE = (
    Private("transformers.Trainer._inner_training_loop:_tr_loss", "trainer/exact_resume.py"),
    Private(
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts._apply_gate",
        "fast/expert_maps.py",
        "self gate_up_out",
    ),
    Private("transformers.Trainer._inner_training_loop:_total_loss_scalar", "trainer/counters.py"),
    Private("transformers.Trainer._inner_training_loop:_globalstep_last_logged", "trainer/counters.py"),
    Private("transformers.Trainer.__init__:_train_batch_size", "trainer/accumulation.py"),
    Private(
        "transformers.Trainer._evaluate",
        "trainer/stopping.py",
        "self trial ignore_keys_for_eval skip_scheduler",
    ),
    Private("transformers.Trainer._determine_best_metric", "trainer/stopping.py", "self metrics trial"),
    Private("transformers.Trainer._prepare_inputs", "trainer/exact_resume.py", "self inputs"),
    Private(
        "transformers.Trainer._get_collator_with_removed_columns",
        "trainer/exact_resume.py",
        "self data_collator description",
    ),
    Private("transformers.Trainer._save", "trainer/whole_adapters.py", "self output_dir state_dict"),
    *(
        Private(f"trl.{trainer}.__init__:{name}", place)
        for trainer in ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")
        for name in ("_metrics", "_total_train_tokens")
        for place in ("trainer/counters.py", "trainer/weighted_figures.py")
    ),
    Private(
        "trl.SFTTrainer._prepare_dataset",
        "data/preparation/prepared.py",
        "self dataset processing_class args packing formatting_func dataset_name",
    ),
    Private(
        "trl.DPOTrainer._prepare_dataset",
        "data/preparation/prepared.py",
        "self dataset processing_class args dataset_name",
    ),
    *(
        Private(
            f"trl.{trainer}._prepare_dataset",
            "data/preparation/prepared.py",
            "self dataset processing_class args dataset_name",
        )
        for trainer in ("KTOTrainer", "RewardTrainer")
    ),
    Private(
        "trl.DPOTrainer._prepare_dataset",
        "data/preparation/sides.py",
        "self dataset processing_class args dataset_name",
    ),
    *(
        Private(f"trl.experimental.{trainer}.{name}", place, parameters)
        for trainer in ("orpo.ORPOTrainer", "cpo.CPOTrainer")
        for name, place, parameters in (
            ("tokenize_row", "data/preparation/sides.py", "self feature model"),
            ("build_tokenized_answer", "data/preparation/sides.py", "self prompt answer"),
            ("get_batch_loss_metrics", "trainer/stored_figures.py", "self model batch train_eval"),
            ("store_metrics", "trainer/stored_figures.py", "self metrics train_eval"),
            ("__init__:_stored_metrics", "trainer/stored_figures.py", ""),
        )
    ),
    Private(
        "accelerate.state.GradientState._set_sync_gradients", "trainer/exact_resume.py", "self sync_gradients"
    ),
    Private("accelerate.Accelerator.__init__:_optimizers", "distributed/fsdp2.py"),
    Private("torch.distributed.distributed_c10d._get_default_store", "distributed/ranks.py", ""),
    Private("torch.nn.Module.__init__:_parameters", "distributed/zero3.py"),
    Private("torch._foreach_norm", "trainer/finite.py"),
    *(
        Private("transformers.PreTrainedConfig._attn_implementation", place)
        for place in (
            "fast/batches.py",
            "fast/fusion.py",
            "fast/parts.py",
            "trainer/reference_identity.py",
            "trainer/trial.py",
        )
    ),
    Private("transformers.PreTrainedModel._is_stateful", "fast/batches.py"),
    Private("transformers.PreTrainedModel._is_stateful", "trainer/completions.py"),
    Private("transformers.PreTrainedModel._supports_attention_backend", "fast/batches.py"),
    Private("transformers.PreTrainedModel._supports_sdpa", "fast/batches.py"),
    Private("torch.nn.Module._call_impl:_forward_hooks", "fast/adapted.py"),
    Private("torch.nn.Module._call_impl:_forward_pre_hooks", "fast/adapted.py"),
    *(
        Private("torch.ops.aten._unsafe_view", place)
        for place in ("fast/mlp_half.py", "fast/layer_call.py", "fast/linear.py")
    ),
    Private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "fast/attention.py"),
    Private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "fast/attention.py"),
    Private("torch.ops.aten._flash_attention_backward", "fast/attention_graph.py"),
    Private("torch.cpu._is_amx_tile_supported", "fast/attention.py"),
    Private("torch.distributed.distributed_c10d._get_default_store", "resilience/watch.py"),
    Private("wandb.sdk.wandb_setup.singleton", "tracking/wandb_login.py", ""),
    Private("wandb.sdk.wandb_setup.singleton", "tracking/wandb_run.py", ""),
    Private(
        "wandb.sdk.lib.wbauth.authenticate_session",
        "tracking/wandb_login.py",
        "host source no_offline no_create input_timeout referrer relogin verify prompt update_session",
    ),
    *(
        Private(name, "trainer/references.py", parameters)
        for trainer in ("DPOTrainer", "KTOTrainer")
        for name, parameters in (
            (f"trl.{trainer}._precompute_ref_logps", "self dataset name batch_size"),
            (f"trl.{trainer}.__init__:_precompute_model_hash", ""),
        )
    ),
    Private("trl.DPOTrainer.__init__:_precompute_engine", "trainer/references.py"),
    Private("peft.utils.other.TrainableTokensWrapper", "adapters/fresh.py"),
    Private(
        "peft.LoraModel._create_and_replace",
        "quantization/stacks_in_peft.py",
        "self lora_config adapter_name target target_name parent current_key parameter_name",
    ),
    Private("peft.tuners.tuners_utils.BaseTunerLayer", "adapters/fresh.py"),
    Private(
        "accelerate.utils.fsdp_utils.fsdp2_prepare_auto_wrap_policy",
        "distributed/fsdp2.py",
        "fsdp2_plugin model",
    ),
    Private(
        "accelerate.utils.fsdp_utils.get_module_children_bottom_up",
        "distributed/fsdp2.py",
        "model return_fqns",
    ),
    Private(
        "bitsandbytes.optim.optimizer.Optimizer8bit.init_state",
        "distributed/sharded_optimizers.py",
        "self group p gindex pindex",
    ),
    Private(
        "bitsandbytes.optim.optimizer.Optimizer8bit.update_step",
        "distributed/sharded_optimizers.py",
        "self group p gindex pindex",
    ),
    Private(
        "bitsandbytes.optim.optimizer.Optimizer8bit.prefetch_state",
        "distributed/sharded_optimizers.py",
        "self p",
    ),
    Private("transformers.integrations.sdpa_attention.sdpa_attention_forward", "fast/varlen.py"),
    Private("transformers.masking_utils.sdpa_mask", "fast/varlen.py", _SDPA_MASK),
    Private("trl.trainer.sft_trainer.DataCollatorForLanguageModeling", "fast/batches.py"),
    Private("trl.trainer.utils.FusedCausalLMOutput", "fast/head.py"),
    Private("trl.trainer.utils.maybe_gather_lm_head_ctx", "fast/head.py", "params"),
    Private("peft.tuners.lora.bnb.Linear4bit.forward", "fast/linear.py", "self x args kwargs"),
)
