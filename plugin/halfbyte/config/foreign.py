"""Keys that belong elsewhere: to the launcher, to another library, to an earlier version of TRL."""

from typing import Any

from halfbyte.config.others import OTHERS

# What configurations written for other versions and libraries say, and what to write here.
RENAMED = {
    "batch_size": "write per_device_train_batch_size",
    "epochs": "write num_train_epochs",
    "evaluation_strategy": "write eval_strategy",
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "learning_rate_scheduler": "write lr_scheduler_type",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR on the command line",
    "lora_rank": "write lora_r",
    "lr": "write learning_rate",
    "lr_scheduler": "write lr_scheduler_type",
    "max_prompt_length": "write max_length, which bounds prompt and completion together",
    "max_seq_length": "write max_length",
    "no_cuda": "write use_cpu: true",
    "num_epochs": "write num_train_epochs",
    "torch_dtype": "write dtype",
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of all steps",
}

# The options of `accelerate launch` (accelerate's parser costs an import of torch; a test compares the two), without
# `debug` and `gradient_accumulation_steps`, which are options of a recipe as well.
_ACCELERATE = """
    aws_access_key_id aws_secret_access_key config_file cpu deepspeed_config_file
    deepspeed_exclusion_filter deepspeed_hostfile deepspeed_inclusion_filter
    deepspeed_moe_layer_cls_names deepspeed_multinode_launcher downcast_bf16 dynamo_backend
    dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph dynamo_use_regional_compilation
    enable_cpu_affinity env fp8_amax_compute_algo fp8_amax_history_len fp8_backend
    fp8_enable_fsdp_float8_all_gather fp8_format fp8_interval fp8_margin fp8_opt_level
    fp8_override_linear_precision fp8_pad_inner_dim fp8_use_autocast_during_eval
    fsdp_activation_checkpointing fsdp_activation_checkpointing_offload fsdp_auto_wrap_policy
    fsdp_backward_prefetch fsdp_cpu_ram_efficient_loading fsdp_forward_prefetch fsdp_min_num_params
    fsdp_offload_params fsdp_reshard_after_forward fsdp_sharding_strategy fsdp_state_dict_type
    fsdp_sync_module_states fsdp_transformer_layer_cls_to_wrap fsdp_use_orig_params fsdp_version
    gpu_ids gradient_clipping log_dir machine_rank main_process_ip main_process_port
    main_training_function max_restarts megatron_lm_attention_backend megatron_lm_attention_dropout
    megatron_lm_attention_softmax_in_fp32 megatron_lm_calculate_per_token_loss
    megatron_lm_context_parallel_size megatron_lm_decoder_last_pipeline_num_layers
    megatron_lm_eod_mask_loss megatron_lm_expert_model_parallel_size
    megatron_lm_expert_tensor_parallel_size megatron_lm_gradient_clipping megatron_lm_hidden_dropout
    megatron_lm_no_load_optim megatron_lm_no_save_optim megatron_lm_num_micro_batches
    megatron_lm_optimizer_cpu_offload megatron_lm_overlap_cpu_optimizer_d2h_h2d
    megatron_lm_pp_degree megatron_lm_recompute_activations megatron_lm_recompute_granularity
    megatron_lm_recompute_method megatron_lm_recompute_num_layers megatron_lm_sequence_parallelism
    megatron_lm_tp_degree megatron_lm_use_custom_fsdp megatron_lm_use_distributed_optimizer
    megatron_lm_use_precision_aware_optimizer megatron_lm_use_rotary_position_embeddings
    mixed_precision monitor_interval mpirun_hostfile multi_gpu no_python num_cpu_threads_per_process
    num_machines num_processes offload_optimizer_device offload_optimizer_nvme_path
    offload_param_device offload_param_nvme_path parallelism_config_cp_backend
    parallelism_config_cp_comm_strategy parallelism_config_cp_size
    parallelism_config_dp_replicate_size parallelism_config_dp_shard_size
    parallelism_config_sp_attn_implementation parallelism_config_sp_backend
    parallelism_config_sp_seq_length parallelism_config_sp_seq_length_is_variable
    parallelism_config_sp_size parallelism_config_tp_size quiet rdzv_backend rdzv_conf same_network
    tpu tpu_use_cluster tpu_use_sudo use_deepspeed use_fsdp use_megatron_lm use_parallelism_config
    vm zero3_init_flag zero3_save_16bit_model zero_stage
"""

# With the spellings of TRL's launcher and of torchrun.
LAUNCHER_KEYS = frozenset(_ACCELERATE.split()) | {
    "accelerate_config",
    "accelerate_config_file",
    "nnodes",
    "node_rank",
    "nproc_per_node",
}


def reason(key: str, prog: str, value: Any = None) -> str | None:
    """Why ``key`` is no option of any halfbyte recipe and what to write instead, or None if it may be one.

    ``value`` is what was written for it, for the line to write instead.
    """
    if key == "config":
        return "a configuration file cannot name another; give one file with --config"
    if key == "env":
        return (
            "environment variables are set on the command line: NAME=value accelerate launch -m halfbyte ..."
        )
    if key in RENAMED:
        return f"unknown option; {RENAMED[key]}"
    if (other := OTHERS.get(key.replace("-", "_"))) is not None:
        return f"unknown option; {other.advice(value if isinstance(value, str) else None)}"
    if key.replace("-", "_") in LAUNCHER_KEYS:
        return (
            f"belongs to the launcher; write accelerate launch --num_processes N "
            f"[--config_file launch/X.yaml] -m {prog} ..."
        )
    return None


PARTS = {
    **dict.fromkeys(("id", "dataset", "file", "data"), "write path: data/train.jsonl"),
    **dict.fromkeys(("config", "subset"), "write name: default"),
    **dict.fromkeys(("weight", "proportion", "ratio"), "write fraction: 0.5"),
    **dict.fromkeys(
        ("type", "ds_type", "field", "field_messages", "message_property_mappings", "roles", "chat_template"),
        "leave it out: rows are recognised by their columns",
    ),
    "roles_to_train": "write assistant_only_loss: true beside `datasets:`",
}
"""Keys of one data set in the lists of other systems, and what to write instead."""
