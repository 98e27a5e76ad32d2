import json
from pathlib import Path

import pytest

import run_fixture
from collegium.errors import CollegiumError
from collegium.report.run_files import read_run
from refusals import refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return run_fixture.write_run(tmp_path / "run", steps=3)


def test_reads_what_was_written(folder: Path) -> None:
    run = read_run(folder)
    assert run.name == "run"
    assert run.teachers() == run_fixture.TEACHERS
    assert set(run.controls) == set(run_fixture.CONTROLS)
    assert [row.kind for row in run.rows("student", "control")] == ["student", "control", "control"]
    assert run.log is not None
    assert run.log[0].teacher_weights.keys() == set(run_fixture.TEACHERS)


def test_an_empty_folder_is_a_run_without_files(tmp_path: Path) -> None:
    run = read_run(tmp_path)
    assert (run.recipe, run.stages, run.preflight, run.results, run.log) == (None,) * 5
    assert run.controls == {}


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with refused(CollegiumError, "TMP/nowhere"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["environment.json", "stages.json", "preflight.json", "results.json"]
)
@pytest.mark.parametrize("text", ["", "{", "[1, 2", "nonsense", "[" * 100_000, '"text"', "3"])
def test_broken_json_names_its_file(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    # Not `refused`: the parser's message differs between Python versions.
    with pytest.raises(CollegiumError) as caught:
        read_run(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")


def test_a_wrong_value_names_its_key(folder: Path) -> None:
    rows = json.loads((folder / "results.json").read_text())
    rows[2]["nll"] = "4.5"
    run_fixture.write_json(folder / "results.json", rows)
    with refused(CollegiumError, "TMP/run/results.json: 2.nll"):
        read_run(folder)


@pytest.mark.parametrize("name", ["recipe.yaml", "results.json", "train/log.jsonl"])
def test_bytes_that_are_not_text_name_their_file(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"\xff\xfe\x00\n")
    with refused(CollegiumError, f"TMP/run/{name}"):
        read_run(folder)


def test_broken_log_line_is_named_by_its_number(folder: Path) -> None:
    path = folder / "train" / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with refused(CollegiumError, "TMP/run/train/log.jsonl:2", volatile=r"\(.*\)"):
        read_run(folder)


def test_log_line_still_being_written_is_ignored(folder: Path) -> None:
    path = folder / "train" / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert [line.step for line in read_run(folder).log or ()] == [1]


def test_resumed_run_keeps_the_later_line_of_each_step(folder: Path) -> None:
    lines = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 8.0},
        {"step": 2, "loss": 7.0},
        {"step": 3},
    ]
    run_fixture.write_log(folder / "train", lines)
    log = read_run(folder).log or ()
    assert [(line.step, line.loss) for line in log] == [(1, 9.0), (2, 7.0), (3, None)]


def test_nan_is_a_gap(folder: Path) -> None:
    path = folder / "train" / "log.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "terms": {"kd": Infinity}}\n')
    (line,) = read_run(folder).log or ()
    assert line.loss is None
    assert line.terms == {"kd": None}
