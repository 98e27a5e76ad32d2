"""How long, how fast and with which optimizer the student is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from collegium.types import STRICT

if TYPE_CHECKING:
    from transformers import TrainingArguments

Scheduler = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainOptions:
    """The length, the batch and the optimizer of a run, under the names of Hugging Face training arguments."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4
    """Peak learning rate."""
    max_steps: int = -1
    """Number of optimizer steps; -1 leaves the length to `num_train_epochs`."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training windows; not read where `max_steps` is given."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Windows per micro-batch."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    """Windows per batch of an evaluation."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimizer step; the gradient does not depend on the split."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Steps of linear warm-up, or the share of all steps where it is below 1."""
    lr_scheduler_type: Scheduler = "cosine"
    """Course of the learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay; biases, norms and adapters have none."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients of the student are clipped to this norm; 0 turns clipping off."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    optim: Optimizer = "adamw_torch"
    """Name of the optimizer."""
    bf16: bool = False
    """Run the student's layers in bfloat16; weights, head and losses stay as they are."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, for memory."""
    logging_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two rows of log.jsonl; the last step always has one."""
    save_steps: Annotated[int, Field(ge=1)] = 200
    """Steps between two checkpoints; the last step always has one."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; at least two, so that a damaged one does not end a run."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that collate batches; 0 does it in the trainer's own."""
    torch_compile: bool = False
    """Compile the student's layers."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps: got {self.max_steps}; must be at least 1, or -1 to train for num_train_epochs"
            )
        if self.max_steps > 0 and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps: got {self.warmup_steps:g}; must be at most max_steps ({self.max_steps}), "
                "or the peak learning rate is never reached"
            )
        return self


def training_arguments(
    options: TrainOptions, *, output_dir: str | Path, seed: int, on_cpu: bool | None = None
) -> TrainingArguments:
    """Translate the options for transformers: nothing is reported elsewhere, nothing is filtered, all is seeded.

    Args:
        options: the choices of the recipe.
        output_dir: where log and checkpoints go.
        seed: seed of dropout and of the order of the data.
        on_cpu: stay on the CPU although there is an accelerator; None uses one where there is one.
    """
    import torch
    from transformers import TrainingArguments

    on_accelerator = torch.accelerator.is_available() if on_cpu is None else not on_cpu
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        seed=seed,
        data_seed=seed,
        use_cpu=not on_accelerator,
        dataloader_pin_memory=on_accelerator,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        logging_strategy="steps",
        save_strategy="steps",
        learning_rate=options.learning_rate,
        max_steps=options.max_steps,
        num_train_epochs=options.num_train_epochs,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type=options.lr_scheduler_type,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        optim=options.optim,
        bf16=options.bf16,
        logging_steps=options.logging_steps,
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        dataloader_num_workers=options.dataloader_num_workers,
        torch_compile=options.torch_compile,
    )
    # Set afterwards: the name of this argument changes in transformers 6, and both names are read here.
    arguments.gradient_checkpointing = options.gradient_checkpointing
    arguments.activation_checkpointing = options.gradient_checkpointing
    return arguments
