"""Load a causal language model and its tokenizer, and call it: the only rooms that know Hugging Face models.

`folder` reads files and never a weight, `loading` makes models, `forward` calls them.
"""

from collegium.models.folder import ModelOptions, check_model_folder, weights_digest
from collegium.models.forward import (
    forward_rows,
    model_head,
    num_layers,
    probe,
    tap_names,
    tap_width,
)
from collegium.models.loading import (
    LoadedModel,
    build_model,
    check_weights,
    count_parameters,
    load_model,
    load_tokenizer,
    scan_folder,
    scan_weights,
    vocab_size_of,
)

__all__ = [
    "LoadedModel",
    "ModelOptions",
    "build_model",
    "check_model_folder",
    "check_weights",
    "count_parameters",
    "forward_rows",
    "load_model",
    "load_tokenizer",
    "model_head",
    "num_layers",
    "probe",
    "scan_folder",
    "scan_weights",
    "tap_names",
    "tap_width",
    "vocab_size_of",
    "weights_digest",
]
