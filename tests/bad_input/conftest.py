"""A tiny valid run to break in one place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner

from bad_input_bench import LOADERS, Bench
from collegium.cli import app
from tiny_run import recipe_text, write_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and texts. One `check` has run, so the imports of the libraries are not timed."""
    root = write_zoo(tmp_path_factory.mktemp("zoo"))
    (root / "run.yaml").write_text(recipe_text(root))
    assert CliRunner().invoke(app, ["check", str(root / "run.yaml")]).exit_code == 0
    (root / "run.yaml").unlink()
    return root


@pytest.fixture
def lab(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench that may load models."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(zoo, "zoo")
    Path("run.yaml").write_text(recipe_text(Path("zoo")).replace("zoo/run", "out"))
    return Bench(tmp_path)


@pytest.fixture
def bench(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench on which loading a model fails the test. On the meta device no tensor is read."""
    original = PreTrainedModel.from_pretrained

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was loaded")

    for loader in LOADERS:
        monkeypatch.setattr(loader, load)

    def from_pretrained(cls: type[PreTrainedModel], *args: object, **kwargs: object) -> object:
        if kwargs.get("device_map") != "meta":
            load()
        return original.__func__(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    return lab
