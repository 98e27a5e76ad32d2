"""Texts that the models of a run generate for prompts of the user."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collegium.console import progress
from collegium.data.documents import Document, parse_rows
from collegium.data.encode import Encoder
from collegium.data.readers import SourceOptions, read_rows
from collegium.errors import CollegiumError, DataError, first_line
from collegium.evaluate.generation import Decoding, Prompt, generate
from collegium.evaluate.tasks import prompt_of
from collegium.models.saving import load_generation, stop_ids
from collegium.report.tables import Column, Line, Table
from collegium.run.inference import EXPORT, STUDENT, RunModels
from collegium.storage.files import write_text

Message = dict[str, Any]
WHERE = "prompts"
MAX_NEW_TOKENS = 256
"""Default limit of a text, where the models have as many positions."""


@dataclass(frozen=True)
class ModelTexts:
    """The texts of one model, one per prompt."""

    model: str
    texts: Sequence[str] = ()
    num_tokens: Sequence[int] = ()
    note: str | None = None
    """The reason why there are no texts."""


def read_prompts(file: Path) -> list[str | list[Message]]:
    """Read a prompt per line of a text file, or a row with `prompt` or `messages` of a data file.

    Raises:
        DataError: the file cannot be read, or a row has neither or both.
    """
    options = SourceOptions(path=str(file), text_column="prompt", split_on="line")
    prompts = []
    for number, row in read_rows(file, options, where="--file"):
        place = f"--file: {file.name}" + ("" if number is None else f":{number}")
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, dict):
            raise DataError(f"{place}: must be an object with `prompt` or `messages`")
        prompts.append(prompt_of(row, place))
    return prompts


def generate_texts(
    run_folder: Path,
    prompts: Sequence[str | list[Message]],
    *,
    models: Sequence[str] = (STUDENT,),
    is_raw: bool = False,
    max_new_tokens: int | None = None,
    decoding: Decoding | None = None,
) -> list[ModelTexts]:
    """Continue each prompt with models of a run, from the run folder only.

    A text is a message of the user where the student's tokenizer has a chat template, unless
    `is_raw`. Texts end at the stop tokens of the student and of the model. One model is in memory
    at a time, except for the fused target.

    Args:
        run_folder: a run whose student is trained.
        prompts: texts, or lists of messages that end with the user.
        models: names as in `RunModels.names`. Empty for all: those that cannot be used get a note.
        is_raw: continue texts as they are.
        max_new_tokens: limit of each text. Defaults to 256, or to the room in the models.
        decoding: greedy by default.

    Raises:
        CollegiumError: the run has no student, a name does not exist, or a model cannot be loaded.
        DataError: there is no prompt, or one cannot be encoded or is too long for a model.
    """
    run = RunModels(run_folder)
    chosen = [run.resolve(name) for name in models] or list(run.names.values())
    shown = {full: short for short, full in run.names.items()}
    encoded = _encode(run, prompts, is_raw, max_new_tokens)
    decoding = replace(decoding or Decoding(), stops=_student_stops(run))
    notes = dict[str, str]()
    limits = []
    for full in dict.fromkeys(chosen):
        try:
            run.check(full)
            limit = run.max_length(full)
            _check_lengths(encoded, limit, shown[full])
            limits += [] if limit is None else [limit]
        except CollegiumError as error:
            if models:
                raise
            notes[full] = first_line(error)
    if max_new_tokens is None:
        encoded = _limited(encoded, min(limits, default=None))
    return [
        ModelTexts(shown[full], note=notes[full])
        if full in notes
        else _generate(run, full, shown[full], encoded, decoding)
        for full in dict.fromkeys(chosen)
    ]


def _limited(prompts: Sequence[Prompt], max_length: int | None) -> list[Prompt]:
    """Set the limit of each text by default: all models have room for it."""
    rooms = [MAX_NEW_TOKENS if max_length is None else max_length - len(p.ids) for p in prompts]
    limits = [min(room, MAX_NEW_TOKENS) for room in rooms]
    return [replace(p, max_new_tokens=n) for p, n in zip(prompts, limits, strict=True)]


def _generate(
    run: RunModels, full: str, shown: str, prompts: Sequence[Prompt], decoding: Decoding
) -> ModelTexts:
    with progress(f"generate, {shown}") as advance:
        if full.startswith(EXPORT):
            decoding = replace(decoding, batch_size=1)
        texts = generate(run.load(full), prompts, decoding, advance)
    decoded = [run.tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]
    return ModelTexts(shown, decoded, [len(ids) for ids in texts])


def _encode(
    run: RunModels, prompts: Sequence[str | list[Message]], is_raw: bool, max_new_tokens: int | None
) -> list[Prompt]:
    if not prompts:
        raise DataError(f"{WHERE}: got none; must be at least one text, or a file of prompts")
    data = run.recipe.data
    encoder = Encoder(
        run.tokenizer,
        max_length=sys.maxsize,
        special_tokens=data.special_tokens,
        date=data.date,
        where=WHERE,
    )
    documents = _documents(prompts, _is_chat(run, is_raw))
    return [Prompt(tuple(encoder.prompt_ids(one)), max_new_tokens or 1) for one in documents]


def _is_chat(run: RunModels, is_raw: bool) -> bool:
    """Return whether a prompt that is a string is a message of the user."""
    return bool(run.tokenizer.chat_template) and not is_raw


def _documents(prompts: Sequence[str | list[Message]], is_chat: bool) -> Iterator[Document]:
    for number, prompt in enumerate(prompts, start=1):
        name = f"prompt {number}"
        if isinstance(prompt, str) and not is_chat:
            yield Document(name, "", prompt=prompt, completion="")
            continue
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if chat and chat[-1].get("role") == "assistant":
            raise DataError(
                f"{WHERE}: {name}: got a chat that ends with the assistant; must end with a "
                "message to answer; remove the last one"
            )
        # Rows of chats are complete: the answer is dropped once the row is checked.
        row = {"messages": [*chat, {"role": "assistant", "content": "-"}]}
        (document,) = parse_rows(
            [(None, row)], name, SourceOptions(path=name), domain="", where=WHERE
        )
        if isinstance(document, DataError):
            raise document
        assert document is not None
        assert document.messages is not None
        yield replace(document, messages=document.messages[:-1])


def _check_lengths(prompts: Sequence[Prompt], limit: int | None, model: str) -> None:
    for number, prompt in enumerate(prompts, start=1):
        total = len(prompt.ids) + prompt.max_new_tokens
        if limit is not None and total > limit:
            raise DataError(
                f"{WHERE}: prompt {number}: got {len(prompt.ids)} tokens and "
                f"{prompt.max_new_tokens} new ones; must be at most {limit}, the "
                f"max_position_embeddings of {model}; shorten it, or lower the limit of new tokens"
            )


def _student_stops(run: RunModels) -> frozenset[int]:
    """Return the ids at which the student was taught to stop."""
    taught = stop_ids(load_generation(run.student))
    return taught | {run.tokenizer.eos_token_id}


def save_texts(
    file: Path,
    run_folder: Path,
    prompts: Sequence[str | list[Message]],
    results: Sequence[ModelTexts],
    *,
    is_raw: bool = False,
) -> int:
    """Write the texts of `generate_texts` as training rows in JSON lines, and return their number.

    A text is the `completion` of its `prompt`, or the last of the `messages` of a chat. `model`
    names its model. Empty texts are left out, since nothing can be trained on them.
    """
    is_chat = _is_chat(RunModels(run_folder), is_raw)
    rows = []
    for one in results:
        for prompt, text in zip(prompts, one.texts or [""] * len(prompts), strict=True):
            if not text.strip():
                continue
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if isinstance(prompt, str) and not is_chat:
                row: dict[str, Any] = {"prompt": prompt, "completion": text}
            else:
                row = {"messages": [*chat, {"role": "assistant", "content": text}]}
            rows.append(json.dumps({**row, "model": one.model}, ensure_ascii=False) + "\n")
    write_text(file, "".join(rows))
    return len(rows)


def check_new(file: Path) -> None:
    """Raise CollegiumError unless a file of JSON lines can be written there."""
    if file.suffix.lower() != ".jsonl":
        raise CollegiumError(f"--save: got {file}; must end with .jsonl, the format of its rows")
    if file.exists():
        raise CollegiumError(f"--save: {file} already exists; must be new; delete it or rename it")


def text_tables(
    prompts: Sequence[str | list[Message]], results: Sequence[ModelTexts]
) -> list[Table[tuple[str, int | None]]]:
    """Return a table per prompt, with a line per model."""
    columns: list[Column[tuple[str, int | None]]] = [
        Column("Tokens", lambda cell: cell[1], lambda n: "" if n is None else str(n)),
        Column("Text", lambda cell: cell[0], str, is_text=True),
    ]
    tables = []
    for number, prompt in enumerate(prompts):
        title = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
        lines: list[Line[tuple[str, int | None]]] = [
            Line(one.model, (f"({one.note})", None))
            if one.note is not None
            else Line(one.model, (one.texts[number], one.num_tokens[number]))
            for one in results
        ]
        tables.append(Table(title, "Model", columns, lines))
    return tables
