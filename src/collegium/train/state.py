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
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from collegium.errors import TrainingError
from collegium.train.meter import StepMeter

# transformers saves optimizer and random generators as pickles, which run code when loaded.
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
OBJECTIVE = "objective.safetensors"
STUDENT = "student"


def read(folder: Path) -> dict[str, Any]:
    """Read `state.json`."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def save(
    folder: Path,
    record: Mapping[str, Any],
    *,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    objective: nn.Module,
    meter: StepMeter,
) -> None:
    """Write optimizer, scheduler, objective, random generators and meter to a checkpoint.

    Raises:
        TrainingError: a part cannot be saved without pickle.
    """
    optimizer_record, tensors = optimizer_state(optimizer)
    _save_tensors(tensors, folder / OPTIMIZER)
    # The adapters and running statistics of the terms, if any.
    if objective.state_dict():
        _save_tensors(objective.state_dict(), folder / OBJECTIVE)
    parts = {
        **record,
        "optimizer": optimizer_record,
        "scheduler": scheduler.state_dict(),
        "rng": rng_state(),
        "meter": meter.state(),
    }
    text = json.dumps({name: plain(value, name) for name, value in parts.items()})
    (folder / STATE).write_text(text, encoding="utf-8")


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Cloned, because safetensors refuses tensors that share memory.
    save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, path)


def load_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Restore optimizer and scheduler from a checkpoint."""
    record = read(folder)
    load_optimizer_state(optimizer, record["optimizer"], load_file(folder / OPTIMIZER))
    scheduler.load_state_dict(record["scheduler"])


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split an optimizer's state into JSON and tensors named `INDEX.KEY`.

    Raises:
        TrainingError: the optimizer holds a value that is neither a number nor a tensor.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        scalars[str(index)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                scalars[str(index)][key] = value
    groups = [
        {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return plain({"scalars": scalars, "groups": groups}, "optimizer"), tensors


def load_optimizer_state(
    optimizer: Optimizer, record: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the return value of `optimizer_state`."""
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in record["scalars"].items()
    }
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    # JSON turned tuples such as `betas` into lists.
    groups = [
        {
            key: tuple(value) if isinstance(value, list) and key != "params" else value
            for key, value in group.items()
        }
        for group in record["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state() -> dict[str, Any]:
    """Return the states of the random generators of Python, numpy and torch."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    record: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [name, [int(key) for key in keys], position, has_gauss, cached],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        record["cuda"] = [_to_hex(state) for state in torch.cuda.get_rng_state_all()]
    return record


def load_rng_state(record: Mapping[str, Any]) -> None:
    """Restore the return value of `rng_state`."""
    version, internal, gauss = record["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = record["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(record["torch"]))
    if torch.cuda.is_available() and "cuda" in record:
        torch.cuda.set_rng_state_all([_from_hex(state) for state in record["cuda"]])


def load_student(model: PreTrainedModel, folder: Path) -> None:
    """Copy the weights of a saved student into a live one, bit by bit.

    Raises:
        TrainingError: the folder holds a model with other parameters.
    """
    with no_shard_bars():
        saved = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True)
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise TrainingError(
            f"{folder.parent.name}: was saved from another student; must have the same layers "
            f"and widths; resume with the student of that run ({error})"
        ) from error


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


def load_objective(objective: nn.Module, folder: Path) -> None:
    """Restore the adapters and running statistics of the objective from a checkpoint.

    Raises:
        TrainingError: the adapters differ from the saved ones.
    """
    path = folder / OBJECTIVE
    saved = load_file(path) if path.exists() else {}
    try:
        objective.load_state_dict(saved)
    except RuntimeError as error:
        raise TrainingError(
            f"{folder.name}: was saved with other loss terms; must be the same; resume with the "
            f"objective of that run ({error})"
        ) from error


def plain(value: Any, where: str) -> Any:
    """Convert a value to plain JSON types, equal to the value that is read back.

    Raises:
        TrainingError: the value is not JSON-serializable.
    """
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise TrainingError(
            f"{where}: its state cannot be saved without pickle ({error}); choose another {where}"
        ) from error


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return one line per entry that differs."""
    return [
        f"{key}: the checkpoint has {saved.get(key)!r}, this run has {current.get(key)!r}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]


def _to_hex(state: Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
