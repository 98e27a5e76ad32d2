"""The command line: one command per stage; what is heavy is imported inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from collegium.errors import CollegiumError, Interrupted, RecipeError, check_versions

if TYPE_CHECKING:
    from pydantic import ValidationError

    from collegium.recipe import Recipe

USER_ERROR = 2
TABLE_WIDTH = 130
INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns our errors into exit codes, and takes `--debug` at any place of the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        debug = [arg for arg in args if arg == "--debug"]
        return super().parse_args(ctx, debug[:1] + [arg for arg in args if arg != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Interrupted, KeyboardInterrupt) as error:
            typer.echo(str(error) or "interrupted", err=True)
            typer.echo("run the same command again to go on from the last checkpoint", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except CollegiumError as error:
            _fail(ctx, str(error), error)
        except OSError as error:
            # What a disk, a file or a permission refuses in the middle of a run is nothing we could have checked.
            place = f"{error.filename}: " if error.filename else ""
            _fail(ctx, f"{place}{error.strerror or error}", error)
        except ValueError as error:
            # An option class refused a value while it was built in Python, not by the recipe reader.
            from pydantic import ValidationError

            if not isinstance(error, ValidationError):
                raise
            _fail(ctx, str(recipe_error(error)), error)


def _fail(ctx: Any, text: str, error: Exception) -> None:
    if ctx.params.get("debug"):
        import traceback

        typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(USER_ERROR) from error


def recipe_error(error: ValidationError) -> RecipeError:
    """The problems of options built in Python, one per line, as the recipe reader words them."""
    from collegium.decode import message

    lines = [
        ": ".join((".".join([error.title, *map(str, item["loc"])]), message(item, item["input"])))
        for item in error.errors()
    ]
    return RecipeError("\n".join(lines))


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distill several frozen language models into one small student.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, for example train.max_steps=10."),
]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from collegium import __version__

        typer.echo(f"collegium {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    del debug, version


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    check_versions()
    from collegium.recipe import load_recipe

    return load_recipe(recipe, overrides or [])


@app.command()
def run(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Do everything: check, preflight, train, evaluate, report; finished stages are skipped."""
    loaded = _load(recipe, overrides)
    from collegium import pipeline

    folder = pipeline.run(loaded)
    _print_results(folder / "results.json")
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Find what is wrong before anything heavy is loaded."""
    loaded = _load(recipe, overrides)
    from collegium import pipeline

    found = pipeline.check(loaded)
    for line in found.lines:
        typer.echo(line)
    for line in found.warnings:
        typer.echo(f"warning: {line}")


@app.command()
def preflight(
    recipe: RecipeFile,
    overrides: Overrides = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the chosen fusion into the recipe file.")
    ] = False,
) -> None:
    """Measure the teachers on held-out text and choose how to fuse them."""
    loaded = _load(recipe, overrides)
    from collegium import pipeline
    from collegium.evaluate.table import preflight_tables

    measured = pipeline.preflight(loaded, apply_to=recipe if apply else None)
    _print(*preflight_tables(measured))
    for sentence in measured["verdict"]:
        typer.echo(sentence)
    if apply:
        typer.echo(f"{recipe}: fusion set to {measured['chosen']['name']}")


def _print(*tables: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)  # a file has no width of its own; 80 would cut tables
    for table in tables:
        console.print(table)


def _print_results(path: Path) -> None:
    import json

    from collegium.evaluate.table import render_table

    _print(render_table(json.loads(path.read_text(encoding="utf-8"))))


class _CacheGroup(TyperGroup):
    """Lets `cache RECIPE` stand for `cache build RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["build", *args]
        return super().parse_args(ctx, args)


cache_app = typer.Typer(
    cls=_CacheGroup,
    no_args_is_help=True,
    help="Let the teachers read the corpus once; `collegium cache RECIPE` builds.",
)
app.add_typer(cache_app, name="cache")
CacheFolder = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder of the cache, or its URL.")
]


@cache_app.command("build")
def cache_build(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Write what the teachers say of every token, or go on where an interrupted build stopped."""
    loaded = _load(recipe, overrides)
    from collegium import pipeline

    for folder, manifest in pipeline.cache(loaded):
        if manifest is not None:
            _print_cache(folder, manifest)


@cache_app.command("info")
def cache_info(path: CacheFolder) -> None:
    """Say what a cache holds and what it was made of."""
    import json

    from collegium.cache.feature_store import feature_folders, require_feature_manifest
    from collegium.cache.store import cache_folders, require_manifest

    manifests = [(folder, require_manifest(folder)) for folder in cache_folders(path)]
    manifests += [(folder, require_feature_manifest(folder)) for folder in feature_folders(path)]
    for folder, manifest in manifests:
        _print_cache(folder, manifest)
        typer.echo(json.dumps(manifest["identity"], indent=1))


@cache_app.command("verify")
def cache_verify(path: CacheFolder) -> None:
    """Compare every byte of a cache with its manifest, and decode every target."""
    from collegium.cache.feature_store import feature_folders, open_features
    from collegium.cache.store import cache_folders, open_cache

    for folder in cache_folders(path):
        cache = open_cache(folder)
        cache.check()
        _print_cache(folder, cache.manifest)
    for folder in feature_folders(path):
        features = open_features(folder)
        features.check()
        _print_cache(folder, features.manifest)
    typer.echo("every shard verified")


@cache_app.command("merge")
def cache_merge(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Where to, then the other folders.")
    ],
) -> None:
    """Put into the first folder what processes without a common folder have built."""
    from collegium.cache.merge import merge_all

    for folder, manifest in merge_all(paths):
        _print_cache(folder, manifest)


def _print_cache(path: Path | str, manifest: Any) -> None:
    from collegium.cache.store import summary

    typer.echo(f"cache: {path}: {summary(manifest)}")


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train the student, or go on where an interrupted run stopped."""
    loaded = _load(recipe, overrides)
    from collegium import pipeline

    typer.echo(f"student: {pipeline.train(loaded)}")


@app.command()
def evaluate(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Compare the student with its teachers, the fused target and the controls."""
    loaded = _load(recipe, overrides)
    from collegium import pipeline

    pipeline.evaluate(loaded)
    _print_results(loaded.output_dir / "results.json")


@app.command()
def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Write the run's report as one HTML file."""
    loaded = _load(recipe, overrides)
    from collegium import pipeline

    typer.echo(f"report: {pipeline.report(loaded)}")


@app.command()
def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Two minutes: three tiny teachers, text that comes with Python."
        ),
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Run folder; runs/demo or runs/demo-quick by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of all that is random.")] = 0,
    controls: Annotated[
        str | None, typer.Option(help="Names of controls, separated by commas.")
    ] = None,
) -> None:
    """Train four specialists on real text out of packages and distill them into one small student."""
    names = None if controls is None else [name for name in controls.split(",") if name]
    check_versions()
    from collegium.demo.run import run_demo

    folder = run_demo(quick=quick, output_dir=output_dir, seed=seed, controls=names)
    _print_results(folder / "results.json")
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study.")],
) -> None:
    """Run one recipe under many settings and seeds; ends with one table and one page."""
    check_versions()
    from collegium.study.run import run_study

    finished = run_study(file)
    for table in finished.tables:
        typer.echo(f"\n{table.title}\n\n{table.markdown()}")
    typer.echo(f"\nreport: {finished.page}")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("collegium.yaml"),
) -> None:
    """Write a commented recipe to start from; never over an existing file."""
    from collegium.starter import TEMPLATE

    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(TEMPLATE)
    except FileExistsError as error:
        raise RecipeError(f"{path}: exists already; choose another name, or delete it") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {path}; edit it, then run `collegium check {path}`")


def main() -> None:
    """Entry point of the `collegium` command."""
    app(prog_name="collegium")


if __name__ == "__main__":
    sys.exit(main())
