"""The student as a draft model for each teacher, measured by assisted generation.

A command of its own, not a part of the evaluation: it times the machine, and generates every text
twice with each teacher. Writes draft.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from collegium.console import OnProgress, progress
from collegium.errors import CollegiumError, ModelError
from collegium.evaluate.generation import Prompt
from collegium.evaluate.intervals import document_interval
from collegium.evaluate.options import GenerationOptions
from collegium.evaluate.tasks import continuations
from collegium.models.assisted import DraftedModel, DraftedText
from collegium.models.saving import stop_ids
from collegium.run.context import RunContext
from collegium.run.inference import STUDENT, RunModels
from collegium.storage.files import fingerprint, sha256_of, write_json
from collegium.storage.records import DraftResults, DraftRow
from collegium.storage.stages import digests_of
from collegium.teachers.local import LocalTeacher
from collegium.train.checkpoint import MANIFEST

STAGE = "draft"
REPEATS = 3
"""Timed runs of a prompt with and without drafts, in turns."""


def run_draft(
    run_folder: Path,
    *,
    teachers: Sequence[str] = (),
    max_prompts: int = 16,
    max_new_tokens: int = 64,
    num_drafted: int = 4,
) -> DraftResults:
    """Let the student draft for each teacher on held-out prompts, and write `draft.json`.

    Args:
        run_folder: a run whose student is trained, with its data.
        teachers: names of the targets. Empty for all.
        max_prompts: starts of documents of the validation split.
        max_new_tokens: limit of each text.
        num_drafted: tokens that the student drafts per pass of the teacher.

    Raises:
        CollegiumError: the run has no student, or no teacher of that name.
        DataError: no held-out document is long enough.
    """
    run = RunModels(run_folder)
    names = [_teacher(run, name) for name in teachers] or list(run.recipe.teachers)
    if not names:
        raise CollegiumError(f"{run_folder}: has no teachers; must have some to draft for")
    limits = []
    for full in (STUDENT, *(f"teachers/{name}" for name in names)):
        run.check(full)
        limits.append(run.max_length(full))
    context = RunContext(run.recipe)
    options = GenerationOptions(max_prompts=max_prompts, max_new_tokens=max_new_tokens)
    room = min((limit for limit in limits if limit is not None), default=None)
    split = context.datasets["validation"]
    prompts = [one.prompt for one in continuations(split, run.tokenizer, options, room).items]
    student = sha256_of(run.student / MANIFEST)
    key = fingerprint([student, names, max_prompts, max_new_tokens, num_drafted])
    path = run.folder / "draft.json"
    folder = context.folder
    with folder.lock(), folder.stage(STAGE, key, lambda: digests_of(run.folder, [path])):
        results = DraftResults(
            version=version("transformers"),
            student=student,
            threads=torch.get_num_threads(),
            num_prompts=len(prompts),
            max_new_tokens=max_new_tokens,
            num_drafted=num_drafted,
            rows=[_row(run, name, prompts, num_drafted) for name in names],
        )
        write_json(path, results.to_json())
    return results


def _teacher(run: RunModels, name: str) -> str:
    if name not in run.recipe.teachers:
        raise CollegiumError(
            f"--teacher: unknown teacher `{name}`; must be one of "
            f"{', '.join(run.recipe.teachers) or 'none'}"
        )
    return name


def _row(run: RunModels, name: str, prompts: Sequence[Prompt], num_drafted: int) -> DraftRow:
    where = f"teachers.{name}"
    teacher = run.recipe.teachers[name].load(name, vocab_size=run.vocab_size, where=where)
    if not isinstance(teacher, LocalTeacher):
        return DraftRow(teacher=name, note="has no model in this process")
    student = run.load_student()
    stops = {run.tokenizer.eos_token_id} | stop_ids(student.model.generation_config)
    with progress(f"draft for {name}") as advance, teacher.placed():
        drafted = DraftedModel(
            teacher.model,
            student.model,
            vocab_size=run.vocab_size,
            num_drafted=num_drafted,
            stops=stops | stop_ids(teacher.model.generation_config),
        )
        try:
            pairs = _measure(drafted, prompts, advance)
        except ModelError as error:
            return DraftRow(teacher=name, note=str(error))
    return draft_row(name, pairs)


def _measure(
    model: DraftedModel, prompts: Sequence[Prompt], advance: OnProgress
) -> list[tuple[DraftedText, DraftedText, float, float]]:
    """Return each text without and with drafts, and the median seconds of both."""
    for is_drafted in (False, True):  # a warm-up
        model.generate(prompts[0].ids, prompts[0].max_new_tokens, is_drafted=is_drafted)
    pairs = []
    for number, prompt in enumerate(prompts):
        runs = [
            [
                model.generate(prompt.ids, prompt.max_new_tokens, is_drafted=is_drafted)
                for is_drafted in (False, True)
            ]
            for _ in range(REPEATS)
        ]
        alone, drafted = (statistics.median(pair[i].seconds for pair in runs) for i in (0, 1))
        pairs.append((*runs[0], alone, drafted))
        advance(number + 1, len(prompts))
    return pairs


def draft_row(
    name: str, pairs: Sequence[tuple[DraftedText, DraftedText, float, float]]
) -> DraftRow:
    """Summarize texts of one teacher: shares and speeds over all texts, intervals over prompts.

    Args:
        name: the teacher.
        pairs: each text without and with drafts, and the seconds of both.
    """
    plain, drafted, plain_s, drafted_s = zip(*pairs, strict=True)
    num_drafted = np.array([text.drafted for text in drafted], np.int64)
    accepted = np.array([text.accepted for text in drafted], float)
    tokens = sum(len(text.ids) for text in drafted)
    # The interval of a ratio of sums, in whole microseconds.
    spent = np.array([round(1e6 * seconds) for seconds in drafted_s], np.int64)
    saved = 1e6 * np.array(plain_s)
    total = int(num_drafted.sum())
    return DraftRow(
        teacher=name,
        num_identical=sum(a.ids == b.ids for a, b in zip(plain, drafted, strict=True)),
        drafted=total,
        accepted=int(accepted.sum()),
        accepted_share=float(accepted.sum()) / total if total else None,
        accepted_interval=document_interval([(accepted, num_drafted)]) if total else None,
        tokens_per_pass=tokens / sum(text.passes for text in drafted),
        teacher_tokens_per_s=sum(len(text.ids) for text in plain) / sum(plain_s),
        tokens_per_s=tokens / sum(drafted_s),
        speedup=sum(plain_s) / sum(drafted_s),
        speedup_interval=document_interval([(saved, spent)]),
    )
