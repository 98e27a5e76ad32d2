"""Records: written and read again they are the same, and broken files are refused."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collegium.errors import CollegiumError
from collegium.storage import records
from collegium.storage.files import write_json
from collegium.storage.records import (
    FileDigest,
    FolderManifest,
    LogStep,
    ManifestEntry,
    Record,
    ResultRow,
    Stage,
    read_log,
    read_record,
)
from refusals import refused

RECORDS = sorted(
    (
        value
        for _, value in inspect.getmembers(records, inspect.isclass)
        if issubclass(value, Record) and value is not Record
    ),
    key=lambda record: record.__name__,
)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    str: NAMES,
    int: st.integers(-(2**53), 2**53),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    type(None): st.none(),
    Any: st.none() | st.integers(0, 9) | NAMES,
}

SIZES, HASHES = st.integers(0, 2**53), st.from_regex("[0-9a-f]{64}", fullmatch=True)
FILES = st.from_regex("[a-z]{1,4}(/[a-z.]{0,2}[a-z])?", fullmatch=True)
DIGESTS = st.builds(FileDigest, bytes=SIZES, sha256=HASHES)
FORMATS: dict[tuple[type[Record], str], st.SearchStrategy[Any]] = {
    (FileDigest, "bytes"): SIZES,
    (FileDigest, "sha256"): HASHES,
    (ManifestEntry, "bytes"): SIZES,
    (ManifestEntry, "sha256"): HASHES,
    (ManifestEntry, "name"): FILES,
    (Stage, "files"): st.none() | st.dictionaries(FILES, DIGESTS, max_size=3),
}
"""Fields whose type does not say all."""


def values(form: Any) -> st.SearchStrategy[Any]:
    """Generate values of an annotation."""
    if form in SCALARS:
        return SCALARS[form]
    if inspect.isclass(form) and issubclass(form, Record):
        return instances(form)
    arguments = get_args(form)
    if get_origin(form) is Sequence:
        return st.lists(values(arguments[0]), max_size=3)
    if get_origin(form) in (Mapping, dict):
        return st.dictionaries(NAMES, values(arguments[1]), max_size=3)
    if all(isinstance(argument, str) for argument in arguments):
        return st.sampled_from(arguments)
    return st.one_of(*(values(argument) for argument in arguments if not callable_(argument)))


def callable_(argument: Any) -> bool:
    # The validator in `Annotated[float | None, BeforeValidator(...)]`.
    return type(argument).__name__ == "BeforeValidator"


def instances(form: type[Record]) -> st.SearchStrategy[Record]:
    """Generate records with any of their optional fields."""
    fields = {name: values(field.annotation) for name, field in form.model_fields.items()}
    fields |= {name: FORMATS[form, name] for name in fields if (form, name) in FORMATS}
    required = {k: v for k, v in fields.items() if form.model_fields[k].is_required()}
    optional = {k: v for k, v in fields.items() if k not in required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda parts: form(**parts))


@pytest.mark.parametrize("form", RECORDS, ids=lambda form: form.__name__)
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_writing_and_reading_gives_the_record_back(
    form: type[Record], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    record = data.draw(instances(form))
    path = tmp_path_factory.getbasetemp() / f"{form.__name__}.json"
    write_json(path, record.to_json())
    again = read_record(path, form)
    assert again == record
    assert again is not None
    assert again.to_json() == record.to_json()


@pytest.mark.parametrize("form", RECORDS, ids=lambda form: form.__name__)
@given(data=st.data())
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
def test_unknown_keys_are_ignored(
    form: type[Record], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    record = data.draw(instances(form))
    path = tmp_path_factory.getbasetemp() / f"{form.__name__}.json"
    write_json(path, {**record.to_json(), "of a newer version": [1]})
    assert read_record(path, form) == record


@pytest.mark.parametrize(
    ("form", "content", "path"),
    [
        (Stage, {"status": 3}, "status"),
        (Stage, {"seconds": "4.5"}, "seconds"),
        (ResultRow, {"name": "a", "kind": "guest"}, "kind"),
        (ResultRow, {"name": "a", "kind": "fused", "steps": 1.5}, "steps"),
        (LogStep, {"loss": 1.0}, "step"),
        (LogStep, {"step": 1, "terms": {"kd": True}}, "terms.kd"),
        (LogStep, {"step": 1, "conflict": {"domains": {"x": {"applied": "y"}}}},
         "conflict.domains.x.applied"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_wrong_type_is_refused(
    form: type[Record], content: dict[str, object], path: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "a.json", content)
    with refused(CollegiumError, f"TMP/a.json: {path}: got "):
        read_record(tmp_path / "a.json", form)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a", "a/../../b", "a//b", ".", "a\\b", "a\0", ""]
)
def test_a_name_in_a_manifest_is_never_a_path(name: str, tmp_path: Path) -> None:
    digest = {"bytes": 1, "sha256": "0" * 64}
    for form, content in (
        (FolderManifest, {"format": 1, "files": [{"name": name, **digest}]}),
        (Stage, {"status": "done", "files": {name: digest}}),
    ):
        write_json(tmp_path / "a.json", content)
        with pytest.raises(CollegiumError, match="must be a name inside the folder"):
            read_record(tmp_path / "a.json", form)


@pytest.mark.parametrize("name", ["MAX_BYTES", "MAX_LOG_BYTES"])
def test_a_file_that_is_too_large_is_not_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, name, 10)
    (tmp_path / "a.json").write_text('{"step": 123456}\n')
    with refused(CollegiumError, "TMP/a.json: "):
        read_record(tmp_path / "a.json", LogStep) if name == "MAX_BYTES" else read_log(
            tmp_path / "a.json"
        )


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path / "a.json", Stage) is None
    assert read_log(tmp_path / "log.jsonl") is None


def test_undefined_numbers_are_null() -> None:
    step = LogStep(step=1, loss=math.nan, terms={"kd": math.inf, "ce": 1.0})
    assert json.loads(json.dumps(step.to_json(), allow_nan=False)) == {
        "step": 1, "loss": None, "terms": {"kd": None, "ce": 1.0},
    }  # fmt: skip


def test_records_load_without_torch() -> None:
    program = "import sys, collegium.storage.records; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "False\n"
