"""The table of generated text and tasks."""

from __future__ import annotations

from rich.console import Console

from collegium.report.page import render_run
from collegium.report.run_files import CONTINUATION, RunFiles
from collegium.report.task_tables import (
    domain_score_table,
    harness_table,
    score_text,
    task_notes,
    task_table,
)
from collegium.storage.records import HarnessResults, MetricScore, TaskResults, TaskRow


def score(value: float | None, stderr: float | None = 0.01, n: int = 9) -> MetricScore:
    return MetricScore(value=value, stderr=stderr, num_samples=n)


CONTINUED = TaskResults(
    num_prompts=9,
    signatures={"bleu": "nrefs:1|version:2.6.0"},
    rows=[
        TaskRow(
            name="a", kind="teacher", scores={"bleu": score(12.34, 1.25), "rouge_l": score(0.2)}
        ),
        TaskRow(name="fused target", kind="fused", note="weighting `ca_mkd` reads the label"),
        TaskRow(
            name="student (distilled)",
            kind="student",
            scores={"bleu": score(9.0, None), "rouge_l": score(None)},
            domains={"law": {"bleu": score(7.0, n=4)}, "art": {"bleu": score(8.0, n=5)}},
        ),
    ],
)
TASK = TaskResults(
    num_prompts=8,
    rows=[
        TaskRow(name="a", kind="teacher", scores={"accuracy": score(0.5, n=8)}),
        TaskRow(name="student (distilled)", kind="student", scores={"accuracy": score(0.25, n=7)}),
    ],
)
RUN = RunFiles("run", suites={CONTINUATION: CONTINUED, "[red]qa": TASK})


def test_one_table_of_all_models_and_suites() -> None:
    table = task_table(RUN)
    cells = {line.name: [cell.text for cell in cells] for line, cells in table.rows()}
    assert cells == {
        "student (distilled)": ["9.0", "–", "25.0 ± 1.0"],
        "fused target": ["–", "–", "–"],
        "a": ["12.3 ± 1.2", "20.0 ± 1.0", "50.0 ± 1.0"],
    }
    titles = [column.title.replace("\N{NO-BREAK SPACE}", " ") for column in table.columns]
    assert titles == [
        "continuation: BLEU (n = 9)",
        "continuation: ROUGE-L (legacy), % (n = 9)",
        "[red]qa: accuracy, % (n = 7 to 8)",
    ]
    assert [line.group for line in table.lines] == ["Distilled", "Fused target", "Teachers"]
    # No winner: the reader compares the differences with the standard errors.
    assert not any(cell.is_best for _, cells in table.rows() for cell in cells)


def test_the_terminal_shows_it_in_100_columns() -> None:
    console = Console(width=100, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(task_table(RUN).rich())
    text = capture.get()
    assert "12.3 ± 1.2" in text
    assert "[red]qa" in text
    assert "…" not in text


def test_notes_name_reasons_and_signatures() -> None:
    notes = list(task_notes(RUN))
    assert notes[0] == "fused target: no text, since weighting `ca_mkd` reads the label"
    assert notes[1] == "continuation: BLEU: nrefs:1|version:2.6.0"
    assert not list(task_notes(RunFiles("run")))


def test_domains_have_a_table() -> None:
    (law, art) = domain_score_table(RUN).lines
    assert (law.name, art.name) == ("student (distilled), law", "student (distilled), art")
    assert "n = 4 to 5" in domain_score_table(RUN).columns[0].title.replace(
        "\N{NO-BREAK SPACE}", " "
    )


def test_the_page_has_the_tables_where_there_are_scores() -> None:
    found = HarnessResults(version="1", student="0" * 64, tasks={"t": {"acc": score(0.5)}})
    page = render_run(RunFiles("run", suites=RUN.suites, harness=found))
    for part in ("ROUGE-L (legacy)", "12.3 ± 1.2", "version:2.6.0", "t: acc", "0.5000"):
        assert part in page
    plain = render_run(RunFiles("run"))
    assert "standard error" not in plain
    assert "lm-evaluation-harness" not in plain
    assert harness_table(RunFiles("run")).lines == []


def test_a_score_shows_its_standard_error() -> None:
    assert score_text(None) == "–"
    assert score_text(score(0.3821, 0.0142)) == "38.2 ± 1.4"
    assert score_text(score(12.0, 0.5), factor=1.0) == "12.0 ± 0.5"
