"""Every touch of upstream that its public interface does not promise: what an upgrade may break, by name.

Private names that are read or called are in :mod:`halfbyte.upstream_private`. ``tests/test_upstream.py`` compares both
lists with the installed libraries and with halfbyte's own code. Signatures are parameter names; they are equal in
transformers 5.23 and 5.24, and in the pinned versions of the others.
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


_EVENT = "self args state control kwargs"
_EPOCH = (
    "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
)

OVERRIDES = (
    Override("transformers.Trainer._determine_best_metric", "self metrics trial"),
    Override("transformers.Trainer._get_output_dir", "self trial"),
    Override("transformers.Trainer._get_train_sampler", "self train_dataset"),
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
    Override("transformers.Trainer._track_num_input_tokens", "self inputs"),
    Override(
        "transformers.Trainer.create_model_card",
        "self language license tags model_name finetuned_from tasks dataset_tags dataset dataset_args",
    ),
    Override("transformers.Trainer.compute_loss", "self model inputs return_outputs num_items_in_batch"),
    Override("transformers.Trainer.create_optimizer", "self model"),
    Override("transformers.Trainer.evaluate", "self eval_dataset ignore_keys metric_key_prefix"),
    Override(
        "transformers.Trainer.evaluation_loop",
        "self dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    ),
    Override("transformers.Trainer.floating_point_ops", "self inputs"),
    Override("transformers.Trainer.get_batch_samples", "self epoch_iterator num_batches device"),
    Override("transformers.Trainer.get_test_dataloader", "self test_dataset"),
    Override("transformers.Trainer.get_train_dataloader", "self"),
    Override("transformers.Trainer.log", "self logs start_time"),
    Override("transformers.Trainer.save_model", "self output_dir _internal_call"),
    Override("transformers.Trainer.training_step", "self model inputs num_items_in_batch"),
    *(
        Override(f"transformers.TrainerCallback.{event}", parameters)
        for event, parameters in (
            ("on_epoch_begin", _EVENT),
            ("on_epoch_end", _EVENT),
            ("on_evaluate", _EVENT),
            ("on_log", _EVENT),
            ("on_pre_optimizer_step", _EVENT),
            ("on_predict", "self args state control metrics kwargs"),
            ("on_prediction_step", _EVENT),
            ("on_push_begin", _EVENT),
            ("on_save", _EVENT),
            ("on_step_begin", _EVENT),
            ("on_step_end", _EVENT),
            ("on_train_begin", _EVENT),
            ("on_train_end", _EVENT),
        )
    ),
)

PATCHES = (
    *(
        Patch(
            f"datasets.{module}.hf_tqdm",
            "data/progress.py:showing",
            "while the data of a run is read, checked and prepared",
            "datasets 5.2",
            "its passes, and those of TRL through it, tell how far they are to this class alone",
        )
        for module in ("arrow_dataset", "builder")
    ),
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
    *(
        Patch(
            f"accelerate.Accelerator.{name}",
            "trainer/upstream.py:on_this_rank",
            "while the loss of a batch of a trainer whose figures are weighed is computed",
            "trl 1.16",
            "TRL gathers every figure of every batch, and counts rows twice that fill up the last one",
            parameters,
        )
        for name, parameters in (
            ("gather", "self tensor"),
            ("gather_for_metrics", "self input_data use_gather_object"),
        )
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
        "transformers.PreTrainedModel.forward",
        "fast/rows.py:install",
        "state mixers of a model that trains padding-free, and the stack of their layers",
        "transformers 5.24",
        "boundaries of sequences reach these in kernels from the Hub only",
    ),
    Patch(
        "transformers.modeling_layers.GradientCheckpointingLayer.forward",
        "fast/apart.py:take",
        "a decoder layer around fused parts, whose save level says whether it is recomputed",
        "transformers 5.24",
        "the switch of activation checkpointing is set for all layers at once, when training begins",
    ),
    Patch(
        "torch.nn.Module._apply",
        "adapters/reference.py:keep_float32",
        "a model with adapters that a trainer trains",
        "trl 1.16",
        "online trainers cast the whole model to generate, and leave it so",
        "self fn recurse",
    ),
    Patch(
        "peft.tuners.lora.bnb.Linear4bit.__class__",
        "fast/linear.py:fuse",
        "a 4-bit LoRA linear that is fused",
        "peft 0.21",
        "PEFT constructs its layers itself; the subclass changes the forward alone",
    ),
    Patch(
        "peft.PeftModel.__class__",
        "loading.py:planned",
        "a model on meta that `halfbyte plan` builds a trainer over",
        "peft 0.21, trl 1.16",
        "the Trainer moves a model that is not quantized, and TRL copies adapters to one that it adds on the CPU",
    ),
    Patch(
        "peft.PeftModel.generate",
        "distributed/fsdp2.py:prepare",
        "a 4-bit model under FSDP2",
        "torch 2.13, peft 0.21",
        "it runs modules below the root only, whose own weights stay sharded (torch's register_fsdp_forward_method)",
    ),
    Patch(
        "deepspeed.runtime.zero.parameter_offload.ZeROOrderedDict._in_forward",
        "distributed/zero3.py:in_forward",
        "a model under ZeRO-3, while prompts are completed",
        "deepspeed 0.19",
        "generate is not a forward of the engine, which sets it to gather weights that are read outside their module",
    ),
    Patch(
        "torch.optim.Optimizer.__class__",
        "distributed/sharded_optimizers.py:step_on_shards",
        "a bitsandbytes optimizer under FSDP2",
        "bitsandbytes 0.50, accelerate 1.15",
        "accelerate holds the instance, and its update kernels do not know DTensors",
    ),
    Patch(
        "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING",
        "quantization/quantizer.py:registered",
        "while a base is loaded, or made on meta",
        "transformers 5.24, bitsandbytes 0.50",
        "its 4-bit quantizer leaves fused experts in 16 bits (bitsandbytes #1849), and one name has one quantizer",
    ),
    Patch(
        "peft.tuners.tuners_utils.BaseTuner._inject_parameters",
        "quantization/stacks_in_peft.py:install",
        "the process, once a base is loaded in four bits",
        "peft 0.21",
        "it finds parametrized parameters by their module's full path alone, and not below a wrapper of its own; a "
        "further adapter on the weight of a packed linear layer it refuses",
        "self peft_config model adapter_name low_cpu_mem_usage",
    ),
    Patch(
        "torch.nn.Module.__class__",
        "quantization/stacks_in_peft.py:shown_whole",
        "packed experts, while PEFT looks for parameters",
        "torch 2.13, peft 0.21",
        "torch reads parametrized parameters through properties of the class, which stand in the parameters' place",
    ),
    Patch(
        "peft.tuners.lora.layer.ParamWrapper.forward",
        "fast/experts.py:fuse",
        "packed experts with adapters, and without while they are fused",
        "peft 0.21, transformers 5.24",
        "PEFT leaves its update on a parametrized parameter, once more at every call; both dequantize all experts",
        "self x args kwargs",
    ),
    Patch(
        "transformers.integrations.hub_kernels.use_kernel_func_from_hub_with_fallback",
        "state_kernels.py:_leave_out",
        "while it is shown on the CPU what a model computes; the process, once a base is loaded in four or eight bits",
        "transformers 5.24",
        "state layers call causal_conv1d, mamba_ssm and fla on every device, and these compute on GPUs; in training "
        "they hand the weights of linear maps to mamba_ssm, which reads packed bytes",
    ),
    *(
        Patch(
            "transformers.PreTrainedConfig._attn_implementation",
            place,
            "a base on meta, and a small model like it",
            "transformers 5.24",
            "transformers refuses the attention of a GPU where there is none, and a plan is for one",
        )
        for place in ("loading.py:_on_meta", "fast/stand_in.py:with_weights", "fast/stand_in.py:of_layers")
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
