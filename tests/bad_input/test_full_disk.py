"""A run on a disk that fills up in every stage, and grows until everything fits."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium.cli import app
from collegium.storage.records import ResultRow, open_record
from tiny_run import recipe_text, write_zoo

GROWTH = 1.1
MAX_SIZES = 100
CACHE_AND_EXPORT = "cache: {enabled: true, kind: per_teacher}\nexport: {to: [hf]}\n"


def resize(disk: Path, kib: int, *, first: bool = False) -> bool:
    """Mount or resize a file system in memory. False without the right to."""
    kind = (
        ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs"] if first else ["-o", f"remount,size={kib}k"]
    )
    done = subprocess.run(["mount", *kind, str(disk)], check=False, capture_output=True)
    return done.returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    try:
        is_mounted = resize(path, 16, first=True)
    except OSError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("mounting a file system needs root on Linux")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def scores(run: Path) -> dict[str, float]:
    rows = open_record(run / "results.json", list[ResultRow])
    return {row.name: row.nll for row in rows}


@pytest.mark.slow
def test_a_run_goes_on_when_the_disk_grows(disk: Path, tmp_path: Path) -> None:
    write_zoo(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(tmp_path) + CACHE_AND_EXPORT)
    places, kib = set(), 16
    for _ in range(MAX_SIZES):
        result = CliRunner().invoke(app, ["run", str(recipe), f"output_dir={disk / 'run'}"])
        if result.exit_code == 0:
            break
        # One sentence that says so, after the lines of finished parts.
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.exit_code, len(errors)) == (2, 1), result.stderr
        assert "No space left on device" in errors[0] or "disk is full" in errors[0], errors
        assert "space" in errors[0].rpartition(";")[2], errors
        places |= {
            part for part in ("corpus", "cache", "checkpoint", "student") if part in errors[0]
        }
        kib = max(kib + 8, int(kib * GROWTH))
        assert resize(disk, kib)
    else:
        pytest.fail(f"the run needs more than {kib} KiB")
    assert {"corpus", "cache", "checkpoint"} <= places
    whole = CliRunner().invoke(app, ["run", str(recipe)])
    assert whole.exit_code == 0, whole.stderr
    assert scores(disk / "run") == scores(tmp_path / "run")
