"""Command line: one command per stage, with heavy imports inside the commands."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from collegium.console import escape_warnings, is_silent, printable
from collegium.errors import (
    DISK_FULL,
    CollegiumError,
    Interrupted,
    RecipeError,
    Terminated,
    check_versions,
)

if TYPE_CHECKING:
    from pydantic import ValidationError

    from collegium.config.recipe import Recipe

USER_ERROR = 2
TABLE_WIDTH = 130


SEVERAL_PROCESSES = frozenset({"run", "corpus", "preflight", "cache", "train", "evaluate"})
"""Commands that a launcher may start in several processes."""


def _echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    if is_silent() and not err:
        return
    typer.echo(printable(text), err=err, nl=nl)


class _Group(TyperGroup):
    """Command group that maps our errors to exit codes and accepts `--debug` in any position."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # click takes a group's option only before the command; users append it to the line.
        debug = [arg for arg in args if arg == "--debug"]
        return super().parse_args(ctx, debug[:1] + [arg for arg in args if arg != "--debug"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        size = os.environ.get("WORLD_SIZE", "1")
        if size not in ("", "1") and name not in SEVERAL_PROCESSES:
            raise CollegiumError(
                f"WORLD_SIZE: got {size}; must be 1 for `collegium {name}`; start a single "
                "process, without torchrun"
            )
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        from collegium.storage.files import system_errors

        escape_warnings()
        try:
            with system_errors(), _terminating():
                return super().invoke(ctx)
        except (Interrupted, KeyboardInterrupt) as error:
            default = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
            number = error.number if isinstance(error, Interrupted) else default
            _echo(str(error) or "interrupted", err=True)
            _echo("run the same command again to resume from the last checkpoint", err=True)
            # The convention of shells for a process that a signal ended.
            raise typer.Exit(128 + number) from error
        except CollegiumError as error:
            _fail(ctx, str(error), error)
        except OSError as error:
            # I/O errors during a run, such as a full disk, cannot be checked up front.
            path = f"{error.filename}: " if error.filename else ""
            text = error.strerror or str(error)
            if error.errno in DISK_FULL:
                remedy = "free space, then run the same command again"
                text = f"the disk is full ({text}); finished work is kept; {remedy}"
            _fail(ctx, f"{path}{text}", error)
        except ValueError as error:
            from pydantic import ValidationError

            if not isinstance(error, ValidationError):
                raise
            _fail(ctx, _option_problems(error), error)


@contextmanager
def _terminating() -> Iterator[None]:
    """Raise Terminated in the main thread on the first SIGTERM. A second one kills the process."""
    main = os.getpid()

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != main:
            # A worker that was forked: its parent ends it this way.
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise Terminated("SIGTERM: interrupted")

    # Only the main thread may set handlers, and a signal that the parent ignores stays ignored.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fail(ctx: Any, text: str, error: Exception) -> None:
    if ctx.params.get("debug"):
        import traceback

        _echo("".join(traceback.format_exception(error)), err=True, nl=False)
    _echo(f"error: {text}", err=True)
    raise typer.Exit(USER_ERROR) from error


def _option_problems(error: ValidationError) -> str:
    # Of an option class that was built in Python, in the words of the recipe reader.
    from collegium.config.yaml import dotted, message

    items = error.errors(include_url=False)
    return "\n".join(f"{dotted((error.title, *item['loc']))}: {message(item)}" for item in items)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distill several frozen language models into one small student.",
)

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML), or the folder of a run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override recipe keys, e.g. train.max_steps=10."),
]


def _show_version(is_requested: bool) -> None:
    if is_requested:
        from collegium import __version__

        _echo(f"collegium {__version__}")
        raise typer.Exit


SHOW_VERSION = typer.Option(
    "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
    version: Annotated[bool, SHOW_VERSION] = False,
) -> None:
    del debug, version


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    # Before the import: it must not load a vulnerable torch or transformers.
    check_versions()
    from collegium.run.folder import recipe_of

    return recipe_of(recipe, overrides or [])


