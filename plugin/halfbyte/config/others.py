"""Options of axolotl, LLaMA-Factory, ms-swift, alignment-handbook and Unsloth, and what to write here."""

from dataclasses import dataclass

from halfbyte.terminal.wording import shorten

SYSTEMS = {
    "A": "axolotl",
    "L": "LLaMA-Factory",
    "S": "ms-swift",
    "H": "alignment-handbook",
    "U": "Unsloth",
}


@dataclass(frozen=True)
class Other:
    """An option of other systems: ``line`` is what to write instead, empty where there is nothing to write.

    In ``line`` the user's own value may take the place of what stands in braces. ``why`` is said with it.
    """

    systems: tuple[str, ...]
    line: str
    why: str = ""

    def example(self, value: str | None = None) -> str:
        """The line with ``value``, or with its own example."""
        before, brace, rest = self.line.partition("{{")
        if not brace:
            return self.line
        example, _, after = rest.partition("}}")
        return f"{before}{shorten(value, 40) if value else example}{after}"

    def advice(self, value: str | None = None) -> str:
        """What to write instead of the option, or why it goes."""
        names = ", ".join(self.systems)
        told = f"write {self.example(value)}" if self.line else "leave it out"
        return f"an option of {names}; {told}{f' ({self.why})' if self.why else ''}"


