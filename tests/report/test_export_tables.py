"""Exports in the report: a line each, with the state that a recovery replaced or left."""

from __future__ import annotations

from pathlib import Path

import pytest

from collegium.report.export_tables import export_notes, export_table
from collegium.report.next_steps import next_steps
from collegium.report.page import render_run
from collegium.report.run_files import RunFiles, read_run
from collegium.storage.records import ExportInfo, FileDigest, Recovery, Stage, Verification
from collegium.storage.stages import sealed
from export_cases import EQUAL
from run_fixture import write_json, write_run


def verification(bits: float) -> Verification:
    figures = {
        "num_tokens": 8000,
        "max_logit_difference": 0.123,
        "kl": 0.0456,
        "top1_agreement": 0.987,
        "bits_per_byte": EQUAL.bits_per_byte + bits,
        "differing_texts": 0.25,
    }
    return EQUAL.model_copy(update=figures)


def export(name: str, bits: float, *, before: float | None = None, is_kept: bool = True):
    recovery = None
    if before is not None:
        states = (before, bits) if is_kept else (bits, before)
        recovery = Recovery(
            steps=60,
            learning_rate=4e-4,
            bits_per_byte=0.1,
            before=verification(states[0]),
            after=verification(states[1]),
            is_kept=is_kept,
        )
    return ExportInfo(
        name=name,
        student="a" * 64,
        source={"loader": "transformers"},
        versions={},
        bytes=1_234_567,
        verification=verification(bits),
        recovery=recovery,
    )


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_recovery_has_a_line_before_or_after(is_kept: bool) -> None:
    infos = (export("hf", 0.0), export("torchao-int4", 0.0512, before=0.1534, is_kept=is_kept))
    run = RunFiles("run", exports=infos)
    rows = [[line.name, *(c.text for c in cells)] for line, cells in export_table(run).rows()]
    shared = ["0.046", "98.7 %", "0.12", "25.0 %"]
    kept = ["torchao-int4", "1.23 M", "+0.0512", *shared]
    other = f"torchao-int4, {'before' if is_kept else 'after'} 60 steps of recovery"
    replaced = [other, "–", "+0.1534", *shared]
    order = [replaced, kept] if is_kept else [kept, replaced]
    assert rows == [["hf", "1.23 M", "0.0000", *shared], *order]
    held_out, note = export_notes(run)
    assert held_out.startswith("On 8,000 tokens")
    assert note.startswith("torchao-int4 costs more than 0.1 bits per byte")
    assert ("no gain" in note) is not is_kept


def test_the_page_shows_the_exports_of_the_current_student(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name, student in (("hf", "a" * 64), ("obsolete", "b" * 64)):
        (folder / "exports" / name).mkdir(parents=True)
        info = export(name, 0.0).model_copy(update={"student": student})
        write_json(folder / "exports" / name / "export.json", info.to_json())
    assert read_run(folder).exports == ()  # the stage of the training has recorded no student
    manifest = {"student/MANIFEST.json": FileDigest(bytes=1, sha256="a" * 64)}
    stage = sealed("train", Stage(status="done", files=manifest))
    write_json(folder / "stages.json", {"train": stage.to_json()})
    run = read_run(folder)
    assert [info.name for info in run.exports] == ["hf"]
    assert "--model exports/hf" in next_steps(run)[1]
    page = render_run(run)
    assert "Exports against the student" in page
    assert "obsolete" not in page
