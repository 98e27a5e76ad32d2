"""Run a study from its file to its page: teachers, runs, tables, figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from collegium.storage.files import lock_folder
from collegium.study.options import StudyOptions, load_study
from collegium.study.page import study_tables, write_page
from collegium.study.sweep import run_jobs
from collegium.study.tables import StudyTable
from collegium.study.zoo import prepare_zoo


@dataclass(frozen=True)
class StudyResult:
    """Page and tables of a finished study."""

    page: Path
    tables: list[StudyTable]


def run_study(path: Path) -> StudyResult:
    """Train missing teachers, execute the unfinished runs, and write the page.

    Raises:
        CollegiumError: the study file, a recipe, its data or a model is unusable. Finished runs
            are kept.
    """
    study = load_study(path)
    folder = study_folder(study)
    # Two processes in one study folder would execute the same runs.
    with lock_folder(folder, "wait for it, or choose another output_dir"):
        for zoo in study.zoo:
            for seed in study.seeds:
                prepare_zoo(zoo, seed)
        rows = run_jobs(study, path.parent / study.base, folder)
        page = write_page(study, rows, folder, text=path.read_text(encoding="utf-8"))
    return StudyResult(page, study_tables(study, rows))


def study_folder(study: StudyOptions) -> Path:
    """Return the output folder of a study."""
    return Path("runs") / "study" / study.name if study.output_dir == Path() else study.output_dir
