"""A finished run folder with one damaged file: it is named and repeated, or was never read."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from collegium.config.recipe import load_recipe
from collegium.errors import CollegiumError
from collegium.run import pipeline
from tiny_run import recipe_text, write_zoo

NUMBER = 500


CACHES = {
    "live": "",
    "fused": "cache: {enabled: true}\n",
    "per_teacher": "objective: {kd_ratio: 0.5, features: {weight: 0.1}}\n"
    "cache: {enabled: true, kind: per_teacher, features: {rank: 4}}\n",
}
"""Lines of the recipe, by what the student learns from."""


@pytest.fixture(scope="module")
def recipe_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Recipes whose runs are finished, in `run`, with every kind of file."""
    files = []
    for name, lines in CACHES.items():
        root = write_zoo(tmp_path_factory.mktemp(name))
        text = recipe_text(root)
        if "objective" in lines:
            text = text.replace("objective: {kd_ratio: 0.5}\n", "")
        files.append(root / "recipe.yaml")
        files[-1].write_text(text + lines)
        pipeline.run(load_recipe(files[-1]))
    return files


def flip(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes() or b" ")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random, other: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) or 1)])


def empty(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path, rng: random.Random, other: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def delete(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def duplicate(path: Path, rng: random.Random, other: Path) -> None:
    shutil.copyfile(path, other)


DAMAGES: tuple[Callable[[Path, random.Random, Path], None], ...] = (
    flip, truncate, empty, swap, delete, duplicate
)  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file that a user reads, without times and what the machine is called."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith((".", "recipe.", "environment.", "report.", "stages.")):
            continue  # written by every run
        data = path.read_bytes()
        if name.endswith(("preflight.json", "results.json", "log.jsonl")):
            with contextlib.suppress(ValueError):  # damaged, so compared as it is
                lines = map(json.loads, data.splitlines() if name.endswith("l") else [data])
                data = json.dumps([_timeless(line) for line in lines]).encode()
        if name.endswith(("state.json", "MANIFEST.json")) and "checkpoint-" in name:
            continue  # digests of the above, and a clock
        if name.endswith("/verified.json"):
            continue  # modification times
        files[name] = data
    return files


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        times = ("seconds", "train_seconds", "tokens_per_s")
        return {key: _timeless(item) for key, item in value.items() if key not in times}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def damaged_pair(folder: Path, rng: random.Random) -> tuple[Path, Path]:
    """Two files of a run folder with different content, equally often of each kind."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    heavy = [path for path in files if "checkpoint-" in str(path)]
    light = [path for path in files if path not in heavy]
    while True:
        first = rng.choice(light if rng.random() < 0.8 else heavy)
        other = rng.choice([path for path in files if path.suffix == first.suffix])
        if first.read_bytes() != other.read_bytes() and not other.name.startswith(".lock"):
            return first, other


@pytest.mark.parametrize("number", range(NUMBER))
def test_no_damage_is_silent(
    number: int,
    recipe_files: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(number)
    recipe_file = rng.choice(recipe_files)
    finished, folder = recipe_file.parent / "run", tmp_path / ("run" if number % 2 else "moved")
    shutil.copytree(finished, folder)
    expected = content(folder)
    first, other = damaged_pair(folder, rng)
    damage = DAMAGES[number % len(DAMAGES)]
    damage(first, rng, other)
    names = {path.relative_to(folder).as_posix() for path in (first, other)}
    before = content(folder)
    capsys.readouterr()
    recipe = load_recipe(recipe_file, [f"output_dir={folder}"])
    error = ""
    try:
        pipeline.run(recipe)
    except CollegiumError as refusal:
        error = str(refusal)
    shown = error + capsys.readouterr().err + caplog.text
    if error or before != expected:
        # The file, or its folder, which is refused if it seems to be of another run.
        places = {part for name in names for part in name.rpartition("/")[::2] if part}
        assert any(place in shown for place in places), (damage, names, shown)
    kept = expected if error else content(folder)
    lost = {name for name in expected if kept.get(name) != expected[name]}
    # A damaged checkpoint of a finished training is set aside.
    assert all("checkpoint-" in name for name in lost), (damage, names, lost)


def test_a_moved_folder_counts_as_done(
    recipe_files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file = recipe_files[1]
    shutil.copytree(recipe_file.parent / "run", tmp_path / "moved")
    before = (tmp_path / "moved" / "stages.json").read_bytes()
    capsys.readouterr()
    pipeline.run(load_recipe(recipe_file, [f"output_dir={tmp_path / 'moved'}", "name=other"]))
    assert (tmp_path / "moved" / "stages.json").read_bytes() == before
    assert capsys.readouterr().err == ""