# Key | systems | line, an example value in double braces | why.
_TABLE = """
base_model | A | model_name_or_path: {{Qwen/Qwen3-8B}}
model | S | model_name_or_path: {{Qwen/Qwen3-8B}}
model_id_or_path | S | model_name_or_path: {{Qwen/Qwen3-8B}}
model_name | SU | model_name_or_path: {{Qwen/Qwen3-8B}}
model_path | LS | model_name_or_path: {{Qwen/Qwen3-8B}}
base_model_config | A | | the base's own configuration is read
base_model_revision | HA | model_revision: {{main}}
revision_of_model | A | model_revision: {{main}}
model_type | AS | | the base's configuration says it
tokenizer_type | A | | the base's tokenizer says it
tokenizer_config | A | | the tokenizer is the base's
tokenizer_name_or_path | H | | the tokenizer is the base's; a template of another: chat_template_path
tokenizer_use_fast | A | | fast tokenizers are used where there are some
use_fast_tokenizer | L | | fast tokenizers are used where there are some
is_llama_derived_model | A | | the base's configuration says it
task_type | S | | the recipe says it: halfbyte sft, halfbyte dpo, halfbyte kto, halfbyte reward
stage | L | | the recipe says it: halfbyte sft, halfbyte dpo, halfbyte kto, halfbyte reward, halfbyte pretrain
rl | A | | the recipe says it: halfbyte dpo, halfbyte kto, halfbyte orpo, halfbyte cpo
reward_model | A | | the recipe says it: halfbyte reward
rlhf_type | S | | the recipe says it: halfbyte dpo, halfbyte kto, halfbyte orpo, halfbyte cpo, halfbyte reward
dataset | LS | dataset_name: {{data/train.jsonl}} | a path or a hub id; several: datasets: [{path: ...}]
dataset_dir | L | dataset_name: data/train.jsonl | the whole path; no dataset_info.json
custom_train_dataset_path | S | dataset_name: {{data/train.jsonl}}
train_dataset | SU | dataset_name: {{data/train.jsonl}}
eval_dataset | LU | dataset_name: data | a directory with train.jsonl and test.jsonl; eval_strategy: steps
val_dataset | S | dataset_name: data | a directory with train.jsonl and test.jsonl; eval_strategy: steps
custom_val_dataset_path | S | dataset_name: data | a directory with train.jsonl and test.jsonl; eval_strategy: steps
test_datasets | A | dataset_name: data | a directory with train.jsonl and test.jsonl; eval_strategy: steps
dataset_mixer | H | datasets: [{path: data/a.jsonl, fraction: 0.7}, {path: data/b.jsonl, fraction: 0.3}]
dataset_mixture | H | datasets: [{path: data/a.jsonl, fraction: 0.7}, {path: data/b.jsonl, fraction: 0.3}]
dataset_configs | H | datasets: [{path: trl-lib/Capybara, name: default}]
dataset_splits | H | dataset_train_split: train | and dataset_test_split: test
interleave_probs | L | datasets: [{path: data/a.jsonl, fraction: 0.7}, {path: data/b.jsonl, fraction: 0.3}]
mix_strategy | L | datasets: [{path: data/a.jsonl, fraction: 0.7}, {path: data/b.jsonl, fraction: 0.3}]
val_set_size | A | test_split_size: 0.05 | with datasets: [{path: ...}] and eval_strategy: steps
val_size | L | test_split_size: 0.05 | with datasets: [{path: ...}] and eval_strategy: steps
split_dataset_ratio | S | test_split_size: 0.05 | with datasets: [{path: ...}] and eval_strategy: steps
dataset_test_ratio | S | test_split_size: 0.05 | with datasets: [{path: ...}] and eval_strategy: steps
max_samples | L | datasets: [{path: data/train.jsonl, split: "train[:1000]"}]
train_dataset_sample | S | datasets: [{path: data/train.jsonl, split: "train[:1000]"}]
num_samples | H | datasets: [{path: data/train.jsonl, split: "train[:1000]"}]
preprocessing_num_workers | LH | dataset_num_proc: {{4}}
dataset_processes | A | dataset_num_proc: {{4}}
num_proc | H | dataset_num_proc: {{4}}
dataset_prepared_path | A | | prepared rows are cached by the datasets library: HF_DATASETS_CACHE
tokenized_path | L | | prepared rows are cached by the datasets library: HF_DATASETS_CACHE
overwrite_cache | L | | edited data is read anew by itself
load_from_cache_file | S | | edited data is read anew by itself
buffer_size | L | | a stream is read in its order
lazy_tokenize | S | dataset_streaming: true
text_column | H | dataset_text_field: {{text}}
columns | S | datasets: [{path: data/train.jsonl, columns: [messages]}]
dataset_shuffle | S | | rows are shuffled by seed
shuffle_merged_datasets | A | | rows are shuffled by seed
template | LS | chat_template_path: Qwen/Qwen3-8B | only for a base without one; a .jinja file, or a model
chat_template | AHU | chat_template_path: templates/chat.jinja | a .jinja file, or a model
chat_template_jinja | A | chat_template_path: templates/chat.jinja
use_chat_template | S | | conversations are rendered with the chat template, text is not
default_system | L | | write a column `system` in the data
default_system_message | A | | write a column `system` in the data
system | S | | write a column `system` in the data
system_prompt | H | | write a column `system` in the data
auto_insert_empty_system_msg | H | | what the chat template does is trained
tool_format | L | | the chat template renders tools
agent_template | S | | the chat template renders tools
special_tokens | A | eos_token: <|im_end|> | and pad_token; tokens to add: additional_special_tokens
tokens | A | additional_special_tokens: ["<|im_start|>", "<|im_end|>"]
add_tokens | L | additional_special_tokens: ["<|im_start|>", "<|im_end|>"]
add_special_tokens | L | additional_special_tokens: ["<|im_start|>", "<|im_end|>"]
resize_vocab | L | additional_special_tokens: ["<|im_start|>", "<|im_end|>"]
split_special_tokens | L | user_special_tokens: escape
cutoff_len | L | max_length: {{2048}}
sequence_len | A | max_length: {{2048}}
model_max_length | LS | max_length: {{2048}}
packing_length | S | max_length: {{2048}}
excess_length_strategy | A | | what is longer than max_length is truncated and counted
truncation_strategy | S | truncation_mode: keep_start
truncation_side | H | truncation_mode: keep_start
sample_packing | A | packing: {{true}}
multipack | A | packing: {{true}}
neat_packing | L | packing: {{true}} | packed rows do not attend to each other
eval_sample_packing | A | eval_packing: {{true}}
pad_to_sequence_len | A | | rows are padded to the longest of a batch
sample_packing_eff_est | A | | packing knows its rows
train_on_inputs | A | completion_only_loss: false | where it is true; messages train all turns by default
train_on_prompt | L | completion_only_loss: false | where it is true; messages train all turns by default
train_on_responses_only | U | assistant_only_loss: {{true}}
mask_history | L | | rows of prompt and completion train the completion alone
loss_scale | S | assistant_only_loss: true | for the assistant's turns; otherwise leave it out
roles_to_train | A | assistant_only_loss: true
adapter | A | use_peft: true | qlora is the default; lora: with load_in_4bit: false
lora_model_dir | A | adapter_name_or_path: {{runs/sft}}
adapters | S | adapter_name_or_path: {{runs/sft}}
adapter_folder | L | adapter_name_or_path: {{runs/sft}}
finetuning_type | L | use_peft: true | full: use_peft: false and load_in_4bit: false
train_type | S | use_peft: true | full: use_peft: false and load_in_4bit: false
tuner_type | S | use_peft: true | full: use_peft: false and load_in_4bit: false
sft_type | S | use_peft: true | full: use_peft: false and load_in_4bit: false
full_finetuning | U | use_peft: false | with load_in_4bit: false
use_lora | U | use_peft: {{true}}
use_qlora | U | load_in_4bit: {{true}}
tuner_backend | S | | adapters are PEFT's
r | U | lora_r: {{16}}
rank | U | lora_r: {{16}}
alpha | U | lora_alpha: {{32}}
lora_target | L | lora_target_modules: [q_proj, v_proj] | all: all-linear
target_modules | SU | lora_target_modules: [q_proj, v_proj] | all: all-linear
target_regex | S | lora_target_modules: {{".*[qv]_proj"}}
lora_target_linear | A | lora_target_modules: all-linear
lora_modules | A | lora_target_modules: [q_proj, v_proj]
additional_target | L | | the modules that take an adapter: lora_target_modules
modules_to_save | S | | the modules that take an adapter: lora_target_modules
lora_fan_in_fan_out | A | | PEFT finds it out
lora_bias | S | | biases of the base are not trained
bias | U | | biases of the base are not trained
lora_dtype | S | | adapters are float32
lora_on_cpu | A | | adapters are where the base is
peft_use_dora | A | use_dora: {{true}}
peft_use_rslora | A | use_rslora: {{true}}
lorap_lr_ratio | S | loraplus_lr_ratio: {{16}}
init_weights | S | init_lora_weights: gaussian
pissa_init | L | init_lora_weights: default | pissa would quantize the base a second time
loftq_config | U | init_lora_weights: default | loftq would quantize the base a second time
lora_mlp_kernel | A | fast: auto
lora_qkv_kernel | A | fast: auto
lora_o_kernel | A | fast: auto
use_unsloth | L | fast: auto
enable_liger_kernel | L | fast: auto
cut_cross_entropy | A | fast: auto
quantization_bit | L | load_in_4bit: true | 8: load_in_8bit: true
quant_bits | S | load_in_4bit: true | 8: load_in_8bit: true
quantization_method | L | | bitsandbytes
quant_method | S | | bitsandbytes
quantization_type | L | bnb_4bit_quant_type: {{nf4}}
double_quantization | L | use_bnb_nested_quant: {{true}}
bnb_4bit_use_double_quant | S | use_bnb_nested_quant: {{true}}
bnb_4bit_compute_dtype | SU | dtype: {{bfloat16}}
quantization_device_map | L | | each process loads onto its own device
device_map | SU | | each process loads onto its own device
max_memory | AS | memory_budget: 20GiB
pure_bf16 | L | dtype: bfloat16 | adapters stay float32
flash_attn | L | attn_implementation: flash_attention_2
flash_attention | A | attn_implementation: flash_attention_2
use_flash_attn | S | attn_implementation: flash_attention_2
use_flash_attention_2 | HU | attn_implementation: flash_attention_2
attn_impl | S | attn_implementation: flash_attention_2
sdp_attention | A | attn_implementation: sdpa
eager_attention | A | attn_implementation: eager
flex_attention | A | attn_implementation: flex_attention
xformers_attention | A | attn_implementation: sdpa
s2_attention | A | attn_implementation: sdpa
shift_attn | L | attn_implementation: sdpa
rope_scaling | LU | model_init_kwargs: {rope_scaling: {rope_type: linear, factor: 2.0}}
micro_batch_size | A | per_device_train_batch_size: {{2}}
per_gpu_train_batch_size | LH | per_device_train_batch_size: {{2}}
train_batch_size | S | per_device_train_batch_size: {{2}}
eval_batch_size | AS | per_device_eval_batch_size: {{2}}
gradient_accumulation | U | gradient_accumulation_steps: {{8}}
max_epochs | S | num_train_epochs: {{3}}
num_epoch | U | num_train_epochs: {{3}}
optimizer | A | optim: {{paged_adamw_32bit}}
scheduler | U | lr_scheduler_type: {{cosine}}
cosine_min_lr_ratio | A | lr_scheduler_kwargs: {min_lr_rate: 0.1} | with lr_scheduler_type: cosine_with_min_lr
noisy_embedding_alpha | A | neftune_noise_alpha: {{5}}
random_state | U | seed: {{3407}}
use_gradient_checkpointing | U | gradient_checkpointing: true
disable_gradient_checkpointing | L | gradient_checkpointing: false
use_reentrant_gc | L | gradient_checkpointing_kwargs: {use_reentrant: false}
use_unsloth_gc | L | gradient_checkpointing: true
evals_per_epoch | A | eval_steps: 0.1 | a number below 1 is a share of all steps; with eval_strategy: steps
saves_per_epoch | A | save_steps: 0.1 | a number below 1 is a share of all steps
early_stopping_patience | A | | not supported; load_best_model_at_end: true keeps the best checkpoint
early_stopping_steps | L | | not supported; load_best_model_at_end: true keeps the best checkpoint
auto_resume_from_checkpoints | A | resume_from_checkpoint: true
create_checkpoint_symlink | S | | checkpoints are checkpoint-N
resume_only_model | S | adapter_name_or_path: runs/sft
add_version | S | output_dir: runs/name | is used as it is written
output | SU | output_dir: {{runs/name}}
save_dir | U | output_dir: {{runs/name}}
plot_loss | L | | plots are drawn into output_dir/plots
rl_beta | A | beta: {{0.1}}
pref_beta | L | beta: {{0.1}}
pref_loss | L | loss_type: sigmoid
pref_ftx | L | loss_type: [sigmoid, sft] | with loss_weights: [1.0, 0.1]
kto_chosen_weight | L | desirable_weight: {{1.0}}
kto_rejected_weight | L | undesirable_weight: {{1.0}}
kto_desirable_weight | A | desirable_weight: {{1.0}}
kto_undesirable_weight | A | undesirable_weight: {{1.0}}
dpo_label_smoothing | AL | label_smoothing: {{0.1}}
ref_model | LS | | the reference is the base, or the adapter to start from
ref_model_adapters | L | adapter_name_or_path: {{runs/sft}}
wandb_project | AH | | set WANDB_PROJECT on the command line
wandb_entity | AH | | set WANDB_ENTITY on the command line
wandb_name | A | run_name: {{my-run}}
wandb_run_id | A | | the id of a run is kept for its resumes
wandb_watch | A | | set WANDB_WATCH on the command line
wandb_log_model | A | | set WANDB_LOG_MODEL on the command line
use_wandb | LU | report_to: wandb
use_tensorboard | A | report_to: tensorboard
use_mlflow | A | report_to: mlflow
use_swanlab | L | report_to: wandb
hf_hub_token | L | | set HF_TOKEN on the command line
ms_hub_token | L | | models come from the Hugging Face hub, or a local path
use_hf | S | | models come from the Hugging Face hub, or a local path
hf_use_auth_token | A | | set HF_TOKEN on the command line
token | U | | set HF_TOKEN on the command line
sequence_parallel_size | S | | not supported
context_parallel_size | A | | not supported
fast_inference | U | | nothing is generated while training
gpu_memory_utilization | U | memory_budget: 20GiB
upcast_layernorm | L | | norms are float32 where the model says so
upcast_lmhead_output | L | | the loss is computed in float32
moe_aux_loss_coef | L | model_init_kwargs: {output_router_logits: true}
use_galore | L | optim: galore_adamw | with use_peft: false
use_badam | L | | not supported
use_llama_pro | L | | not supported
freeze_trainable_layers | L | | not supported; adapters train all layers
unfrozen_parameters | A | | not supported; adapters train all layers
relora_steps | A | | not supported
create_new_adapter | L | | merge the adapter first
compute_accuracy | L | | mean_token_accuracy is logged
print_param_status | L | | what is trained is printed
eval_table_size | A | | not supported
do_bench_eval | A | | not supported
gptq | A | | bitsandbytes; name the 16-bit checkpoint
media_dir | L | | text models only
image_max_pixels | L | | text models only
max_pixels | S | | text models only
freeze_vit | S | | text models only
freeze_llm | S | | text models only
freeze_aligner | S | | text models only
finetune_vision_layers | U | | text models only
finetune_language_layers | U | lora_target_modules: all-linear
finetune_attention_modules | U | lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
finetune_mlp_modules | U | lora_target_modules: [gate_proj, up_proj, down_proj]
max_lora_rank | U | lora_r: {{16}}
embedding_learning_rate | U | | embeddings are not trained, but for additional_special_tokens
push_to_hub_revision | H | hub_revision: {{main}}
benchmarks | H | | not supported
callbacks | H | | not supported
strict | AS | | every row is checked
check_model | S | | every base is checked
plugins | A | | a recipe of your own is a package
external_plugins | S | | a recipe of your own is a package
custom_register_path | S | | a recipe of your own is a package
"""

OTHERS: dict[str, Other] = {}
for _line in _TABLE.strip().splitlines():
    _key, _who, _write, *_why = (cell.strip() for cell in f"{_line} |".split(" |"))
    OTHERS[_key] = Other(tuple(SYSTEMS[letter] for letter in _who), _write, _why[0] if _why else "")
