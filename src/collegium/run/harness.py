"""The student of a run under lm-evaluation-harness, with task files of this machine."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from collegium.errors import CollegiumError, RecipeError, nearest
from collegium.models.loading import choose_device
from collegium.run.folder import RunFolder
from collegium.run.students import require_student
from collegium.storage.files import fingerprint, sha256_of, write_json
from collegium.storage.records import HarnessResults, MetricScore
from collegium.storage.stages import digests_of
from collegium.train.checkpoint import MANIFEST

STAGE = "harness"
NUM_BOOTSTRAP = 1000
"""Bootstrap samples of metrics without a formula for the standard error."""


def run_harness(
    run_folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> HarnessResults:
    """Evaluate the student of a run with lm-eval, offline, and write `harness.json` there.

    Args:
        run_folder: a run whose student is trained.
        tasks: names of tasks, or a folder of task files, which stands for all tasks in it.
        include: a further folder of task files for the names.
        limit: examples per task. None for all.
        batch_size: examples per forward pass.

    Raises:
        CollegiumError: there is no student, or lm-eval is missing or fails.
        RecipeError: a task does not exist.
    """
    require_student(run_folder)
    manifest = run_folder / "student" / MANIFEST
    if find_spec("lm_eval") is None:
        raise CollegiumError(
            "harness: needs the package lm-eval; must be installed; run "
            "`pip install 'collegium[harness]'`"
        )
    # Read when the libraries are imported: a task of the hub must not be downloaded silently.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    # lm-eval logs advice, and its libraries warn of their own deprecations.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager, names = _tasks(tasks, include)
        student = sha256_of(manifest)
        folder = RunFolder(run_folder)
        path = run_folder / "harness.json"
        key = fingerprint([student, names, limit])
        with folder.lock(), folder.stage(STAGE, key, lambda: digests_of(run_folder, [path])):
            output = _evaluate(manifest.parent, manager, names, limit, batch_size)
            results = _results(output, student, limit)
            write_json(path, results.to_json())
    return results


def _tasks(tasks: Sequence[str], include: Path | None) -> tuple[Any, list[str]]:
    """Return the task manager of lm-eval, and the names of the tasks."""
    from lm_eval.tasks import TaskManager

    folders = [task for task in tasks if Path(task).is_dir()]
    paths: list[str | Path] = [*folders, *([] if include is None else [str(include)])]
    if include is not None and not include.is_dir():
        raise RecipeError(f"--include: got {include}; must be a folder of task files")
    manager = TaskManager(include_path=paths or None, include_defaults=len(folders) < len(tasks))
    names = [task for task in tasks if task not in folders]
    for folder in folders:
        in_folder = TaskManager(include_path=folder, include_defaults=False).all_tasks
        if not in_folder:
            raise RecipeError(
                f"--tasks: got {folder}; must be a folder with the YAML file of a task, or names"
            )
        names += [name for name in in_folder if name not in names]
    for name in names:
        if name not in manager.all_tasks:
            raise RecipeError(f"--tasks: unknown task `{name}`{nearest(name, manager.all_tasks)}")
    return manager, names


def _evaluate(
    student: Path, manager: Any, names: Sequence[str], limit: int | None, batch_size: int
) -> Mapping[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    # A task file may name data, metrics and code that fail in any way.
    try:
        output = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(student)},
            device=str(choose_device("auto")),
            batch_size=batch_size,
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=NUM_BOOTSTRAP,
            log_samples=False,
        )
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise CollegiumError(
            f"harness: lm-eval failed ({type(error).__name__}: {reason}); must find data and "
            "metrics of every task on this machine; check its task file"
        ) from error
    assert output is not None  # in the first process
    return output


def _results(output: Mapping[str, Any], student: str, limit: int | None) -> HarnessResults:
    tasks = {}
    for task, values in output["results"].items():
        size = output["n-samples"].get(task, {}).get("effective", 0)
        tasks[task] = {
            key.removesuffix(",none"): MetricScore(
                value=float(value), stderr=_number(values, key), num_samples=size
            )
            for key, value in values.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }
    versions = {task: str(number) for task, number in output.get("versions", {}).items()}
    return HarnessResults(
        version=version("lm-eval"), student=student, limit=limit, tasks=tasks,
        task_versions=versions,
    )  # fmt: skip


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """Return the standard error of a metric, None where lm-eval has none."""
    metric, _, name = key.partition(",")
    stderr = values.get(f"{metric}_stderr,{name}")
    return float(stderr) if isinstance(stderr, int | float) else None
