"""LoRA adapters of a recipe: to train on a student, and files of trained ones.

A layer of weight W (out, in) becomes W + (alpha / r) B A, with A (r, in) and B (out, r). PEFT does
the work; it is an optional dependency.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from collegium.errors import ModelError, first_line
from collegium.models.folder import resolve_folder
from collegium.models.weights import ADAPTER, PICKLES, read_header, read_json
from collegium.options import option, torch
from collegium.storage.files import fingerprint, listing, sha256_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAME = "default"
PREFIX = "base_model.model."
"""Start of the names of tensors in adapter files."""


@option
class LoraOptions:
    """Low-rank adapters as the only trained parameters. They are merged when it is saved."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank of an adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The product of the two matrices is multiplied by alpha / r."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the adapted layers, such as `q_proj`, or all linear ones but the head."""


def add_lora(model: PreTrainedModel, options: LoraOptions, *, seed: int, where: str) -> None:
    """Freeze the model in place and add adapters with B = 0, which change no output yet.

    Raises:
        ModelError: PEFT is not installed, or the model has no layers of these names.
    """
    peft = _peft(where)
    config = peft.LoraConfig(
        r=options.r, lora_alpha=options.alpha, target_modules=options.targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _inject(model, config, ADAPTER_NAME, f"{where}.lora.targets")
    for parameter in model.parameters():
        # In half precision, small steps of the optimizer would be lost. PEFT casts the inputs.
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def attach_adapter(model: PreTrainedModel, path: str, *, name: str, where: str) -> None:
    """Add the adapter of a folder or hub id to the model in place, as the active one.

    On the meta device names and shapes are compared, and no tensor is read.

    Raises:
        ModelError: PEFT is not installed, or the adapter is damaged or belongs to another model.
    """
    peft = _peft(where)
    folder = _adapter_folder(path, where)
    settings = read_json(folder / ADAPTER, where=where)
    if settings.get("peft_type") != "LORA":
        raise ModelError(
            f"{where}: {folder / ADAPTER}: peft_type: got {settings.get('peft_type')}; must be "
            "LORA; merge the adapter into its base model, and use the result"
        )
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # of any type for bad values
        raise ModelError(f"{where}: {folder / ADAPTER} cannot be read ({error})") from error
    config.inference_mode = True
    _inject(model, config, name, where)
    file = folder / ADAPTER_WEIGHTS
    shapes = {
        key.removeprefix(PREFIX): entry.shape
        for key, entry in read_header(file, where=where).items()
    }
    # By itself PEFT expects whole embeddings wherever the vocabulary is not that of the base.
    embeddings = False if all("lora_" in key for key in shapes) else "auto"
    expected = peft.get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=embeddings
    )
    wrong = {
        key for key in shapes.keys() | expected.keys() if key not in shapes or key not in expected
    }
    wrong |= {key for key in shapes.keys() - wrong if shapes[key] != tuple(expected[key].shape)}
    if wrong:
        raise ModelError(
            f"{where}: {folder} does not fit the model ({len(wrong)} of {len(expected)} tensors, "
            f"such as {min(wrong)}); must be an adapter of this model (it was trained on "
            f"{settings.get('base_model_name_or_path') or 'an unknown one'}); set `model` to that"
        )
    if model.device.type == "meta":
        return
    peft.set_peft_model_state_dict(model, read_adapter(path, where=where), adapter_name=name)


def read_adapter(path: str, *, where: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter by name, or raise ModelError if one is not finite."""
    # Imported here: it loads torch, which an error in a recipe need not wait for.
    from safetensors.torch import load_file

    file = _adapter_folder(path, where) / ADAPTER_WEIGHTS
    state = load_file(file)
    for key, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{where}: {key} in {file} has non-finite values; must be finite; save the adapter "
                "again from an earlier checkpoint"
            )
    return state


def adapter_identity(path: str, *, where: str) -> dict[str, str]:
    """Return digests of the files of an adapter."""
    folder = _adapter_folder(path, where)
    settings = read_json(folder / ADAPTER, where=where)
    # The path of the base is that of the machine that trained it.
    settings.pop("base_model_name_or_path", None)
    return {"config": fingerprint(settings), "weights": sha256_of(folder / ADAPTER_WEIGHTS)}


def _adapter_folder(path: str, where: str) -> Path:
    folder = resolve_folder(path, where=where)
    if folder is None:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, allow_patterns=[ADAPTER, ADAPTER_WEIGHTS]))
        # Network, permissions, a missing repository: errors of many types.
        except Exception as error:
            raise ModelError(
                f"{where}: the adapter {path} cannot be loaded ({first_line(error)}); give a "
                "folder, or check the hub id and the network"
            ) from error
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
            hint = f"; {pickles[0]} is a pickle, which can run code" if pickles else ""
            raise ModelError(
                f"{where}: no {name} in {folder} (found: {listing(folder)}{hint}); must be a "
                "folder that `PeftModel.save_pretrained` wrote"
            )
    return folder


def _inject(model: PreTrainedModel, config: Any, name: str, where: str) -> None:
    try:
        with warnings.catch_warnings():
            # PEFT warns about a second adapter, which is the purpose of a shared base.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            model.add_adapter(config, adapter_name=name)
    # PEFT raises errors of several types for layers that do not exist or cannot be adapted.
    except Exception as error:
        raise ModelError(
            f"{where}: cannot adapt {type(model).__name__} ({' '.join(str(error).split())}); must "
            "name linear layers of the model; choose among its modules, or `all-linear`"
        ) from error


def _peft(where: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"{where}: adapters need the package peft; pip install 'collegium[peft]'"
        ) from error
    return peft
