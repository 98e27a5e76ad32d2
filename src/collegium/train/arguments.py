"""Arguments of `transformers.Trainer`: adopted, or refused before a run.

`docs/trainer_arguments.md` lists every argument with its effect here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

from collegium.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from transformers import TrainingArguments

IDENTITY = (
    "optim", "optim_args", "optim_target_modules", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "bf16",
)  # fmt: skip
"""Arguments that shape every step. A resumed run must keep them; its length may change."""

BFLOAT16_RATE = 1e-4
"""Learning rate below which AdamW leaves bfloat16 weights of usual size (0.02) as they are."""
# At 0.02 neighbors are 2^-13 apart, and a step of AdamW is about the learning rate.


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", [], {})


def _drops_labels(value: Any) -> bool:
    return value is not None and list(value) != ["labels"]


UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n_gpu": (lambda count: count > 1, "at most 1; set CUDA_VISIBLE_DEVICES to one device"),
    "deepspeed": (_is_set, "None; use DDP or FSDP2"),
    "parallelism_config": (_is_set, "None; use DDP or FSDP2"),
    "fp16": (_is_set, "False; use bf16"),
    "fp16_full_eval": (_is_set, "False; evaluation has the precision of training"),
    "bf16_full_eval": (_is_set, "False; evaluation has the precision of training, so use bf16"),
    "label_smoothing_factor": (_is_set, "0; the targets of the teachers are soft already"),
    "use_liger_kernel": (_is_set, "False; choose the kernels by ObjectiveOptions.backend"),
    "use_cache": (_is_set, "False; training keeps no cache of keys and values"),
    "auto_find_batch_size": (
        _is_set,
        "False; lower per_device_train_batch_size and raise gradient_accumulation_steps, which "
        "gives the same gradient",
    ),
    "save_total_limit": (lambda limit: limit == 1, "at least 2, in case one is damaged"),
    "save_only_model": (_is_set, "False; a checkpoint always resumes, so use save_student"),
    "enable_jit_checkpoint": (_is_set, "False; SIGTERM saves a checkpoint and stops the run"),
    "push_to_hub": (_is_set, "False; call trainer.push_to_hub() after training"),
    "label_names": (_drops_labels, "None or ['labels'], the targets of a language model"),
}
"""Condition under which an argument is refused, and the remedy."""
_DISTRIBUTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "average_tokens_across_devices": (
        lambda flag: not flag,
        "True; the loss is a mean over the tokens of all processes",
    ),
    "accelerator_config.split_batches": (_is_set, "False; set per_device_train_batch_size"),
    "accelerator_config.dispatch_batches": (_is_set, "False or None; every process reads the data"),
    "accelerator_config.even_batches": (lambda flag: not flag, "True; processes step together"),
}
"""The same for runs of several processes."""


def bfloat16_warning(where: str, learning_rate: float) -> str:
    """Return the warning about bfloat16 weights at a small learning rate."""
    return (
        f"{where}: has bfloat16 weights at learning rate {learning_rate:g}; below "
        f"{BFLOAT16_RATE:g} most updates round to nothing; use float32 weights with bf16"
    )


def adopt_arguments(args: TrainingArguments) -> None:
    """Set the arguments that our trainer depends on, and refuse those that it does not support.

    Raises:
        TrainingError: an argument has an unsupported value.
    """
    table = UNSUPPORTED | (_DISTRIBUTED if args.world_size > 1 else {})
    for name, (is_refused, remedy) in table.items():
        value: Any = args
        for part in name.split("."):
            value = getattr(value, part, None)
        if is_refused(value):
            raise TrainingError(f"{name}: got {value}; must be {remedy}")
    # The student's `forward` takes no sample, domain or teacher ids; keep these columns.
    args.remove_unused_columns = False
    # The filter would hide a NaN from the log; a step that is not finite is refused instead.
    args.logging_nan_inf_filter = False
    if args.data_seed is None:
        # The order of the data must not depend on other users of the global generators.
        args.data_seed = args.seed


def check_accelerator(accelerator: Accelerator) -> None:
    """Check the settings that `accelerate launch` or its config file made.

    Raises:
        TrainingError: one of them is not supported.
    """
    precision = accelerator.mixed_precision
    if precision not in ("no", "bf16"):
        raise TrainingError(f"mixed_precision of accelerate: got {precision}; must be no or bf16")
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise TrainingError("deepspeed of accelerate: got a config; must be off; use DDP or FSDP2")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        _adopt_sharding(plugin)
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise TrainingError(
            "fsdp of accelerate: got a config that has no effect; must be off for a single process "
            "and on the CPU; start several processes on accelerators, or disable it"
        )


def _adopt_sharding(plugin: FullyShardedDataParallelPlugin) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    if plugin.fsdp_version != 2:
        raise TrainingError(
            f"fsdp of accelerate: got version {plugin.fsdp_version}; must be 2; set `fsdp_version: "
            "2`, or the `version` of `fsdp_config`"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise TrainingError(
            "fsdp of accelerate: got an offload to the CPU; must be off; disable it"
        )
    # Every process has the whole student at the start, and buffers are not distributed.
    plugin.cpu_ram_efficient_loading = False
    # Autocast chooses the precision, as in DDP, and gradients are reduced in that of the weights.
    # Accelerate's policy would round the loss to bfloat16.
    plugin.mixed_precision_policy = None


def arguments_identity(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that a resumed run must keep, as plain data."""
    return {name: _plain(getattr(args, name, None)) for name in IDENTITY}


def _plain(value: Any) -> Any:
    value = value.value if isinstance(value, Enum) else value
    return value if isinstance(value, int | float | type(None)) else str(value)
