"""Demo: prepare text, tokenizer and teachers, then run one ordinary recipe on them.

    corpora ─▶ tokenizer ─▶ one specialist per domain (demo-teacher.yaml) ─▶ pipeline.run(demo.yaml)

Finished steps are skipped, so an interrupted demo resumes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from collegium.config.recipe import Recipe, load_recipe
from collegium.config.yaml import read_text, read_yaml
from collegium.console import say
from collegium.demo.corpora import CORPORA, write_corpus
from collegium.demo.tokenizer import train_tokenizer
from collegium.errors import RecipeError, nearest
from collegium.export.format import INSTALL
from collegium.export.formats import FORMATS
from collegium.run import pipeline
from collegium.run.controls import CONTROLS
from collegium.run.folder import RunFolder
from collegium.storage.files import fingerprint, write_text

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """Recipe, teachers and training length of one size of the demo."""

    name: str
    """Name of the recipe file beside this module, and of the run folder in `runs`."""
    vocab_size: int
    specialists: Mapping[str, Mapping[str, Any]]
    """Domain -> transformers config of its teacher. Width, depth or architecture differ."""
    max_steps: int


def llama_like(model_type: str, *, width: int, layers: int, heads: int) -> dict[str, Any]:
    """Return the transformers config of a small model of this type."""
    return {
        "model_type": model_type,
        "hidden_size": width,
        # 8/3 of the width, as in Llama (arXiv 2302.13971), rounded to a multiple of 16.
        "intermediate_size": round(width * 8 / 3 / 16) * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }


FULL = Plan(
    name="demo",
    vocab_size=4096,
    specialists={
        "scripture": llama_like("llama", width=160, layers=4, heads=4),
        "drama": llama_like("mistral", width=192, layers=3, heads=6),
        "encyclopedia": {
            "model_type": "gpt_neox",
            "hidden_size": 176,
            "intermediate_size": 704,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
        # Qwen3's config defaults to a `head_dim` of 128 at any width.
        "python": {**llama_like("qwen3", width=144, layers=5, heads=4), "head_dim": 36},
    },
    # 8 x 128 tokens per step at 4e-3: 4.77 nats against 5.06 with 16 x 128 (docs/log.md).
    max_steps=440,
)
QUICK = Plan(
    name="demo-quick",
    vocab_size=1024,
    specialists={
        "python": llama_like("llama", width=128, layers=2, heads=4),
        "reference": llama_like("mistral", width=96, layers=3, heads=4),
        "tables": {**llama_like("qwen3", width=112, layers=2, heads=4), "head_dim": 28},
    },
    max_steps=100,
)


def run_demo(
    *,
    quick: bool = False,
    output_dir: Path | None = None,
    seed: int = 0,
    controls: Sequence[str] | None = None,
) -> Path:
    """Run the demo and return its run folder.

    Args:
        quick: train three small teachers on text that comes with Python, without a package index.
        output_dir: run folder, overriding that of the recipe.
        seed: seed of teachers, student and data order. The corpora and their split are unaffected.
        controls: control students to train, overriding those of the recipe.

    Raises:
        CollegiumError: unknown control, or the folder cannot be used.
    """
    plan = QUICK if quick else FULL
    folder = output_dir or Path("runs") / plan.name
    for name in controls or ():
        if name not in CONTROLS:
            raise RecipeError(f"controls: got `{name}`; unknown control{nearest(name, CONTROLS)}")
    run = RunFolder(folder)
    # `text/` may be left over from another demo.
    run.check_place(also=["text"])
    run.make()
    prepare_text(run, plan)
    for domain, config in plan.specialists.items():
        teacher_dir = folder / "teachers" / domain
        recipe = write_teacher_recipe(plan, teacher_dir, config, seed=100 + seed)
        inputs = [domain, config, seed, plan.max_steps]
        train = partial(pipeline.train, recipe)
        ensure(run, f"teacher {domain}", inputs, teacher_dir / "student", train)
    # A textual replacement also moves the paths of text, tokenizer and teachers.
    values = read_values(HERE / f"{plan.name}.yaml", f"runs/{plan.name}", folder.as_posix())
    values |= {"output_dir": str(folder), "seed": seed}
    if controls is not None:
        values["evaluate"]["controls"] = list(controls)
    if "export" in values:
        values["export"]["to"] = installed_formats(values["export"]["to"])
    pipeline.run(write_recipe(folder / "recipes" / "student.yaml", values))
    return folder


def installed_formats(names: Sequence[str]) -> list[str]:
    """Return the formats whose packages are installed, and print a line for each other one."""
    missing = {name: FORMATS[name].missing_packages() for name in names}
    for name, packages in missing.items():
        if packages:
            say(f"export {name}: skipped, since {packages[0]} is not installed; run `{INSTALL}`")
    return [name for name in names if not missing[name]]


def ensure(
    run: RunFolder, stage: str, inputs: Any, output: Path, make: Callable[[], object]
) -> None:
    """Run a stage unless it has made its output folder from the same inputs."""
    key = fingerprint(inputs)
    if not run.is_done(stage, key) or not output.is_dir():
        with run.stage(stage, key):
            make()


def prepare_text(run: RunFolder, plan: Plan) -> None:
    """Prepare the text and tokenizer of a plan in `text/` and `tokenizer/`, unless they exist."""
    domains = list(plan.specialists)
    corpora = [run.path / "text" / f"{domain}.jsonl" for domain in domains]
    if not all(path.is_file() for path in corpora):
        with run.stage("text", fingerprint(domains)):
            for domain in domains:
                write_corpus(CORPORA[domain], run.path / "text")
    tokenizer = run.path / "tokenizer"
    train = partial(train_tokenizer, corpora, tokenizer, vocab_size=plan.vocab_size)
    ensure(run, "tokenizer", [domains, plan.vocab_size], tokenizer, train)


def write_teacher_recipe(
    plan: Plan,
    output_dir: Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    domains: Sequence[str] = (),
) -> Recipe:
    """Write the recipe that trains one teacher with plain cross-entropy.

    Args:
        plan: size of the demo.
        output_dir: run folder of the teacher, `FOLDER/GROUP/NAME`, where FOLDER has the `text` and
            `tokenizer`, and gets `recipes`.
        config: transformers config of the teacher.
        seed: seed of its weights and data order.
        domains: domains of its text, by default the one that it is named after.
    """
    folder, group, name = output_dir.parents[1], output_dir.parent.name, output_dir.name
    values = read_values(HERE / "demo-teacher.yaml", "runs/demo", folder.as_posix())
    values |= {"name": f"demo-teacher-{name}", "output_dir": output_dir.as_posix(), "seed": seed}
    values["student"]["config"] = dict(config)
    values["data"]["train"] = [
        {"path": str(folder / "text" / f"{domain}.jsonl"), "domain": domain}
        for domain in domains or (name,)
    ]
    values["train"]["max_steps"] = plan.max_steps
    return write_recipe(folder / "recipes" / f"{group}-{name}.yaml", values)


def read_values(path: Path, old: str, new: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file as plain data, with `old` replaced by `new` throughout its text.

    Raises:
        RecipeError: it cannot be read, is not a mapping, or an override does not fit.
    """
    document = read_yaml(read_text(path).replace(old, new), path.name, overrides)
    document.check()
    return document.data


def write_recipe(path: Path, values: Mapping[str, Any]) -> Recipe:
    """Write a recipe file unless it has this content already, and load it."""
    stream = io.StringIO()
    YAML(typ="safe").dump(dict(values), stream)
    text = stream.getvalue()
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return load_recipe(path)
