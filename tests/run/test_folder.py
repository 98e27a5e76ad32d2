"""Run folder: atomic files, recorded stages, one recipe and one process per folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from collegium.errors import CollegiumError, Interrupted, RecipeError
from collegium.run.folder import RunFolder
from collegium.storage.files import write_json
from collegium.storage.stages import digests_of, sealed
from refusals import refused

RECIPE = {"seed": 0, "train": {"learning_rate": 0.1, "max_steps": 5}, "evaluate": {"controls": []}}


def test_a_folder_records_its_recipe_and_environment(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(RECIPE, "seed: 0\n")
    folder.claim({**RECIPE, "evaluate": {"controls": ["ce_only"]}}, "seed: 0\n")
    assert json.loads((folder.path / "recipe.json").read_text())["seed"] == 0
    environment = json.loads((folder.path / "environment.json").read_text())
    assert "torch" in environment["packages"]


def test_a_changed_recipe_is_named_and_kept_with_what_it_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(tmp_path).claim(RECIPE, "seed: 0\n")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "weights").write_text("paid for")
    folder = RunFolder(tmp_path)
    folder.claim({**RECIPE, "seed": 1}, "seed: 1\n")
    assert "changed since the last run: seed: 0 -> 1" in capsys.readouterr().err
    assert not (tmp_path / "previous").exists()
    folder.retire("train", [tmp_path / "student", tmp_path / "missing"])
    folder.retire("evaluate", [tmp_path / "results.json"])
    kept = tmp_path / "previous" / "1"
    assert (kept / "student" / "weights").read_text() == "paid for"
    assert (kept / "recipe.yaml").read_text() == "seed: 0\n"
    assert not (tmp_path / "student").exists()
    assert "student kept in" in capsys.readouterr().err


def test_a_folder_may_be_moved_and_renamed(tmp_path: Path) -> None:
    recipe = {**RECIPE, "name": "a", "output_dir": "runs/a"}
    RunFolder(tmp_path).claim(recipe, "")
    RunFolder(tmp_path).claim({**recipe, "name": "b", "output_dir": "b"}, "")
    assert json.loads((tmp_path / "recipe.json").read_text())["name"] == "b"


def test_an_output_dir_at_or_below_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("")
    for path in (file, file / "deep" / "er"):
        with refused(CollegiumError, "output_dir: "):
            RunFolder(path).claim(RECIPE, "")


def test_a_read_only_folder_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.run.folder.os.access", lambda path, mode: path != tmp_path)
    with refused(CollegiumError, "output_dir: "):
        RunFolder(tmp_path / "deep" / "new").check_place()


def test_a_disk_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with refused(CollegiumError, "output_dir: "):
        RunFolder(tmp_path / "new").claim(RECIPE, "")


def test_a_folder_with_other_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("")
    RunFolder(tmp_path).check_place()
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text("")
    with refused(RecipeError, "output_dir: "):
        RunFolder(tmp_path).claim(RECIPE, "")
    assert not (tmp_path / "recipe.json").exists()
    write_json(tmp_path / "stages.json", {})
    RunFolder(tmp_path).claim(RECIPE, "")


@pytest.mark.parametrize("name", ["recipe.json", "stages.json"])
def test_state_that_is_not_an_object_is_refused(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(RECIPE, "")
    (tmp_path / name).write_text("[]")
    with refused(CollegiumError, f"TMP/{name}: "):
        folder.is_done("train", "") or folder.changes(RECIPE)


def test_a_stage_records_its_key_outcome_and_total_seconds(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(Interrupted), folder.stage("train", "k1"):
        raise Interrupted("stopped")
    state = folder.stages()["train"]
    assert (state.status, state.note) == ("interrupted", "stopped")
    assert not folder.is_done("train", "k1")
    slow = sealed("train", state.model_copy(update={"seconds": 100.0}))
    write_json(tmp_path / "stages.json", {"train": slow.to_json()})
    with folder.stage("train", "k1"):
        assert folder.stages()["train"].status == "running"
    assert folder.is_done("train", "k1")
    assert not folder.is_done("train", "k2")
    assert (folder.stages()["train"].seconds or 0) >= 100.0
    with folder.stage("train", "k2"):
        pass
    assert (folder.stages()["train"].seconds or 0) < 100.0


def test_a_failed_stage_is_recorded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="no"), folder.stage("train", "k"):
        raise ValueError("no")
    assert folder.stages()["train"].status == "failed"


def _done(folder: RunFolder) -> None:
    with folder.stage("evaluate", "k", lambda: digests_of(folder.path, [folder.path / "r.json"])):
        (folder.path / "r.json").write_text("[1]")


def test_a_damaged_file_undoes_its_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in ("[2]", "[1] ", ""):
        _done(RunFolder(tmp_path))
        assert RunFolder(tmp_path).is_done("evaluate", "k")
        (tmp_path / "r.json").write_text(data)
        folder = RunFolder(tmp_path)
        capsys.readouterr()
        assert not folder.is_done("evaluate", "k")
        assert not folder.is_done("evaluate", "k")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("evaluate: r.json has ")
        _done(folder)
        assert folder.is_done("evaluate", "k")
    (tmp_path / "r.json").unlink()
    assert not RunFolder(tmp_path).is_done("evaluate", "k")


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": 5.0},
        {"key": "other"},
        {"files": {}},
        {"files": None},
        {"sha256": None},
        {"status": "failed"},
        {"note": "x"},
    ],
    ids=str,
)
def test_a_changed_entry_undoes_its_stage(change: dict[str, object], tmp_path: Path) -> None:
    _done(RunFolder(tmp_path))
    file = tmp_path / "stages.json"
    entries = json.loads(file.read_text())
    entries["evaluate"].update(change)
    file.write_text(json.dumps({**entries, "train": entries["evaluate"]}))
    folder = RunFolder(tmp_path)
    assert not folder.is_done("evaluate", "k")
    assert not folder.is_done("train", "k")
    assert folder.stages() == {}


def test_a_stage_without_digests_is_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "stages.json", {"evaluate": {"status": "done", "key": "k"}})
    folder = RunFolder(tmp_path)
    assert folder.stages()["evaluate"].status == "done"
    assert not folder.is_done("evaluate", "k")
    assert "without the digests of its files" in capsys.readouterr().err


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_folder_deleted_during_a_stage_is_an_error(comes_back: bool, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.make()
    with refused(CollegiumError, "output_dir: "), folder.stage("train", "k"):
        shutil.rmtree(folder.path)
        if comes_back:
            write_json(folder.path / "results.json", [])
    assert not (folder.path / "stages.json").exists()
    shutil.rmtree(folder.path, ignore_errors=True)
    with refused(CollegiumError, "output_dir: "), folder.stage("evaluate", "k"):
        pass
    assert not folder.path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock on Windows")
def test_a_second_process_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from collegium.run.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock(): pass"
    )
    with RunFolder(tmp_path).lock():
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert "another process is using this folder" in done.stderr
    with RunFolder(tmp_path).lock(), refused(CollegiumError, "TMP: "):
        RunFolder(tmp_path).check_free()
    RunFolder(tmp_path).check_free()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
