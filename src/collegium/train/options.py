"""Options of a training run: the loss, and its length, batch size and optimizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from collegium.distributions import Capability
from collegium.fusion.requirements import Requirement
from collegium.kernels.backends import Backend
from collegium.losses.divergences import DIVERGENCES, Divergence, ForwardKL
from collegium.losses.pairing import FeatureOptions
from collegium.options import OneOf, option

if TYPE_CHECKING:
    from transformers import TrainingArguments

Scheduler = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr",
    "warmup_stable_decay",
]  # fmt: skip
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"]


@option
class TrainOptions:
    """Length, batch size and optimizer of a run, named like Hugging Face training arguments."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4
    """Peak learning rate."""
    max_steps: int = -1
    """Optimizer steps. -1 trains for `num_train_epochs`."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training windows, ignored if `max_steps` is set."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Windows per micro-batch."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    """Windows per evaluation batch."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimizer step. The gradient does not depend on this split."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up in steps, or as a fraction of all steps if below 1."""
    lr_scheduler_type: Scheduler = "cosine"
    """Learning-rate schedule after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, not applied to biases, norms and adapters."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the student's gradients to this norm. 0 disables clipping."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the second moment."""
    optim: Optimizer = "adamw_torch"
    """Optimizer."""
    bf16: bool = False
    """Run the student's layers in bfloat16. Weights, head and losses keep their dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    logging_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between rows of log.jsonl. The last step is always logged."""
    save_steps: Annotated[int, Field(ge=1)] = 200
    """Steps between checkpoints. The last step always saves one."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints to keep, at least 2 so that a run survives a damaged one."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes that collate batches. 0 collates in the training process."""
    torch_compile: bool = False
    """Compile the student's layers."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps: got {self.max_steps}; must be at least 1, "
                "or -1 to train for num_train_epochs"
            )
        if self.max_steps > 0 and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps: got {self.warmup_steps:g}; must be at most max_steps "
                f"({self.max_steps}), or the peak learning rate is never reached"
            )
        return self


@option
class ObjectiveOptions:
    """The loss of the student: teachers, labels and hidden states, and the share of each."""

    kd_ratio: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the fused target. The labels have the rest; 0 trains on labels only."""
    temperature: float = 1.0
    """Softens target and student. The divergence is multiplied by its square."""
    divergence: Annotated[Divergence, OneOf(DIVERGENCES)] = ForwardKL()
    """Divergence between fused target and student."""
    block_size: Annotated[int, Field(ge=1)] | None = None
    """Rows per block of logits; null fits `block_megabytes`. Changes speed and memory only."""
    block_megabytes: Annotated[int, Field(ge=1)] | None = None
    """Memory of one block of logits; null is 256 on a CPU and 1024 on a GPU."""
    backend: Backend = "auto"
    """Kernels for the arithmetic over the vocabulary. Changes speed only, up to rounding."""
    features: FeatureOptions | None = None
    """Feature terms on hidden states; null for none."""

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(f"got {value:g}; must be > 0; for hard labels use kd_ratio: 0")
        return value

    def requirements(self) -> list[Requirement]:
        """The requirements on the source of targets."""
        needs = []
        if not self.divergence.allows_draws:
            key, name = "objective.divergence", type(self.divergence).__name__
            needed = Capability.LOGARITHMS
            if self.divergence.needs_all_tokens:
                needed = Capability.ALL_TOKENS
            needs.append(Requirement(key, name, "forward_kl", needed))
        if self.temperature != 1.0:
            key, value = "objective.temperature", f"{self.temperature:g}"
            needs.append(Requirement(key, value, "1", Capability.ANY_TEMPERATURE))
        if self.features is not None:
            key = "objective.features"
            needs.append(Requirement(key, "feature terms", "omitted", Capability.FEATURES))
        return needs


def training_arguments(
    options: TrainOptions, *, output_dir: str | Path, seed: int, on_cpu: bool | None = None
) -> TrainingArguments:
    """Translate the options to transformers: no external reporting, no filtering, all seeded.

    The folder `output_dir` is for the log and the checkpoints, the seed for dropout and the data
    order. `on_cpu` None uses an accelerator if there is one.
    """
    import torch
    from transformers import TrainingArguments

    from collegium.train.arguments import adopt_arguments

    on_accelerator = torch.accelerator.is_available() if on_cpu is None else not on_cpu
    named_alike = dataclasses.asdict(options)
    is_checkpointed = named_alike.pop("gradient_checkpointing")
    arguments = TrainingArguments(
        **named_alike,
        output_dir=str(output_dir),
        seed=seed,
        use_cpu=not on_accelerator,
        dataloader_pin_memory=on_accelerator,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="steps",
        save_strategy="steps",
    )
    # Set afterwards: transformers 6 renames this argument, and both names are read here.
    arguments.gradient_checkpointing = arguments.activation_checkpointing = is_checkpointed
    adopt_arguments(arguments)
    return arguments
