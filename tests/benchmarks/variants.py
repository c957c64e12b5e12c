"""The trainers that the benchmarks compare: plain TRL under its options, and halfbyte, stepped by hand."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte import QLoRAPlugin
from halfbyte.quantization.dtype import choose_compute_dtype
from tests import plain_trl
from tests.benchmarks.workload import Case

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Variant:
    """One way to train: ``ours`` or TRL's, in ``dtype``, with the given options of the trainer's configuration."""

    name: str
    dtype: str
    ours: bool = False
    checkpointing: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    memory_budget: str = "auto"


TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
PRECOMPUTED = {"precompute_ref_log_probs": True}


def native_dtype() -> str:
    """The dtype halfbyte would choose here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return str(choose_compute_dtype(device)).removeprefix("torch.")


def reference(dtype: str) -> Variant:
    return Variant(f"TRL {dtype}, checkpointing", dtype)


def halfbyte(dtype: str, memory_budget: str = "auto") -> Variant:
    label = (
        f"halfbyte {dtype}" if memory_budget == "auto" else f"halfbyte {dtype}, memory_budget {memory_budget}"
    )
    return Variant(label, dtype, ours=True, memory_budget=memory_budget)


def with_references(dtype: str) -> list[Variant]:
    """DPO whose references are computed before training, by TRL and by halfbyte."""
    return [
        Variant(f"TRL {dtype}, checkpointing, references precomputed", dtype, options=PRECOMPUTED),
        Variant(f"halfbyte {dtype}, references precomputed", dtype, ours=True, options=PRECOMPUTED),
    ]


# The CLI's own defaults: --load_in_4bit computes in float32 under bfloat16 autocast.
TRL_DEFAULTS = Variant("TRL defaults", "float32", options={"bf16": True})


def grid(case: Case) -> list[Variant]:
    """TRL's options that may make it faster, to be tried on the threshold cases.

    TRL's selective checkpointing is not among them: with these versions ``train()`` raises "Unexpected keyword
    arguments: selective" (test_benchmarks.py). Packing is, where the rows leave something to pack: two full
    rows a step have about the tokens of a batch.
    """
    found = []
    for dtype in ("float32", "bfloat16"):
        for label, checkpointing in (("no checkpointing", False), ("checkpointing", True)):
            name = f"TRL {dtype}, {label}"
            found.append(Variant(name, dtype, checkpointing=checkpointing))
            if case.method == "dpo":  # TRL turns padding_free off, and cannot pack pairs
                continue
            free = {"padding_free": True}
            found.append(Variant(f"{name}, padding_free", dtype, checkpointing=checkpointing, options=free))
            if case.lengths != "fixed":
                packed = {"packing": True, "max_length": case.length, "per_device_train_batch_size": 2}
                found.append(Variant(f"{name}, packing", dtype, checkpointing=checkpointing, options=packed))
    return found


@dataclass(frozen=True)
class Step:
    """One optimizer step: its loss, its seconds (CPU time, or the clock on CUDA), its real tokens."""

    loss: float
    seconds: float
    tokens: int


class Stepper:
    """A trainer, set up as ``train()`` sets it up, that takes one optimizer step at a time."""

    def __init__(self, variant: Variant, case: Case, model: Path, rows: Dataset, output: Path) -> None:
        self.variant = variant
        bf16 = variant.options.get("bf16", variant.dtype == "bfloat16")
        options: dict[str, Any] = {
            "output_dir": str(output),
            "use_cpu": not torch.cuda.is_available(),
            "bf16": bf16,
            "gradient_checkpointing": variant.checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "per_device_train_batch_size": case.batch,
            "train_sampling_strategy": "sequential",
            "optim": "adamw_torch",
            "learning_rate": 1e-4,
            "max_grad_norm": 1.0,
            "max_length": None,
            "report_to": "none",
            "disable_tqdm": True,
            **{k: v for k, v in variant.options.items() if k != "bf16"},
        }
        torch.manual_seed(0)
        self.trainer = (
            self._ours(case, model, rows, options) if variant.ours else self._trl(case, model, rows, options)
        )
        self._same_adapter()
        self._set_up()

    def _ours(self, case: Case, model: Path, rows: Dataset, options: dict[str, Any]) -> Trainer:
        plugin = QLoRAPlugin(
            dtype=self.variant.dtype, lora_dropout=case.dropout, memory_budget=self.variant.memory_budget
        )
        trainer_cls, config = TRAINERS[case.method]
        trainer = plugin.trainer(trainer_cls, model=str(model), args=config(**options), train_dataset=rows)
        self.path = trainer.report.fusion.line()
        return trainer

    def _trl(self, case: Case, model: Path, rows: Dataset, options: dict[str, Any]) -> Trainer:
        # References are precomputed in evaluation mode: repacked, what followed would train without most gradients.
        base = plain_trl.not_repacked(plain_trl.base(model, getattr(torch, self.variant.dtype)))
        targets = LORA
        if case.experts:
            _pack_experts(base)
            # PEFT reads `all-linear` as the experts too.
            targets = {**LORA, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        peft_model = get_peft_model(base, LoraConfig(**targets, lora_dropout=case.dropout))
        tokenizer = AutoTokenizer.from_pretrained(model)
        trainer_cls, config = TRAINERS[case.method]
        args = config(**options)
        return trainer_cls(model=peft_model, args=args, train_dataset=rows, processing_class=tokenizer)

    def _same_adapter(self) -> None:
        """Values that bfloat16 holds, since TRL rounds a quantized model's adapters to it; B is not zero."""
        generator = torch.Generator().manual_seed(11)
        for name, parameter in sorted(self.trainer.model.named_parameters()):
            if parameter.requires_grad:
                value = torch.randn(parameter.shape, generator=generator) * (
                    0.02 if "lora_B" in name else 0.05
                )
                parameter.data.copy_(value.bfloat16())
                if self.variant.dtype == "float32" and not self.trainer.args.bf16:
                    parameter.data = parameter.data.float()

    def _set_up(self) -> None:
        trainer, args = self.trainer, self.trainer.args
        trainer.create_optimizer()
        if args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        trainer.model.train()
        self.loader = iter(trainer.get_train_dataloader())
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model
        trainer.current_gradient_accumulation_steps = 1
        # One state for the process: where a run broke off between two passes, no optimizer would step.
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        self.parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}

    def step(self) -> Step:
        """Take one optimizer step."""
        begin = _seconds()
        inputs = next(self.loader)
        items = self.trainer._get_num_items_in_batch([inputs], self.trainer.args.device)
        loss = self.trainer.training_step(self.model, inputs, items)
        self.trainer.accelerator.clip_grad_norm_(self.parameters.values(), 1.0)
        self.gradients = {name: p.grad for name, p in self.parameters.items()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(loss.item(), _seconds() - begin, _tokens(inputs))


def _pack_experts(base: torch.nn.Module) -> None:
    """Pack the experts as one can with bitsandbytes alone: once they are loaded."""
    for module in list(base.modules()):
        for name in ("gate_up_proj", "down_proj"):
            if getattr(module, name, None) is not None and isinstance(
                getattr(module, name), torch.nn.Parameter
            ):
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")


def _tokens(inputs: dict[str, torch.Tensor]) -> int:
    """Real tokens of a batch, padding excluded."""
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def _seconds() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