@app.command()
def run(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run all stages, from check and corpus to report. Skips finished ones."""
    loaded = _load(recipe, overrides)
    from collegium.run import pipeline

    folder = pipeline.run(loaded)
    _print_results(folder)
    _echo(f"report: {folder / 'report.html'}")
    from collegium.report.next_steps import next_steps
    from collegium.report.run_files import read_run

    for line in next_steps(read_run(folder)):
        _echo(line)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check recipe, models, vocabularies, data and disk, loading no weights. Writes no run."""
    loaded = _load(recipe, overrides)
    from collegium.run import pipeline

    result = pipeline.check(loaded)
    for line in (*result.lines, *(f"warning: {text}" for text in result.warnings)):
        _echo(line)


@app.command()
def corpus(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Read the sources once and write their tokens to disk. Resumes an interrupted build."""
    loaded = _load(recipe, overrides)
    from collegium.run import pipeline

    _echo(f"corpus: {pipeline.corpus(loaded)}")


@app.command()
def preflight(
    recipe: RecipeFile,
    overrides: Overrides = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the chosen fusion into the recipe file.")
    ] = False,
) -> None:
    """Measure the teachers on held-out text and choose a fusion."""
    loaded = _load(recipe, overrides)
    from collegium.report.run_files import RunFiles
    from collegium.report.run_tables import preflight_tables
    from collegium.run import pipeline
    from collegium.storage.records import fusion_title

    measured = pipeline.preflight(loaded, apply_to=recipe if apply else None)
    _print(*preflight_tables(RunFiles(loaded.name, preflight=measured)))
    for sentence in measured.verdict:
        _echo(sentence)
    if apply:
        _echo(f"{recipe}: fusion set to {fusion_title(measured.chosen.fusion)}")


def _print(*tables: Any) -> None:
    from rich.console import Console

    console = Console(quiet=is_silent())
    if not console.is_terminal:
        # rich assumes 80 columns without a terminal, which cuts tables in files and pipes.
        console = Console(width=TABLE_WIDTH, quiet=is_silent())
    for table in tables:
        console.print(table.rich())


def _print_results(folder: Path) -> None:
    from collegium.report.run_files import read_run
    from collegium.report.run_tables import evaluation_table
    from collegium.report.serving import serving_sentences, serving_table
    from collegium.report.task_tables import task_notes, task_table

    files = read_run(folder)
    _print(evaluation_table(files), *([task_table(files)] if files.suites else []))
    if files.measurements is not None:
        _print(serving_table(files))
    for note in (*task_notes(files), *serving_sentences(files)):
        _echo(note)


class _CacheGroup(TyperGroup):
    """Command group in which `cache RECIPE` is short for `cache build RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["build", *args]
        return super().parse_args(ctx, args)


cache_app = typer.Typer(
    cls=_CacheGroup,
    no_args_is_help=True,
    help="Build and inspect teacher caches. `collegium cache RECIPE` builds one.",
)
app.add_typer(cache_app, name="cache")
CacheFolder = Annotated[str, typer.Argument(metavar="PATH", help="Folder or URL of the cache.")]


@cache_app.command("build")
def cache_build(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Cache the teachers' outputs for the corpus. Resumes an interrupted build."""
    loaded = _load(recipe, overrides)
    from collegium.cache.manifest import read_manifest
    from collegium.run import pipeline

    for folder in pipeline.cache(loaded):
        manifest = read_manifest(folder)
        if manifest is not None:  # or other processes are still building
            _echo(f"cache: {folder}: {manifest.summary()}")


@cache_app.command("info")
def cache_info(path: CacheFolder) -> None:
    """Show the contents of a cache and the inputs it was built from."""
    import json

    from collegium.cache.manifest import cache_folders, require_manifest

    for folder in cache_folders(path):
        manifest = require_manifest(folder)
        _echo(f"cache: {folder}: {manifest.summary()}")
        _echo(json.dumps(manifest.identity, indent=1))


@cache_app.command("verify")
def cache_verify(path: CacheFolder) -> None:
    """Verify the checksums of a cache, and decode every target."""
    from collegium.cache.manifest import cache_folders
    from collegium.cache.store import open_cache, verify_cache

    for folder in cache_folders(path):
        verify_cache(folder)
        cache = open_cache(folder)
        cache.check()
        _echo(f"cache: {folder}: {cache.manifest.summary()}")
    _echo("every shard verified")


@cache_app.command("merge")
def cache_merge(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Destination, then the folders to merge."),
    ],
) -> None:
    """Merge caches built by processes without a shared folder into the first folder."""
    from collegium.cache.build import merge_all

    for folder, manifest in merge_all(paths):
        _echo(f"cache: {folder}: {manifest.summary()}")


student_app = typer.Typer(no_args_is_help=True, help="Plan a student.")
app.add_typer(student_app, name="student")


@student_app.command("sizes")
def sizes_of_students(
    recipe: RecipeFile,
    overrides: Overrides = None,
    max_parameters: Annotated[
        int | None, typer.Option(min=1, help="Largest number of parameters to list.")
    ] = None,
) -> None:
    """List the students that can be cut out of the teachers, with size and speed here."""
    loaded = _load(recipe, overrides)
    from collegium.run.context import RunContext
    from collegium.run.student_sizes import student_sizes

    _print(student_sizes(RunContext(loaded), max_parameters))


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train the student. Resumes an interrupted run."""
    loaded = _load(recipe, overrides)
    from collegium.run import pipeline

    _echo(f"student: {pipeline.train(loaded)}")


@app.command()
def evaluate(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Evaluate the student against its teachers, the fused target and the controls."""
    loaded = _load(recipe, overrides)
    from collegium.run import pipeline

    pipeline.evaluate(loaded)
    _print_results(loaded.output_dir)


TrainedRun = Annotated[Path, typer.Argument(metavar="RUN", help="Run with a trained student.")]


@app.command()
def harness(
    run_folder: TrainedRun,
    tasks: Annotated[
        str, typer.Option(help="Comma-separated names of tasks, or a folder of task files (YAML).")
    ],
    include: Annotated[
        Path | None, typer.Option(help="Folder of further task files for the names.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples per task. Defaults to all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 16,
) -> None:
    """Evaluate the student with lm-evaluation-harness, offline. Writes harness.json."""
    check_versions()
    from collegium.report.run_files import RunFiles
    from collegium.report.task_tables import harness_table
    from collegium.run.harness import run_harness

    names = [name for name in tasks.split(",") if name]
    results = run_harness(run_folder, names, include=include, limit=limit, batch_size=batch_size)
    _print(harness_table(RunFiles(run_folder.name, harness=results)))


@app.command()
def export(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run with a trained student, or its recipe.")
    ],
    to: Annotated[
        str, typer.Option(help="Comma-separated formats. Defaults to those of the recipe.")
    ] = "",
    recover: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of training where a quantized format is beyond its bound."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check the files of finished exports.")
    ] = False,
) -> None:
    """Write the student in the formats of other tools, verified by loading it there."""
    check_versions()
    from collegium.export.build import summary_lines
    from collegium.run.exports import export_run, verify_exports
    from collegium.run.folder import recipe_of

    recipe = recipe_of(run_folder)
    names = [name for name in to.split(",") if name]
    if verify:
        infos = verify_exports(recipe.output_dir)
    else:
        infos = export_run(recipe, names, recover=recover)
    for name, info in infos.items():
        for line in summary_lines(info):
            _echo(f"{recipe.output_dir / 'exports' / name}: {line}")


@app.command()
def measure(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run with a trained student, or its recipe.")
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each model, in turn.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each model. Defaults to those of torch.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompts.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after a prompt.")] = 32,
) -> None:
    """Measure size, memory and speed of the student, its exports and its teachers, here."""
    check_versions()
    from collegium.report.page import write_report
    from collegium.report.run_files import read_run
    from collegium.report.serving import serving_sentences, serving_table
    from collegium.run.folder import recipe_of
    from collegium.run.speeds import measure_run

    recipe = recipe_of(run_folder)
    measure_run(
        recipe, rounds=rounds, threads=threads, prompt_tokens=prompt_tokens, new_tokens=new_tokens
    )
    files = read_run(recipe.output_dir)
    _print(serving_table(files))
    for sentence in serving_sentences(files):
        _echo(sentence)
    _echo(f"report: {write_report(recipe.output_dir)}")


@app.command()
def draft(
    run_folder: TrainedRun,
    teacher: Annotated[
        list[str] | None, typer.Option(help="Teacher to draft for; repeat it. Defaults to all.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Limit of a text.")] = 64,
    drafted: Annotated[int, typer.Option(min=1, help="Drafted tokens per pass.")] = 4,
) -> None:
    """Measure the student as a draft model for its teachers. Writes draft.json."""
    check_versions()
    from collegium.report.draft_tables import draft_table
    from collegium.report.run_files import RunFiles
    from collegium.run.drafts import run_draft

    results = run_draft(
        run_folder,
        teachers=teacher or [],
        max_prompts=prompts,
        max_new_tokens=max_new_tokens,
        num_drafted=drafted,
    )
    _print(draft_table(RunFiles(run_folder.name, draft=results)))


@app.command()
def push(
    run_folder: TrainedRun,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub.")],
    export: Annotated[
        list[str] | None, typer.Option(help="Export to upload as well; repeat it for each.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Create a public repository, or write to one.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and their bytes, and end.")
    ] = False,
) -> None:
    """Upload a finished student with its model card and exports to the hub. Private by default."""
    check_versions()
    from collegium.run import push as uploading

    uploads = uploading.plan_push(run_folder, repo, export or [])
    _print(uploading.upload_table(uploads, repo))
    if not dry_run:
        _echo(f"uploaded: {uploading.push(repo, uploads, is_public=public)}")


@app.command()
def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Write the report of a run as one HTML file."""
    loaded = _load(recipe, overrides)
    from collegium.run import pipeline

    _echo(f"report: {pipeline.report(loaded)}")


@app.command()
def generate(  # noqa: PLR0913  (the options of a command)
    run_folder: TrainedRun,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts; - reads one of stdin.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="student (default), a teacher, fused, a control or an export; repeat it."
        ),
    ] = None,
    all_models: Annotated[
        bool, typer.Option("--all", help="Every model of the run, side by side.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(help="A prompt per line, or JSONL rows with `prompt` or `messages`."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Limit of a text. Defaults to 256, or to the room.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.001, max=1, help="Probability of the tokens to draw from.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Random seed of the draws.")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="Write the texts as training rows (JSONL), and print none.")
    ] = None,
) -> None:
    """Continue prompts with models of a finished run, from its folder only."""
    if temperature == 0 and (top_p < 1 or seed):
        raise RecipeError(
            "--temperature: got 0, which draws nothing; must be above 0 with --top-p and --seed"
        )
    if all_models and model:
        raise RecipeError("--model: got --all as well; must be one of the two; omit one")
    check_versions()
    from collegium.evaluate.generation import Decoding
    from collegium.run.texts import check_new, generate_texts, read_prompts, save_texts, text_tables

    if save is not None:
        check_new(save)
    given = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts or ()]
    texts = [*given, *(read_prompts(file) if file else ())]
    results = generate_texts(
        run_folder,
        texts,
        models=[] if all_models else model or ["student"],
        is_raw=raw,
        max_new_tokens=max_new_tokens,
        decoding=Decoding(temperature=temperature, top_p=top_p, seed=seed),
    )
    if save is not None:
        count = save_texts(save, run_folder, texts, results, is_raw=raw)
        _echo(f"{save}: {count:,} texts of {len(texts):,} prompts")
    elif len(texts) == len(results) == 1 and results[0].texts:
        _echo(results[0].texts[0])
    else:
        _print(*text_tables(texts, results))


@app.command()
def status(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or the recipe of one.")
    ],
    overrides: Overrides = None,
) -> None:
    """Show what is finished, what takes space, and what a changed recipe would make again."""
    check_versions()
    from collegium.run.folder import recipe_of
    from collegium.run.status import run_status, status_table

    recipe = recipe_of(run_folder, overrides or [])
    _print(status_table(run_status(recipe), recipe.output_dir))


@app.command()
def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Two minutes: tiny teachers, on text shipped with Python."),
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Run folder. Defaults to runs/demo or runs/demo-quick.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Random seed.")] = 0,
    controls: Annotated[str | None, typer.Option(help="Comma-separated names of controls.")] = None,
) -> None:
    """Train four specialists on real text from packages and distill them into a small student."""
    names = None if controls is None else list(filter(None, controls.split(",")))
    check_versions()
    from collegium.demo.run import run_demo

    folder = run_demo(quick=quick, output_dir=output_dir, seed=seed, controls=names)
    _print_results(folder)
    _echo(f"report: {folder / 'report.html'}")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file (YAML).")],
) -> None:
    """Run one recipe under many settings and seeds. Ends with a table and an HTML page."""
    check_versions()
    from collegium.study.sweep import run_study

    page, tables = run_study(file)
    for table in tables:
        _echo(f"\n{table.title}\n\n{table.markdown()}")
    _echo(f"\nreport: {page}")


@app.command()
def options(
    key: Annotated[str, typer.Argument(help="Dotted key, e.g. `train`. Defaults to all.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show the keys of a recipe: type, default and meaning."""
    from collegium.config.reference import Key, reference
    from collegium.report.tables import Column, Line, Table

    columns: list[Column[Key]] = [
        Column("type", "type", str, is_text=True),
        Column("default", "default", str, is_text=True),
        Column("meaning", "meaning", str, is_text=True),
    ]
    first: dict[tuple[Key, ...], str] = {}
    for section in reference(key):
        title = " ".join(
            filter(None, [section.path or "recipe", section.kind and f"({section.kind})"])
        )
        same = first.setdefault(section.keys, section.path)
        is_new = section.keys and same == section.path
        lines = [Line(one.name, one) for one in section.keys]
        table = Table("", "key", columns, lines)
        if markdown:
            _echo(f"## {title}\n\n{section.meaning}\n")
            _echo(f"{table.markdown()}\n" if is_new else "")
            continue
        _echo(
            f"\n{title}: {section.meaning}"
            + (f" Keys as in {same}." if not is_new and same else "")
        )
        if is_new:
            _print(table)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("collegium.yaml"),
    teacher: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id of a teacher; repeat it for each.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File, glob or folder of text; repeat it for each.")
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or hub id of the student to start from.")
    ] = None,
    student_from: Annotated[
        str | None, typer.Option(help="A teacher of which the student gets every other layer.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--from", help="Recipe file to change, or a shipped one by name, e.g. demo."),
    ] = None,
) -> None:
    """Write a recipe to start from: an example, or one for given models, text or another recipe."""
    if teacher or data or student or student_from or base:
        check_versions()
        from collegium.config.starter import starter_recipe

        text = starter_recipe(
            path,
            teachers=teacher or [],
            data=data or [],
            student=student,
            student_from=student_from,
            base=base,
        )
    else:
        from importlib.resources import files

        template = files("collegium.config").joinpath("template.yaml")
        text = template.read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise RecipeError(f"{path}: already exists; choose another name, or delete it") from error
    _echo(f"wrote {path}; edit it, then run `collegium check {path}`")


def main() -> None:
    """Run the `collegium` command."""
    try:
        app(prog_name="collegium")
    except SystemExit as end:
        if end.code and _has_process_group():
            # The threads of a lost collective abort an interpreter that is shutting down: SIGABRT
            # in 1 of 24 failed runs.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


if __name__ == "__main__":
    main()
