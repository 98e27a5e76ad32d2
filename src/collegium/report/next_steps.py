"""Two lines about what to do after a run, chosen by its outcome."""

from __future__ import annotations

import shlex

from collegium.report.headline import FAR, TIE, best, change, is_still_learning, validation_rise
from collegium.report.run_files import RunFiles

WEIGHTINGS = {"uniform weights": "uniform", "entropy weights": "entropy", "best single": ""}
"""Start of the title of a control -> the weighting to use instead, none for a single teacher."""


def next_steps(run: RunFiles) -> tuple[str, str]:
    """Return what would improve the student, and how to use it, each with a command."""
    recipe = shlex.quote(f"{run.folder}/recipe.yaml")
    student = best(run.rows("student"))
    if student is None:
        return (
            f"Finish the run: `collegium run {recipe}`.",
            f"What is missing: `collegium status {shlex.quote(run.folder)}`.",
        )
    if run.exports:
        name = run.exports[0].name
        return _improvement(run, recipe), (
            f"The student is a plain Hugging Face folder, `{run.folder}/student`, and its exports "
            f"are in `{run.folder}/exports`. Try one: `collegium generate "
            f'{shlex.quote(run.folder)} "It was" --model exports/{name}`.'
        )
    use = (
        f"The student is a plain Hugging Face folder, `{run.folder}/student`. Export it for other "
        f"tools: `collegium export {shlex.quote(run.folder)} --to onnx-int8,gguf-q8_0`."
    )
    return _improvement(run, recipe), use


def _improvement(run: RunFiles, recipe: str) -> str:
    student, control = best(run.rows("student")), best(run.rows("control"))
    assert student is not None
    reached = student.perplexity or 0.0
    to_control, to_start = change(reached, control), change(reached, best(run.rows("untouched")))
    to_teacher = change(reached, best(run.rows("teacher")))
    again = f"collegium run {recipe} output_dir={shlex.quote(run.folder + '-2')}"
    if to_start is not None and to_start > -TIE:
        return f"Training did not help. Try another learning rate: `{again} train.learning_rate=…`."
    if (rise := validation_rise(run)) is not None and rise > TIE and student.best_step is None:
        return (
            "It was better earlier in its training. Keep its best checkpoint: "
            f"`{again} train.load_best_model_at_end=true`."
        )
    if is_still_learning(run) and student.steps:
        return (
            "Its loss still falls. Train on from its last checkpoint: "
            f"`collegium run {recipe} train.max_steps={2 * student.steps}`."
        )
    if control is not None and to_control is not None and to_control > TIE:
        names = [name for title, name in WEIGHTINGS.items() if control.title.startswith(title)]
        if names and names[0]:
            return (
                f"Use the fusion of the better control: `{again} "
                f"'fusion={{weighting: {names[0]}}}'`."
            )
        if names:
            return "One teacher was enough: distill from the best one, and leave the others out."
        return (
            "The teachers did not help. Read their preflight above, and give the labels more "
            f"weight: `{again} objective.kd_ratio=0.5`."
        )
    if to_teacher is not None and to_teacher > FAR:
        return (
            "The best teacher is far ahead. Choose a larger student: "
            f"`collegium student sizes {recipe}` lists those that can be cut out of the teachers."
        )
    if control is None and run.rows("teacher"):
        return (
            "Train a control to compare with: "
            f"`collegium evaluate {recipe} 'evaluate.controls=[ce_only]'`."
        )
    return f"One seed is no proof. Repeat the run with another one: `{again} seed=1`."
