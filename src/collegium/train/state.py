"""Training state apart from the student's weights, as JSON and safetensors.

Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from collegium.errors import TrainingError
from collegium.models.adapters import adapter_layers, merged_copy
from collegium.train.checkpoint import STATE
from collegium.train.sharded import shard_of, shards_of, whole

# transformers saves optimizer and random generators as pickles, which run code when loaded.
OPTIMIZER = "optimizer.safetensors"
OBJECTIVE = "objective.safetensors"
STUDENT = "student"
TRAINED = "trained.safetensors"
"""Trained parameters of a student with adapters, whose folder `student` holds merged weights."""
TRAINER_STATE = "trainer_state.json"


def read(folder: Path) -> dict[str, Any]:
    """Read `state.json`."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def save(folder: Path, record: Mapping[str, Any], files: Mapping[str, dict[str, Tensor]]) -> None:
    """Write the parts of `state.json` and files of tensors to a checkpoint.

    Raises:
        TrainingError: a part cannot be saved without pickle.
    """
    for name, tensors in files.items():
        # Cloned, because safetensors refuses tensors that share memory.
        save_file({key: x.detach().cpu().clone() for key, x in tensors.items()}, folder / name)
    for name, value in record.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise TrainingError(
                f"{name}: its state cannot be saved without pickle ({error}); choose another {name}"
            ) from error
    (folder / STATE).write_text(json.dumps(record), encoding="utf-8")


def optimizer_state(
    optimizer: Optimizer, *, keep: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split an optimizer's state into JSON and tensors named `INDEX.KEY`, as `whole` gathers."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
        scalars[str(index)] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
    groups = [
        {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {"scalars": scalars, "groups": groups}, whole(tensors, keep=keep)


def load_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Restore optimizer and scheduler from a checkpoint."""
    record = read(folder)
    state = {int(index): values for index, values in record["optimizer"]["scalars"].items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in load_file(folder / OPTIMIZER).items():
        index, key = name.split(".", 1)
        state[int(index)][key] = shard_of(tensor, parameters[int(index)])
    # JSON turned tuples such as `betas` into lists.
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in record["optimizer"]["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(record["scheduler"])
    if isinstance(scheduler, LambdaLR):
        # The saved rate is that of the saved length: a longer run goes on with its own.
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def rng_state() -> dict[str, Any]:
    """Return the states of the random generators of Python, numpy and torch."""
    name, keys, *rest = np.random.get_state(legacy=True)
    record: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        record["cuda"] = [_to_hex(state) for state in torch.cuda.get_rng_state_all()]
    return record


def load_rng_state(record: Mapping[str, Any]) -> None:
    """Restore the return value of `rng_state`."""
    version, internal, gauss = record["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(record["numpy"]))
    torch.set_rng_state(_from_hex(record["torch"]))
    if torch.cuda.is_available() and "cuda" in record:
        torch.cuda.set_rng_state_all([_from_hex(state) for state in record["cuda"]])


def save_student(
    folder: Path,
    student: PreTrainedModel,
    tokenizer: Any,
    *,
    use_cache: bool,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a student as a plain Hugging Face folder, with its adapters merged.

    `use_cache` is the value in the saved config. The trainer turns it off for training only.
    `weights` are those of a student that is sharded.
    """
    plain = merged_copy(student) if adapter_layers(student) else student
    training_value, plain.config.use_cache = plain.config.use_cache, use_cache
    try:
        with no_shard_bars():
            plain.save_pretrained(folder, state_dict=weights)
    finally:
        plain.config.use_cache = training_value
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def trained_tensors(student: PreTrainedModel) -> dict[str, Tensor]:
    """Return the trained parameters of a student with adapters by name, else nothing.

    Merged weights cannot be taken apart again, and the base of adapters does not change.
    """
    if not adapter_layers(student):
        return {}
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def load_weights(student: PreTrainedModel, objective: nn.Module, folder: Path) -> None:
    """Copy saved weights into the student, bit by bit, and into the adapters of the objective.

    Raises:
        TrainingError: the checkpoint was saved from a student or an objective of other layers.
    """
    path = folder / STUDENT
    if (folder / TRAINED).exists():
        weights = load_file(folder / TRAINED)
        weights = dict(student.state_dict()) | weights
    else:
        with no_shard_bars():
            saved = type(student).from_pretrained(path, dtype=student.dtype, local_files_only=True)
        weights = saved.state_dict()
    terms = load_file(folder / OBJECTIVE) if (folder / OBJECTIVE).exists() else {}
    other = "from another student; must have the same layers and widths; resume with the student"
    others = "with other loss terms; must be the same; resume with the objective"
    for module, tensors, problem in ((student, weights, other), (objective, terms, others)):
        try:
            module.load_state_dict(shards_of(tensors, module.state_dict()))
        except RuntimeError as error:
            message = f"{folder.name}: was saved {problem} of that run ({error})"
            raise TrainingError(message) from error


@contextmanager
def no_shard_bars() -> Iterator[None]:
    """Suppress the progress bars of transformers, one per weight file, that would break ours."""
    was_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            hf_logging.enable_progress_bar()


def _to_hex(state: Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
