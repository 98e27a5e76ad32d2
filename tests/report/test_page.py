import itertools
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

import run_fixture
from collegium.report import page, plots
from collegium.storage import files
from refusals import refused

MARKS = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe src=javascript:alert(1)>",
    "<body onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "<math><mtext></mtext><script>alert(1)</script></math>",
    "<style>@import 'http://evil.example/x.css';</style>",
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href='http://evil.example/'>",
    "<object data=http://evil.example></object>",
    "<embed src=http://evil.example>",
    "<form action=http://evil.example><button>x</button></form>",
    "<input autofocus onfocus=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)>",
    "<marquee onstart=alert(1)>",
    "\" onmouseover=\"alert(1)",
    "' onmouseover='alert(1)",
    "\"><script>alert(1)</script>",
    "'><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</pre><script>alert(1)</script>",
    "</textarea><script>alert(1)</script>",
    "</table><script>alert(1)</script>",
    "--><script>alert(1)</script>",
    "<!--<script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)",
    "{{ 7 * 7 }}",
    "{% include '/etc/passwd' %}",
    "{{ ''.__class__.__mro__ }}",
    "<scr\u0000ipt>alert(1)</scr\u0000ipt>",
    "<ScRiPt>alert(1)</ScRiPt>",
    "red;background:url(http://evil.example/x)",
)  # fmt: skip
FILES = (
    "recipe.yaml",
    "environment.json",
    "stages.json",
    "preflight.json",
    "results.json",
    "train/log.jsonl",
    "controls",
)
ALLOWED_TAGS = frozenset(
    [
        "html",
        "details",
        "summary",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "p",
        "strong",
        "h1",
        "ul",
        "li",
        "nav",
        "a",
        "section",
        "div",
        "h2",
        "h3",
        "figure",
        "img",
        "figcaption",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "span",
        "b",
        "code",
        "pre",
        "footer",
    ]
)
SVG_TAGS = frozenset(
    ["svg", "metadata", "defs", "style", "g", "path", "use", "rect", "image", "clipPath"]
)


