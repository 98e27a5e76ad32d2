"""The identity of a model covers all that changes its outputs, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from collegium.errors import ModelError
from collegium.models import identity
from collegium.models.loading import load_model
from collegium.models.options import ModelOptions
from refusals import refused
from tiny import save_tiny

HERE = "teachers.a"
COMMIT, LATER = "a" * 40, "b" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "m")


def identity_of(folder: Path | str, **options: object) -> dict[str, Any]:
    return ModelOptions(model=str(folder), **options).identity()  # type: ignore[arg-type]


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config["rope_parameters"].update(rope_theta=50.0),
        lambda config: config.update(rms_norm_eps=0.5),
        lambda config: config.update(hidden_act="gelu"),
        lambda config: config.update(attention_bias=True),
    ],
    ids=["rope", "norm", "activation", "bias"],
)
def test_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    before = identity_of(folder)
    edit_config(folder, edit)
    assert identity_of(folder) != before


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"attention": "eager"}], ids=["dtype", "attention"]
)
def test_options(folder: Path, options: dict[str, str]) -> None:
    assert identity_of(folder, **options) != identity_of(folder)


def test_a_copy_that_was_saved_again(folder: Path, tmp_path: Path) -> None:
    before = identity_of(folder, device="cpu")
    model = load_model(ModelOptions(model=str(folder), device="cpu"), where=HERE)
    model.save_pretrained(tmp_path / "again", max_shard_size="70KB")
    edit_config(tmp_path / "again", lambda c: c.update(transformers_version="4.0", use_cache=False))
    edit_config(tmp_path / "again", lambda c: c.update(architectures=None, dtype="float16"))
    assert identity_of(tmp_path / "again", tokenizer=str(folder)) == before


def test_old_and_new_spelling_of_a_config(folder: Path) -> None:
    before = identity_of(folder)

    def old(config: dict[str, Any]) -> None:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")

    edit_config(folder, old)
    assert identity_of(folder) == before


def test_code_that_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "modeling.py").write_text("1")
    before = identity_of(folder)
    monkeypatch.setattr(ModelOptions, "runs_code", lambda self, where: True)
    ours = identity_of(folder)
    (folder / "modeling.py").write_text("2")
    assert len({str(value) for value in (before, ours, identity_of(folder))}) == 3


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub cache with two commits of one model. `main` is the first."""
    repository = tmp_path / "hub" / "models--org--model"
    for commit in (COMMIT, LATER):
        shutil.copytree(folder, repository / "snapshots" / commit)
    edit_config(repository / "snapshots" / LATER, lambda c: c.update(rms_norm_eps=0.5))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "new").write_text(LATER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    identity._hub_config.cache_clear()
    yield repository
    identity._hub_config.cache_clear()


def test_revision_of_a_hub_id_is_a_commit(hub: Path) -> None:
    main = ModelOptions(model="org/model", device="cpu")
    assert main.commit(HERE) == COMMIT
    assert main.identity() == identity_of("org/model", revision=COMMIT)
    assert main.identity() != identity_of("org/model", revision="new")
    assert load_model(main, where=HERE).config.rms_norm_eps == 1e-6
    (hub / "refs" / "main").write_text(LATER)
    # One commit per process, even if the branch moves on between a check and the loading.
    assert load_model(main, where=HERE).config.rms_norm_eps == 1e-6
    identity._hub_config.cache_clear()
    assert main.identity() == identity_of("org/model", revision="new")
    assert load_model(main, where=HERE).config.rms_norm_eps == 0.5


def test_an_unknown_revision(hub: Path) -> None:
    # The message quotes an error of the hub library, which differs between versions.
    with refused(ModelError, HERE, volatile=r"(?<=\().*(?=\))"):
        ModelOptions(model="org/model", revision="none").load_config(HERE)


def test_weights_of_any_type_have_a_digest(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from collegium.models.weights import weights_digest

    (tmp_path / "config.json").write_text("{}")
    digests = set()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensors = {"a": torch.ones(3, 2, dtype=dtype), "b": torch.ones((), dtype=dtype)}
        save_file({**tensors, "c": torch.ones(0, 2, dtype=dtype)}, tmp_path / "model.safetensors")
        digests.add(weights_digest(str(tmp_path)))
    assert len(digests) == 4
