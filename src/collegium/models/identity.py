"""Identity of a model: a digest of its tensors and config, or the commit of a hub id."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.errors import ModelError, first_line
from collegium.models.folder import resolve_folder
from collegium.models.lora import adapter_identity
from collegium.models.weights import CONFIG, quantization_of, read_json, weights_digest
from collegium.storage.files import fingerprint, sha256_of

if TYPE_CHECKING:
    from collegium.models.options import ModelOptions

NEUTRAL_KEYS = {
    *("transformers_version", "_name_or_path", "architectures", "auto_map", "use_cache"),
    # The type in use is an option, or that of the files.
    *("dtype", "torch_dtype"),
}
"""Keys of a config that do not change the outputs, and change when a model is saved again."""


def model_identity(options: ModelOptions) -> dict[str, Any]:
    """Return everything in a model's files that its outputs depend on.

    Copies of a model have the same identity, with its tensors in any number of files. Raises
    ModelError if the files cannot be read.
    """
    where = options.model
    folder = resolve_folder(options.model, where=where)
    identity = {
        # A hub id is not fetched: its name and commit identify the weights.
        "weights": weights_digest(options.model),
        "commit": options.commit(where),
        # Only the values that differ from the defaults of the class, as later releases add keys.
        "config": fingerprint(without_neutral(options.load_config(where).to_diff_dict())),
    }
    if folder is not None and quantization_of(folder, where=where):
        # How the integers are read. `load_config` returns the config of a float model.
        settings = read_json(folder / CONFIG, where=where)["quantization_config"]
        identity["quantization"] = fingerprint(settings)
    if options.adapter is not None:
        identity["adapter"] = adapter_identity(options.adapter, where=where)
    if folder is not None and options.runs_code(where):
        identity["code"] = {path.name: sha256_of(path) for path in sorted(folder.glob("*.py"))}
    return identity


def without_neutral(config: Any) -> Any:
    """Return a config as plain data without `NEUTRAL_KEYS`, also in the configs inside it."""
    if isinstance(config, dict):
        kept = {key: value for key, value in config.items() if key not in NEUTRAL_KEYS}
        return {str(key): without_neutral(value) for key, value in kept.items()}
    return config


def resolve_commit(model: str, revision: str | None, *, where: str) -> str:
    """Return the commit of a hub id at a branch, tag or commit; by default at its main branch."""
    return hub_config(model, revision, where=where).parent.name


def hub_config(model: str, revision: str | None, *, where: str) -> Path:
    """Return config.json of a hub id, in the folder of its commit, fetched if it is not cached."""
    try:
        return _hub_config(model, revision)
    # Network, permissions, a missing repository: errors of many types.
    except Exception as error:
        raise ModelError(
            f"{where}: the config of {model} cannot be loaded ({first_line(error)}); give a "
            "model folder, or check the hub id and the network"
        ) from error


@lru_cache(maxsize=64)
def _hub_config(model: str, revision: str | None) -> Path:
    # Cached, so that all parts of a run see one commit, even if the branch moves on.
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model, CONFIG, revision=revision))
