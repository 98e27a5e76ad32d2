"""Continuations of the same prompts by teachers, student and best control, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from collegium.console import printable
from collegium.report.colors import row_color
from collegium.report.formats import text
from collegium.report.headline import best
from collegium.report.run_files import RunFiles
from collegium.report.tables import Column, Line, Table
from collegium.storage.records import SamplePrompt, TaskRow

SHOWN = ("student", "control", "fused", "teacher")
MAX_PROMPT = 400
"""Characters of a prompt that are shown, its last ones."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, and the table of its continuations."""

    prompt: str
    place: str
    texts: Table[str]


def samples(run: RunFiles) -> list[Sample]:
    """Return the first few prompts with the continuation of each model, or nothing."""
    results = run.samples
    prompts = () if results is None else results.prompts[: run.num_samples]
    return [_sample(run, number, prompt) for number, prompt in enumerate(prompts)]


def _sample(run: RunFiles, number: int, prompt: SamplePrompt) -> Sample:
    start = printable(prompt.text)
    shown = start if len(start) <= MAX_PROMPT else f"… {start[-MAX_PROMPT:]}"
    # Without the folder, which is long and of one machine.
    place = ", ".join(filter(None, [prompt.domain, prompt.document.rpartition("/")[2]]))
    lines = [Line("the document itself", prompt.reference)]
    colors = {row.name: row_color(row, run) for row in run.results or ()}
    for row in _rows(run):
        is_marked = row.kind == "student"
        color = colors.get(row.name, "")
        lines.append(Line(row.title, row.texts[number], color, is_marked=is_marked))
    column = Column[str]("continues", str, lambda value: text(printable(value)), is_text=True)
    return Sample(shown, printable(place), Table("", "Model", [column], lines))


def _rows(run: RunFiles) -> Iterator[TaskRow]:
    """Yield the rows that have texts, of the controls only the best one."""
    control = best(run.rows("control"))
    for kind in SHOWN:
        for row in run.samples.rows if run.samples else ():
            is_other = kind == "control" and control is not None and row.name != control.name
            if row.kind == kind and row.texts and not is_other:
                yield row
