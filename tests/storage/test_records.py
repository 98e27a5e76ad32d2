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
from collegium.storage.records import LogStep, Record, ResultRow, Stage, read_log, read_record
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
def test_unknown_keys_are_ignored(form: type[Record], tmp_path: Path) -> None:
    required = {k for k, field in form.model_fields.items() if field.is_required()}
    samples = {"step": 1, "name": "a", "kind": "teacher", "levels": {}, "seed": 0, "key": ""}
    samples |= {"folder": "", "values": {}, "rows": [], "steps": 1}
    samples |= {"train_tokens": 1, "train_seconds": 1.0}
    content = {key: samples[key] for key in required}
    write_json(tmp_path / "a.json", {**content, "of a newer version": [1]})
    assert read_record(tmp_path / "a.json", form) == form(**content)


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
