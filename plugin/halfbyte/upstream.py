"""Every touch of upstream that its public interface does not promise: what an upgrade may break, by name.

``tests/test_upstream.py`` compares this list with the installed libraries and with halfbyte's own code. Signatures are
parameter names; they are equal in transformers 5.17, 5.23 and 5.24, and in the pinned versions of the others.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Override:
    """A method of an upstream class that a mixin of :mod:`halfbyte.trainer` overrides."""

    name: str
    parameters: str


@dataclass(frozen=True)
class Patch:
    """An attribute of an upstream module or object that is replaced from outside: no method to override is offered.

    ``place`` is the file and function that replaces ``name``, for as long as ``scope`` says.
    """

    name: str
    place: str
    scope: str
    version: str
    reason: str
    parameters: str = ""


@dataclass(frozen=True)
class Private:
    """A private upstream name that is read or called.

    An attribute set in a method is ``Class.method:attribute``.
    """

    name: str
    place: str
    parameters: str = ""


_EVENT = "self args state control kwargs"
_EPOCH = (
    "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
)

_SDPA_MASK = (
    "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask local_size allow_is_causal_skip "
    "allow_is_bidirectional_skip use_vmap device kwargs"
)

OVERRIDES = (
    Override("transformers.Trainer._get_output_dir", "self trial"),
    Override(
        "transformers.Trainer._init_training_state",
        "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    ),
    Override("transformers.Trainer._load_optimizer_and_scheduler", "self checkpoint"),
    Override("transformers.Trainer._load_rng_state", "self checkpoint"),
    Override("transformers.Trainer._push_from_checkpoint", "self checkpoint_folder"),
    Override(
        "transformers.Trainer.push_to_hub",
        "self commit_message blocking token revision private kwargs",
    ),
    Override("transformers.Trainer._run_epoch", _EPOCH),
    Override("transformers.Trainer._save_checkpoint", "self model trial"),
    Override(
        "transformers.Trainer.create_model_card",
        "self language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args",
    ),
    Override("transformers.Trainer.create_optimizer", "self model"),
    Override("transformers.Trainer.evaluate", "self eval_dataset ignore_keys metric_key_prefix"),
    Override("transformers.Trainer.get_batch_samples", "self epoch_iterator num_batches device"),
    Override("transformers.Trainer.get_train_dataloader", "self"),
    Override("transformers.Trainer.save_model", "self output_dir _internal_call"),
    Override("transformers.Trainer.training_step", "self model inputs num_items_in_batch"),
    *(
        Override(f"transformers.TrainerCallback.{event}", parameters)
        for event, parameters in (
            ("on_epoch_begin", _EVENT),
            ("on_evaluate", _EVENT),
            ("on_log", _EVENT),
            ("on_pre_optimizer_step", _EVENT),
            ("on_predict", "self args state control metrics kwargs"),
            ("on_prediction_step", _EVENT),
            ("on_save", _EVENT),
            ("on_step_begin", _EVENT),
            ("on_step_end", _EVENT),
            ("on_train_begin", _EVENT),
            ("on_train_end", _EVENT),
        )
    ),
)

PATCHES = (
    Patch(
        "torch.save",
        "trainer/upstream.py:without_pickled_arguments",
        "while weights are written",
        "transformers 5.24",
        "Trainer._save pickles the arguments, tokens in clear text among them, and has no switch for it",
        "obj f pickle_module pickle_protocol _use_new_zipfile_serialization _disable_byteorder_record",
    ),
    Patch(
        "accelerate.Accelerator.gather",
        "trainer/upstream.py:wrap_collectives",
        "the accelerator of a trainer with `on_oom: accumulate`",
        "accelerate 1.15",
        "the Trainer constructs its Accelerator, and a rank out of memory must answer in place of a collective",
        "self tensor",
    ),
    Patch(
        "accelerate.Accelerator.reduce",
        "trainer/upstream.py:wrap_collectives",
        "the accelerator of a trainer with `on_oom: accumulate`",
        "accelerate 1.15",
        "the Trainer constructs its Accelerator, and a rank out of memory must answer in place of a collective",
        "self tensor reduction scale",
    ),
    Patch(
        "accelerate.accelerator.fsdp2_prepare_model",
        "distributed/fsdp2.py:install",
        "the process, once a 4-bit base is loaded under FSDP2",
        "accelerate 1.15",
        "it leaves 4-bit weights in uint8 storage whole on every rank, with a warning",
        "accelerator model",
    ),
    *(
        Patch(
            "transformers.PreTrainedModel.forward",
            place,
            "a model that a trainer trains",
            "transformers 5.24, trl 1.16",
            reason,
        )
        for place, reason in (
            (
                "fast/head.py:install",
                "TRL puts its own fused head there (add_fused_lm_head), which this one replaces",
            ),
            (
                "fast/autocast.py:leave",
                "the Trainer enters autocast around the whole model, whose class is anyone's",
            ),
        )
    ),
    Patch(
        "transformers.modeling_layers.GradientCheckpointingLayer.forward",
        "fast/layer.py:fuse",
        "a decoder layer that is fused",
        "transformers 5.24",
        "a loaded model's layers cannot be exchanged without renaming their parameters",
    ),
    Patch(
        "peft.tuners.lora.bnb.Linear4bit.__class__",
        "fast/linear.py:fuse",
        "a 4-bit LoRA linear that is fused",
        "peft 0.21",
        "PEFT constructs its layers itself; the subclass changes the forward alone",
    ),
    Patch(
        "torch.optim.Optimizer.__class__",
        "distributed/sharded_optimizers.py:step_on_shards",
        "a bitsandbytes optimizer under FSDP2",
        "bitsandbytes 0.50, accelerate 1.15",
        "accelerate holds the instance, and its update kernels do not know DTensors",
    ),
    Patch(
        "transformers.PreTrainedConfig._name_or_path",
        "quantization/load.py:load_base",
        "a base that was loaded from the store",
        "transformers 5.24",
        "what is trained on the base must name the base, not the store's entry",
    ),
    Patch(
        "peft.utils.other.TrainableTokensWrapper.bias",
        "adapters/fresh.py:show_head_bias",
        "a head of which rows are trained",
        "peft 0.21, trl 1.16",
        "TRL's fused head reads its bias (trl/trainer/utils.py), and the wrapper passes on the weight only",
    ),
)

PRIVATE = (
    Private("transformers.Trainer._inner_training_loop:_tr_loss", "trainer/exact_resume.py"),
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
    Private("trl.SFTTrainer.__init__:_metrics", "trainer/counters.py"),
    Private("trl.SFTTrainer.__init__:_total_train_tokens", "trainer/counters.py"),
    Private("trl.DPOTrainer.__init__:_metrics", "trainer/counters.py"),
    Private(
        "trl.SFTTrainer._prepare_dataset",
        "data/prepared.py",
        "self dataset processing_class args packing formatting_func dataset_name",
    ),
    Private(
        "trl.DPOTrainer._prepare_dataset",
        "data/prepared.py",
        "self dataset processing_class args dataset_name",
    ),
    *(
        Private(
            f"trl.{trainer}._prepare_dataset",
            "data/prepared.py",
            "self dataset processing_class args dataset_name",
        )
        for trainer in ("KTOTrainer", "RewardTrainer")
    ),
    Private(
        "accelerate.state.GradientState._set_sync_gradients", "trainer/exact_resume.py", "self sync_gradients"
    ),
    Private("accelerate.Accelerator.__init__:_optimizers", "distributed/fsdp2.py"),
    Private("torch.distributed.distributed_c10d._get_default_store", "distributed/ranks.py", ""),
    Private("torch._foreach_norm", "trainer/finite.py"),
    *(
        Private("transformers.PreTrainedConfig._attn_implementation", place)
        for place in ("fast/batches.py", "fast/family.py")
    ),
    Private("transformers.PreTrainedModel._is_stateful", "fast/batches.py"),
    Private("transformers.PreTrainedModel._supports_attention_backend", "fast/batches.py"),
    Private("torch.nn.Module.__init__:_forward_hooks", "fast/family.py"),
    Private("torch.nn.Module.__init__:_forward_pre_hooks", "fast/family.py"),
    *(Private("torch.ops.aten._unsafe_view", place) for place in ("fast/layer_call.py", "fast/linear.py")),
    Private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "fast/attention.py"),
    Private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "fast/attention.py"),
    Private("torch.distributed.distributed_c10d._get_default_store", "resilience/watch.py"),
    Private("wandb.sdk.wandb_setup.singleton", "tracking/wandb_run.py", ""),
    Private(
        "wandb.sdk.lib.wbauth.authenticate_session",
        "tracking/wandb_run.py",
        "host source no_offline no_create input_timeout referrer relogin verify prompt update_session",
    ),
    Private(
        "trl.DPOTrainer._precompute_ref_logps", "trainer/float32_adapters.py", "self dataset name batch_size"
    ),
    Private(
        "trl.KTOTrainer._precompute_ref_logps", "trainer/float32_adapters.py", "self dataset name batch_size"
    ),
    Private("peft.utils.other.TrainableTokensWrapper", "adapters/fresh.py"),
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
    Private("transformers.integrations.sdpa_attention.sdpa_attention_forward", "fast/batches.py"),
    Private("transformers.masking_utils.sdpa_mask", "fast/batches.py", _SDPA_MASK),
    Private("trl.trainer.sft_trainer.DataCollatorForLanguageModeling", "fast/batches.py"),
    Private("trl.trainer.utils.FusedCausalLMOutput", "fast/head.py"),
    Private("trl.trainer.utils.maybe_gather_lm_head_ctx", "fast/head.py", "params"),
    Private("peft.tuners.lora.bnb.Linear4bit.forward", "fast/linear.py", "self x args kwargs"),
)
