"""The model card of a student, `README.md` in its folder, written from the run folder.

The card ends with a digest of its text, so that one edited by hand is recognized and kept.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.config.recipe import Recipe
from collegium.config.yaml import yaml_writer
from collegium.console import printable, say
from collegium.data.readers import SourceOptions
from collegium.errors import CollegiumError, ModelError
from collegium.fusion.fuse import Fusion
from collegium.fusion.options import to_recipe
from collegium.models.folder import resolve_folder
from collegium.models.weights import ADAPTER, CONFIG, read_json
from collegium.options import plain
from collegium.report.draft_tables import acceptance_table
from collegium.report.formats import MISSING, amount
from collegium.report.headline import best
from collegium.report.run_files import RunFiles, read_run
from collegium.report.run_tables import domain_table, evaluation_table
from collegium.report.task_tables import task_table
from collegium.run.folder import recipe_of
from collegium.storage.credentials import holds_secret
from collegium.storage.files import fingerprint, write_text
from collegium.storage.records import fusion_title, read_record
from collegium.train.checkpoint import MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD = "README.md"
_SIGNATURE = re.compile(r"\n<!-- Written by Collegium: ([0-9a-f]{64}) -->\n\Z")
_LICENSE = re.compile(r"[\w.+-]{1,60}")
_ABSOLUTE = re.compile(r"(/|~|[A-Za-z]:[\\/]|\\\\)")


@dataclass(frozen=True)
class Origin:
    """A model that a student comes from, as its folder describes it."""

    role: str
    path: str
    """Hub id, or the name of a folder."""
    is_hub: bool
    revision: str | None = None
    license: str | None = None


def write_card(run_folder: Path) -> Path | None:
    """Write the card of a trained student, and return its path. None without a student.

    A card that was edited by hand is kept. Raises CollegiumError as `card_text`.
    """
    student = run_folder / "student"
    if not (student / MANIFEST).is_file():
        return None
    path = student / CARD
    if path.is_file() and not is_generated(path.read_text(encoding="utf-8", errors="replace")):
        say(f"{path}: edited by hand, so it is kept; delete it to have it written again")
        return path
    write_text(path, card_text(run_folder))
    return path


def is_generated(text: str) -> bool:
    """Return True for a card as it was written, without edits."""
    match = _SIGNATURE.search(text)
    return match is not None and match[1] == fingerprint(text[: match.start()])


def card_text(
    run_folder: Path, *, repo: str | None = None, exports: Sequence[str] | None = None
) -> str:
    """Return the card of the student of a run.

    Absolute paths are shortened to their last part: they name users and machines.

    Args:
        run_folder: a run whose student is trained.
        repo: name of the repository, by default the folder of the student.
        exports: names of the exports beside it, by default all.

    Raises:
        CollegiumError: a file of the run is damaged, or the text would hold a password or key.
    """
    from huggingface_hub import ModelCard

    recipe, run = recipe_of(run_folder), read_run(run_folder)
    student = run_folder / "student"
    origins = list(_origins(recipe))
    row = best(run.rows("student"))
    yaml = _public_recipe(recipe)
    given = recipe.fusion
    chosen = to_recipe(given) if isinstance(given, Fusion) else run.measured.chosen.fusion
    config = read_json(student / CONFIG, where=str(student))
    template = files("collegium.report").joinpath("card.md").read_text(encoding="utf-8")
    # Blocks on lines of their own leave no line behind.
    template = re.sub(r"^({%.*%})\n", r"\1", template, flags=re.M)
    card = ModelCard.from_template(
        _metadata(recipe, run, origins),
        template_str=template,
        name=recipe.name,
        version=version("collegium"),
        teachers=list(recipe.teachers),
        size=amount(row.num_parameters) if row and row.num_parameters else "",
        tokens=amount(row.train_tokens) if row and row.train_tokens else "",
        fusion=_code(fusion_title(chosen)) if chosen and recipe.teachers else "",
        repo=repo or "path/to/student",
        is_chat=_has_template(student),
        exports=list(_exports(run_folder, exports)),
        origins=[_origin_cells(origin) for origin in origins],
        sources=list(_source_cells(recipe)),
        tables=[
            {"title": table.title, "text": table.markdown()}
            for table in (
                *(evaluation_table(run), domain_table(run), acceptance_table(run), task_table(run)),
            )
            if table.lines and table.columns
        ],
        max_length=config.get("max_position_embeddings"),
        recipe=yaml,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", yaml)), default=0)),
    )
    text = str(card).rstrip("\n") + "\n"
    if holds_secret(text):
        raise CollegiumError(
            f"{student / CARD}: would hold a password or key of the recipe; must hold none; pass "
            "it in the environment instead"
        )
    return f"{text}\n<!-- Written by Collegium: {fingerprint(text)} -->\n"


def _metadata(recipe: Recipe, run: RunFiles, origins: Sequence[Origin]) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    row = best(run.rows("student"))
    metrics = ("perplexity", "bits_per_byte")
    values = {name: getattr(row, name) for name in metrics if row and getattr(row, name)}
    sources = [source.hub for part in recipe.data.sources.values() for source in part if source.hub]
    licenses = {origin.license for origin in origins}
    base = [origin.path for origin in origins if origin.role == "student" and origin.is_hub]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["collegium", "distillation"],
        # Only where all models agree: a mixture of licenses is for the publisher to judge.
        license=licenses.pop() if len(licenses) == 1 else None,
        base_model=base or None,
        datasets=sorted(set(sources)) or None,
        model_name=recipe.name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name="text held out of the training sources",
                metric_type=name,
                metric_value=round(value, 4),
            )
            for name, value in values.items()
        ]
        or None,
    )


def _origins(recipe: Recipe) -> Iterator[Origin]:
    """Yield the model that the student starts from, if it is on disk or the hub, and teachers."""
    teachers = {f"teacher `{name}`": one for name, one in recipe.teachers.items()}
    for role, options in {"student": recipe.student, **teachers}.items():
        paths, revision = options.paths(), plain(options).get("revision")
        if "model" in paths:
            yield _origin(role, paths["model"], revision)
        if "adapter" in paths:
            yield _origin(f"{role}, adapter", paths["adapter"], None)


def _origin(role: str, path: str, revision: str | None) -> Origin:
    try:
        folder = resolve_folder(path, where=role)
    except ModelError:  # deleted since the run
        return Origin(role, Path(path).name, is_hub=False)
    if folder is None:
        snapshot = _snapshot(path, revision)
        if snapshot is None:
            return Origin(role, path, True, revision)
        return Origin(role, path, True, snapshot.name, _license(snapshot))
    *_, owner, parent, name = folder.resolve().parts
    if parent == "snapshots" and owner.startswith("models--"):  # a folder of the cache of the hub
        hub_id = owner.removeprefix("models--").replace("--", "/", 1)
        return Origin(role, hub_id, True, name, _license(folder))
    return Origin(role, name, is_hub=False, license=_license(folder))


def _snapshot(hub_id: str, revision: str | None) -> Path | None:
    """Return the cached folder of a hub id, whose name is its commit. Uses no network."""
    from huggingface_hub import try_to_load_from_cache

    for name in (CONFIG, ADAPTER):
        file = try_to_load_from_cache(hub_id, name, revision=revision)
        if isinstance(file, str):
            return Path(file).parent
    return None


def _license(folder: Path) -> str | None:
    """Return the license that the card of a model states, None if it states none."""
    from huggingface_hub import ModelCard

    path = folder / CARD
    if not path.is_file():
        return None
    try:
        stated = ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    # A card is free text of somebody else: YAML, types and encodings fail in many ways.
    except Exception:
        return None
    return stated if isinstance(stated, str) and _LICENSE.fullmatch(stated) else None


def _origin_cells(origin: Origin) -> dict[str, str]:
    return {
        "role": origin.role,
        "model": _code(origin.path),
        "revision": _code(origin.revision) if origin.revision else MISSING,
        "license": origin.license or "not stated",
    }


def _source_cells(recipe: Recipe) -> Iterator[dict[str, str]]:
    for part, sources in recipe.data.sources.items():
        for source in sources:
            domain = _code(source.domain) if source.domain else MISSING
            yield {"part": part, "origin": _source(source), "domain": domain}


def _source(source: SourceOptions) -> str:
    if source.hub is None:
        return _code(source.url or _public(source.path))
    details = [source.name, f"split {source.split}", source.revision]
    return ", ".join([_code(source.hub), *(_code(text) for text in details if text)])


def _exports(run_folder: Path, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield the exports with the sentence that loads them."""
    for manifest in sorted(run_folder.glob(f"exports/*/{MANIFEST}")):
        folder = manifest.parent
        if names is not None and folder.name not in names:
            continue
        info = read_record(folder / "export.json", dict[str, Any]) or {}
        file = info.get("source", {}).get("file")
        place = f"exports/{folder.name}" + (f"/{file}" if isinstance(file, str) else "")
        tool = {".onnx": "onnxruntime.InferenceSession", ".gguf": "llama-cli -m"}
        call = tool.get(Path(place).suffix, "AutoModelForCausalLM.from_pretrained")
        text = f"{call} {place}" if call.endswith("-m") else f'{call}("{place}")'
        size = info.get("bytes") or sum(p.stat().st_size for p in folder.iterdir())
        yield {"name": folder.name, "num_bytes": size, "load": _code(text)}


def _has_template(student: Path) -> bool:
    if (student / "chat_template.jinja").is_file():
        return True
    file = student / "tokenizer_config.json"
    return file.is_file() and bool(read_json(file, where=str(student)).get("chat_template"))


def _public_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, without the places of this machine."""
    values = {key: value for key, value in plain(recipe).items() if key != "output_dir"}
    # The location of a cache has no effect on the student, and may be private.
    values["cache"] = {key: value for key, value in values["cache"].items() if key != "url"}
    stream = io.StringIO()
    yaml_writer().dump(_public(values), stream)
    return stream.getvalue().rstrip("\n")


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def _code(text: str) -> str:
    """Format as code in a cell of a Markdown table."""
    clean = " ".join(printable(text).split()).replace("`", "'")
    return f"`{clean}`".replace("|", "\\|")
