"""Loading and calling Hugging Face causal language models, which no other package touches.

`folder` validates files without reading weights, `loading` builds models, `forward` runs them.
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