class _Tags(HTMLParser):
    """Every tag and attribute that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _tags(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Tags()
    parser.feed(text)
    return parser.tags


def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "draw_all", lambda run: {})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = run_fixture.write_run(tmp_path_factory.mktemp("report") / "specialists")
    return page.write_report(folder).read_text(encoding="utf-8")


def test_headline_names_the_winner_and_the_margin(report: str) -> None:
    assert (
        "reaches perplexity 118.0, 7.9 % below the best control, “CE only, equal steps” "
        "(128.2, 900 steps each) and 46.7 % below the best teacher, “gutenberg”" in report
    )


def test_has_every_section_and_every_plot(report: str) -> None:
    assert re.findall(r'<h2 id="(\w+)"', report) == [
        "plots",
        "evaluation",
        "preflight",
        "cost",
        "recipe",
        "environment",
        "next",
    ]
    assert report.count("<figure>") == 7
    assert "is missing" not in report


def test_marks_the_student_and_the_best_of_each_column(report: str) -> None:
    table = report[report.index('id="evaluation"') :]
    student = re.search(r'<tr class="mark">.*?</tr>', table, re.S)
    assert student is not None
    assert "<b>118.0</b>" in student.group()
    assert "<b>97.1</b>" not in table  # the fused target does not compete


def test_compression_counts_all_teachers(report: str) -> None:
    assert "9.29 ×" in report  # 4 * 2,561,280 / 1,102,464


def test_a_long_ranking_of_fusions_is_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_plots(monkeypatch)
    folder = run_fixture.write_run(tmp_path / "run", steps=2)
    fusions = [
        {
            "nll": 7.8 + i / 10,
            "fusion": {"weighting": {"name": f"candidate-{i:02}"}},
            "is_chosen": i == 11,
        }
        for i in range(13)
    ]
    run_fixture.write_json(folder / "preflight.json", {"fusions": fusions})
    text = page.write_report(folder).read_text(encoding="utf-8")
    shown, _, folded = text.partition("<details><summary>2 more</summary>")
    # The chosen fusion is shown wherever it ranks.
    numbers = [*range(10), 11]
    assert re.findall(r"candidate-\d\d", shown) == [f"candidate-{i:02}" for i in numbers]
    assert re.findall(r"candidate-\d\d", folded) == ["candidate-10", "candidate-12"]
    assert text.count(">chosen</td>") == 1


def test_a_fitted_fusion_is_a_name_and_a_table(report: str) -> None:
    assert "<h3>Chosen fusion: domain_weights, linear</h3>" in report
    assert '<th scope="row">weights, fiction</th>' in report
    assert "fiction/gutenberg" not in report


def test_an_active_conflict_policy_is_shown(report: str) -> None:
    assert "<h3>Conflict policy</h3>" in report


def test_loads_nothing_and_runs_nothing(report: str) -> None:
    tags = _tags(report)
    assert {tag for tag, _ in tags} <= ALLOWED_TAGS
    sources = [
        value or "" for _, attrs in tags for key, value in attrs.items() if key in ("src", "href")
    ]
    assert sources
    assert all(value.startswith(("data:image/svg+xml;base64,", "#")) for value in sources)
    assert not [key for _, attrs in tags for key in attrs if key.startswith("on")]
    assert "http://" not in report
    assert "https://" not in report
    assert "url(" not in report
    policy = [a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = run_fixture.write_run(tmp_path / "run", steps=12)
    first = page.write_report(folder).read_bytes()
    assert page.write_report(folder).read_bytes() == first


@pytest.mark.parametrize("absent", [c for n in range(8) for c in itertools.combinations(FILES, n)])
def test_any_file_may_be_missing(
    absent: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_plots(monkeypatch)
    folder = run_fixture.write_run(tmp_path / "run", steps=2)
    for name in absent:
        path = folder / name
        path.rename(tmp_path / name.replace("/", "_"))
    text = page.write_report(folder).read_text(encoding="utf-8")
    for name in FILES[:-1]:
        assert (f"<code>{name}</code> is missing" in text) == (name in absent)
    assert ("collegium evaluate RECIPE" in text) == ("results.json" in absent)


@pytest.mark.parametrize("absent", [*((name,) for name in FILES), FILES])
def test_plots_are_drawn_from_what_is_there(absent: tuple[str, ...], tmp_path: Path) -> None:
    folder = run_fixture.write_run(tmp_path / "run", steps=3)
    for name in absent:
        (folder / name).rename(tmp_path / name.replace("/", "_"))
    text = page.write_report(folder).read_text(encoding="utf-8")
    assert ("<figure>" in text) == (absent != FILES)


@pytest.mark.parametrize("payload", MARKS)
def test_names_are_shown_and_never_run(
    payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_plots(monkeypatch)
    folder = run_fixture.write_run(
        tmp_path / "run",
        teachers=[payload, "other"],
        domains=[payload],
        controls=[payload.replace("\u0000", "")],
        steps=2,
        recipe=f"name: {payload}\n",
    )
    machine = {"processor": payload, "packages": {payload: payload}}
    run_fixture.write_json(folder / "environment.json", machine)
    stage = {"status": payload, "started": payload, "seconds": 1.0, "note": payload}
    run_fixture.write_json(folder / "stages.json", {payload: stage})
    text = page.write_report(folder).read_text(encoding="utf-8")
    tags = _tags(text)
    assert {tag for tag, _ in tags} <= ALLOWED_TAGS
    assert "<script" not in text.lower()
    allowed = {
        "class", "id", "href", "src", "alt", "style", "scope", "colspan", "lang", "charset",
        "http-equiv", "content", "name", "data-label",
    }  # fmt: skip
    assert {key for _, attrs in tags for key in attrs} <= allowed
    styles = [value or "" for _, attrs in tags for key, value in attrs.items() if key == "style"]
    assert all(re.fullmatch(r"background:#[0-9a-f]{6}", value) for value in styles)
    if "{{ 7" in payload:
        assert payload in text  # shown, not computed
    if payload.startswith("<ScR"):
        assert "&lt;ScRiPt&gt;" in text


def test_names_in_sentences_are_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_plots(monkeypatch)
    folder = run_fixture.write_run(tmp_path / "run", steps=2)
    path = folder / "preflight.json"
    measured = json.loads(path.read_text())
    measured["verdict"] = [
        "`a` and `<b>` add nothing; overconfident: `c`.",
        "`d` opens one ` that nothing closes <i>",
    ]
    path.write_text(json.dumps(measured))
    text = page.write_report(folder).read_text()
    for line in (
        "<code>a</code> and <code>&lt;b&gt;</code> add nothing; overconfident: <code>c</code>.",
        "<code>d</code> opens one ` that nothing closes &lt;i&gt;",
    ):
        assert f"<li>{line}</li>" in text


def test_hostile_names_in_plots_are_paths_and_not_text(tmp_path: Path) -> None:
    names = list(MARKS[:10])
    folder = run_fixture.write_run(tmp_path / "run", teachers=names, domains=names, steps=3)
    for svg in plots.draw_all(page.read_run(folder)).values():
        for element in ET.fromstring(svg).iter():
            tag = element.tag.rpartition("}")[2]
            assert tag in SVG_TAGS
            for key, value in element.attrib.items():
                assert not key.lower().startswith("on")
                assert not key.endswith("href") or value.startswith(("#", "data:image/png;base64,"))


def test_template_never_disables_escaping() -> None:
    templates = list(Path(page.__file__).parent.glob("*.html"))
    assert len(templates) == 4
    for template in templates:
        text = template.read_text(encoding="utf-8")
        assert "|safe" not in text.replace(" ", "")
        assert "autoescape" not in text
        assert "<script" not in text


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_plots(monkeypatch)
    folder = run_fixture.write_run(tmp_path / "run", steps=2)
    (folder / "report.html").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with refused(page.CollegiumError, "TMP/run/report.html"):
        page.write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not list(folder.glob(".report.html*"))
