"""Folders quantized by torchao, reloaded by plain transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tiny
from collegium.export import foreign
from collegium.export.formats import FORMATS
from collegium.train.checkpoint import replace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "share"), [("torchao-int8", 0.05), ("torchao-int4", 0.5)])
def test_a_folder_loads_with_quantized_layers(name: str, share: float, tmp_path: Path) -> None:
    replace(tiny.save_tiny(tmp_path / "new"), tmp_path / "student")
    (tmp_path / "export").mkdir()
    FORMATS[name].write(tmp_path / "student", tmp_path / "export")
    ids = np.random.default_rng(0).integers(0, 400, (2, 20))
    expected = foreign.TransformersModel(str(tmp_path / "student")).logits(ids)[0]
    model = foreign.load(FORMATS[name].source(tmp_path / "export"), 1)
    assert isinstance(model, foreign.TransformersModel)
    assert 0 < np.abs(model.logits(ids)[0] - expected).max() < share * expected.std() * 4
    weight = model._model.model.layers[0].mlp.up_proj.weight
    assert "Int" in type(weight).__name__
    sizes = [
        (tmp_path / part / "model.safetensors").stat().st_size for part in ("student", "export")
    ]
    assert sizes[1] < sizes[0]
