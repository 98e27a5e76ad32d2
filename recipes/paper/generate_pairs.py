"""Text for DistiLLM-2 (arXiv 2503.07067): what teachers and student write after the same prompts.

    collegium study recipes/paper/table1.yaml
    python recipes/paper/generate_pairs.py runs/study/table1/runs/average-live-teachers_seed{0,1}
    collegium study recipes/paper/distillm2.yaml

The prompts are pieces of training documents, as many of each domain. The fused target and the
student of the run continue them, sampled at temperature 1. The held-out documents of the run are
copied, so that a student of these texts is evaluated on the same ones:

    runs/zoo/pairs/seedS/teachers.jsonl, student.jsonl    prompt and completion
    runs/zoo/pairs/seedS/validation/DOMAIN.jsonl          documents
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from collegium.data.corpus import flat_sources
from collegium.data.documents import Document
from collegium.data.sources import SourceSummary, read_documents
from collegium.evaluate.generation import Decoding
from collegium.run.context import RunContext
from collegium.run.folder import recipe_of
from collegium.run.texts import generate_texts, save_texts
from collegium.storage.files import write_text

ROOT = Path("runs") / "zoo" / "pairs"
MODELS = {"fused": "teachers", "student": "student"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, finished")
    parser.add_argument("--prompts", type=int, default=125, help="of each domain")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=92)
    options = parser.parse_args()
    for run in options.runs:
        context = RunContext(recipe_of(run))
        folder = ROOT / f"seed{context.recipe.seed}"
        lengths = options.prompt_tokens, options.new_tokens
        prompts = [*prompts_of(context, options.prompts, *lengths)]
        results = generate_texts(
            run,
            prompts,
            models=[*MODELS],
            is_raw=True,
            max_new_tokens=options.new_tokens,
            decoding=Decoding(temperature=1.0, seed=context.recipe.seed, batch_size=64),
        )
        for one in results:
            file = folder / f"{MODELS[one.model]}.jsonl"
            count = save_texts(file, run, prompts, [one], is_raw=True)
            print(f"{file}: {count} texts of {len(prompts)} prompts")
        copy_held_out(context, folder / "validation")


def prompts_of(
    context: RunContext, number: int, num_tokens: int, num_new_tokens: int
) -> Iterator[str]:
    """Yield pieces of the first training documents of each domain, a text apart."""
    layout = context.datasets["train"].layout
    documents = layout.documents[:]
    for domain in range(len(layout.domains)):
        places = (
            int(document["offset"]) + start
            for document in documents[documents["domain"] == domain]
            for start in range(0, int(document["size"]) - num_tokens, num_tokens + num_new_tokens)
        )
        for place in islice(places, number):
            ids = layout.tokens[place : place + num_tokens]["id"]
            yield context.tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def copy_held_out(context: RunContext, folder: Path) -> None:
    """Write the validation documents of a run, a file per domain."""
    held_out = {*context.datasets["validation"].sample_names}
    kept = dict[str, list[Document]]()
    for place, source in flat_sources(context.recipe.data, "data"):
        for one in read_documents(source, where=place, summary=SourceSummary(place)):
            if one.id in held_out:
                kept.setdefault(one.domain, []).append(one)
    assert sum(map(len, kept.values())) == len(held_out)
    for domain, documents in kept.items():
        rows = (json.dumps({"text": one.text}, ensure_ascii=False) + "\n" for one in documents)
        write_text(folder / f"{domain}.jsonl", "".join(rows))


if __name__ == "__main__":
    main()
