import math

import pytest

from collegium.report import formats
from collegium.report.headline import gap_closed, headline_of
from collegium.report.run_files import RunFiles
from collegium.storage.records import LogStep, ResultRow


def _row(name: str, kind: str, perplexity: float | None, **more: int) -> ResultRow:
    nll = None if perplexity is None else math.log(perplexity)
    return ResultRow.model_validate(
        {"name": name, "kind": kind, "nll": nll, "perplexity": perplexity, **more}
    )


def _run(*rows: ResultRow) -> RunFiles:
    return RunFiles("run", results=rows)


STUDENT = _row("student", "student", 118.0, steps=900)


def test_student_that_wins() -> None:
    headline = headline_of(
        _run(STUDENT, _row("ce", "control", 128.2, steps=900), _row("u", "control", 190.0))
    )
    assert headline.tone == "good"
    assert headline.text == (
        "The distilled student reaches perplexity 118.0, 8.0 % below the best control, “ce” "
        "(128.2, 900 steps each)."
    )
    assert headline.facts == ("Control u: 190.0 (student −37.9 %)",)


def test_student_that_loses() -> None:
    headline = headline_of(_run(STUDENT, _row("ce", "control", 100.0, steps=700)))
    assert headline.tone == "bad"
    assert "18.0 % above the best control, “ce” (100.0, 700 steps vs. 900)" in headline.text
    assert "A simpler method did better" in headline.text


@pytest.mark.parametrize("limit", [117.2, 118.0, 118.9])
def test_difference_within_noise_is_no_win(limit: float) -> None:
    headline = headline_of(_run(STUDENT, _row("ce", "control", limit)))
    assert headline.tone == "even"
    assert "on par with the best control" in headline.text
    assert "too small a difference to call with one seed" in headline.text


def test_without_a_control_no_claim() -> None:
    headline = headline_of(
        _run(
            STUDENT,
            _row("a", "teacher", 90.0),
            _row("b", "teacher", 80.0),
            _row("f", "fused", 70.0),
        )
    )
    assert headline.tone == "open"
    assert "no control" in headline.text
    assert "47.5 % above the best teacher, “b” (80.0)" in headline.text
    assert headline.facts == ("Fused target: 70.0",)


@pytest.mark.parametrize(("teacher", "tone"), [(170.0, "good"), (100.0, "good"), (80.0, "even")])
def test_student_far_above_the_best_teacher_is_no_success(teacher: float, tone: str) -> None:
    rows = [_row("ce", "control", 200.0), _row("a", "teacher", teacher, num_parameters=700)]
    student = STUDENT.model_copy(update={"num_parameters": 200})
    headline = headline_of(_run(student, *rows))
    assert headline.tone == tone
    assert f"best teacher, “a” ({teacher:.1f}, with 3.50 × the parameters)" in headline.text


def test_student_that_training_did_not_improve() -> None:
    headline = headline_of(
        _run(STUDENT, _row("ce", "control", 200.0), _row("start", "untouched", 117.5))
    )
    assert headline.tone == "bad"
    assert "has not improved the untouched student" in headline.text


@pytest.mark.parametrize(("last", "tone"), [(2.9, "good"), (2.8, "even")])
def test_loss_that_still_falls_is_not_ready(last: float, tone: str) -> None:
    def run(weight: float) -> RunFiles:
        losses = [5.0] * 15 + [3.0] * 5 + [last] * 5
        log = [LogStep(step=i, loss=x, term_weights={"kd": 1.0}) for i, x in enumerate(losses)]
        log[-1] = log[-1].model_copy(update={"term_weights": {"kd": weight}})
        return RunFiles("run", results=(STUDENT, _row("ce", "control", 200.0)), log=tuple(log))

    headline = headline_of(run(1.0))
    assert headline.tone == tone
    assert ("fell by 6.7 % over the last fifth" in headline.text) == (tone == "even")
    # A term that ends makes the loss fall, too.
    assert headline_of(run(0.0)).tone == "good"


def test_missing_evaluation() -> None:
    assert headline_of(RunFiles("run")).text == "The student is not trained yet."
    trained = RunFiles("run", log=(LogStep(step=40),))
    assert (
        headline_of(trained).text
        == "Training has reached step 40; the student is not evaluated yet."
    )
    assert "no distilled student" in headline_of(_run(_row("a", "teacher", 9.0))).text
    assert "no distilled student" in headline_of(_run(_row("student", "student", None))).text


def test_gap_closed_runs_from_the_control_to_the_fused_target() -> None:
    rows = [
        _row("s", "student", math.e**2),
        _row("c", "control", math.e**3),
        _row("f", "fused", math.e),
    ]
    assert gap_closed(_run(*rows)) == pytest.approx(0.5)
    assert gap_closed(_run(rows[0], rows[1], _row("f", "fused", math.e**4))) is None
    assert gap_closed(_run(rows[0], rows[2])) is None


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.fixed(4.76849), "4.768"),
        (formats.fixed(-0.0001), "0.000"),
        (formats.fixed(-1234.5, 1), "−1,234.5"),
        (formats.fixed(math.nan), "–"),
        (formats.signed(0.12), "+0.120"),
        (formats.signed(-0.12), "−0.120"),
        (formats.signed(0.00001), "0.000"),
        (formats.perplexity(8.416), "8.42"),
        (formats.perplexity(118.02), "118.0"),
        (formats.perplexity(4211.4), "4,211"),
        (formats.perplexity(3.2e9), "3.2e+09"),
        (formats.percent(0.3821), "38.2 %"),
        (formats.percent(None), "–"),
        (formats.signed_percent(-0.0796), "−8.0 %"),
        (formats.amount(1_102_464), "1.10 M"),
        (formats.amount(999_999), "1.00 M"),
        (formats.amount(307_200), "307 k"),
        (formats.amount(900), "900"),
        (formats.ratio(23.24), "23.2 ×"),
        (formats.duration(0.44), "0.4 s"),
        (formats.duration(59.7), "1 min 00 s"),
        (formats.duration(155.2), "2 min 35 s"),
        (formats.duration(11_260), "3 h 07 min"),
        (formats.duration(None), "–"),
        (formats.interval([4.5, 4.66]), "4.500 … 4.660"),
        (formats.interval([0.0, 0.21], formats.signed), "0.000 … +0.210"),
        (formats.interval([None, 1.0]), "–"),
        (formats.text(None), "–"),
        (formats.text("raw"), "raw"),
    ],
)
def test_number_formats(written: object, expected: object) -> None:
    assert written == expected
