"""The corpus as a stage of a run: shared, checked before and after it is encoded, shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium.cli import app
from collegium.config.recipe import Recipe, load_recipe
from collegium.data import corpus_folder
from collegium.errors import DataError
from collegium.run import pipeline
from collegium.run.context import RunContext
from collegium.run.status import run_status
from refusals import refused
from tiny_run import recipe_text, write_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_zoo(tmp_path_factory.mktemp("zoo"))
    (root / "tiny.yaml").write_text(recipe_text(root), encoding="utf-8")
    return root


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every corpus is too large for the memory of a check."""
    monkeypatch.setattr(corpus_folder, "SMALL_BYTES", 0)


def recipe(zoo: Path, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(zoo / "tiny.yaml", [f"output_dir={folder}", *overrides])


def files(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_the_command_encodes_once_and_runs_share_the_corpus(zoo: Path, tmp_path: Path) -> None:
    shared = f"data.corpus={tmp_path / 'shared'}"
    command = ["corpus", str(zoo / "tiny.yaml"), f"output_dir={tmp_path / 'one'}", shared]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "shared").iterdir()
    assert f"MB in {folder}" in result.stdout.replace("\n", "")
    before = files(tmp_path / "shared")
    other = recipe(zoo, tmp_path / "two", shared, "data.split_seed=3", "data.max_train_tokens=500")
    assert "0.1 MB in" in pipeline.corpus(other)
    assert files(tmp_path / "shared") == before
    assert not (tmp_path / "two" / "corpus").exists()


def test_a_large_corpus_is_sampled_before_and_checked_after(
    zoo: Path, tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "data.max_train_tokens=100"
    options = recipe(zoo, tmp_path / "run", limit)
    text = "\n".join([*(report := pipeline.check(options)).lines, *report.warnings])
    assert "corpus: roughly" in text
    assert "data.max_train_tokens: 100 of roughly" in text
    assert "data.train: " not in text
    assert not (tmp_path / "run").exists()
    (state,) = run_status(options)
    assert (state.name, state.state, state.num_bytes) == ("corpus", "missing", 0)
    pipeline.corpus(options)
    assert "data.train: " in "\n".join(pipeline.check(options).lines)
    states = {one.name: one for one in run_status(options)}
    assert states["corpus"].state == "done"
    assert states["corpus"].num_bytes > 10_000
    assert "preflight" in states
    monkeypatch.undo()
    small = RunContext(recipe(zoo, tmp_path / "small", limit)).datasets
    for part, dataset in RunContext(options).datasets.items():
        assert dataset.fingerprint == small[part].fingerprint


def test_the_vocabulary_in_use_waits_for_a_large_corpus(
    zoo: Path, tmp_path: Path, large: None
) -> None:
    options = recipe(zoo, tmp_path / "run", "student.vocabulary=used")
    pipeline.check(options)
    pipeline.corpus(options)
    assert any("tokens kept" in line for line in pipeline.check(options).lines)


def test_text_that_a_sample_misses_is_refused_once_it_is_encoded(
    zoo: Path, tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.run.corpora.SAMPLE_DOCUMENTS", 2)
    rows = [{"text": f"Number {i}."} for i in range(40)] + [{"text": None}, {"text": 3}]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = recipe(zoo, tmp_path / "run", f"data.train=[{{path: {source}}}]")
    pipeline.check(options)
    with refused(DataError, "data.train[0]: TMP/texts.jsonl:42"):
        pipeline.corpus(options)
    stages = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert stages["corpus"]["status"] == "failed"


def test_a_changed_source_is_named(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts.jsonl"
    for end in ".!":
        rows = [{"text": f"Number {i}{end}"} for i in range(80)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = recipe(zoo, tmp_path / "run", f"data.train=[{{path: {source}}}]")
        pipeline.corpus(options)
    assert f"corpus: {source} changed since" in capsys.readouterr().err
    assert len([*(tmp_path / "run" / "corpus").iterdir()]) == 2


SMALL_SHARDS = """
import sys, time
from collegium.data import corpus_folder, pool, shards

corpus_folder.SMALL_BYTES, shards.SHARD_DOCUMENTS = 0, 4
write = shards.write_shard

def write_slowly(*arguments):
    time.sleep(0.2)
    return write(*arguments)

pool.write_shard = write_slowly
from collegium.cli import main
main()
"""


def start_encoding(zoo: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start `collegium corpus` with 30 shards, the first of which take 0.2 s each."""
    command = [sys.executable, "-c", SMALL_SHARDS, "corpus", str(zoo / "tiny.yaml")]
    return subprocess.Popen([*command, f"output_dir={folder}"], start_new_session=True)


@pytest.mark.slow
def test_a_killed_build_keeps_its_finished_shards(zoo: Path, tmp_path: Path) -> None:
    """SIGKILL of all its processes, twice: with and without workers."""
    assert start_encoding(zoo, tmp_path / "whole").wait(120) == 0
    finished = dict[str, int]()
    for number in (2, 12):
        process = start_encoding(zoo, tmp_path / "cut")
        for _ in range(1200):
            if len(list((tmp_path / "cut").glob("corpus/*/shard-*.json"))) >= number:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        now = files(tmp_path / "cut" / "corpus")
        assert finished.items() <= now.items()
        ended = [name for name in now if name.endswith(".json") and "shard" in name]
        assert number <= len(ended) < 30
        names = {name.removesuffix(".json") for name in ended}
        finished = {n: at for n, at in now.items() if any(n.startswith(one) for one in names)}
    assert start_encoding(zoo, tmp_path / "cut").wait(120) == 0
    whole, cut = (tmp_path / name / "corpus" for name in ("whole", "cut"))
    assert finished.items() <= files(cut).items()
    # Nothing is left over, and every byte is that of a build at one go.
    shards = {file.relative_to(whole) for file in whole.rglob("*shard-*")}
    assert {file.relative_to(cut) for file in cut.rglob("*shard-*")} == shards
    assert all((whole / file).read_bytes() == (cut / file).read_bytes() for file in shards)
