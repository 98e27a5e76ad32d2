"""The student as a draft model: counts against a naive loop, identical texts, and the record."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny
from collegium.cli import app
from collegium.errors import CollegiumError
from collegium.models.assisted import DraftedModel, DraftedText
from collegium.report.page import render_run
from collegium.report.run_files import read_run
from collegium.run.drafts import draft_row, run_draft
from collegium.storage.records import DraftResults
from collegium.storage.stages import STAGES, read_stages, sealed
from finished_run import TEACHERS, write_finished
from refusals import refused

V, STOP, NUM_DRAFTED, LIMIT = 60, 7, 3, 11
PROMPTS = ([9, 12, 30], [8, 11, 50, 23], [44, 45, 12, 9, 19])


def model(vocab_size: int = V, seed: int = 0, noise: float = 0.0, **config: Any) -> Any:
    """A random model without near ties; `noise` moves it a little."""
    one = tiny.tiny_model(vocab_size, seed=seed, eos_token_id=STOP, **config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    return one


def drafting(target: Any, draft: Any) -> DraftedModel:
    return DraftedModel(target, draft, vocab_size=V, num_drafted=NUM_DRAFTED, stops=[STOP])


def best(one: Any, ids: list[int]) -> int:
    with torch.no_grad():
        return int(one(torch.tensor([ids]), use_cache=False).logits[0, -1, :V].double().argmax())


def naive(target: Any, draft: Any, prompt: list[int]) -> tuple[list[int], int, int]:
    """New tokens, passes and drafted tokens of greedy speculative decoding, without any cache."""
    new: list[int] = []
    passes = drafted = 0
    while len(new) < LIMIT and STOP not in new:
        candidates: list[int] = []
        while len(candidates) < min(NUM_DRAFTED, LIMIT - len(new) - 1) and STOP not in candidates:
            candidates.append(best(draft, [*prompt, *new, *candidates]))
        passes, drafted = passes + 1, drafted + len(candidates)
        for candidate in [*candidates, None]:
            new.append(best(target, prompt + new))
            if new[-1] != candidate or new[-1] == STOP:
                break
    return new[:LIMIT], passes, drafted


@pytest.mark.parametrize(("noise", "padded"), [(0.0, V), (0.02, V), (0.5, V), (0.0, V + 5)])
def test_counts_and_texts_equal_a_naive_loop(noise: float, padded: int) -> None:
    """Also for a target whose vocabulary is padded: no drafted id is out of its range."""
    target, draft = model(padded), model(V, seed=0, noise=noise)
    if padded != V:
        # The same weights under all ids of the draft, and padding that would win.
        weights = draft.state_dict()
        for name, tensor in target.state_dict().items():
            tensor[: len(weights[name])] = weights[name]
            if len(tensor) == padded:
                tensor[V:] = 100.0
    reference = copy.deepcopy(draft)
    drafted = drafting(target, draft)
    tokens_per_pass = []
    for prompt in PROMPTS:
        ids, passes, read = naive(target, reference, list(prompt))
        plain = drafted.generate(prompt, LIMIT, is_drafted=False)
        text = drafted.generate(prompt, LIMIT, is_drafted=True)
        assert plain.ids == text.ids == ids
        assert (text.passes, text.drafted) == (passes, read)
        assert (plain.passes, plain.drafted, plain.accepted) == (len(ids), 0, 0)
        tokens_per_pass.append(len(ids) / passes)
        if noise == 0.0:  # the model drafts for itself
            assert passes == math.ceil(len(ids) / (NUM_DRAFTED + 1))
    if noise > 0.0:
        assert 1 <= min(tokens_per_pass) < NUM_DRAFTED


def test_a_row_sums_over_texts() -> None:
    plain = [DraftedText([1, 2, 3, 4], 1.0, 4, 0), DraftedText([5, 6], 0.5, 2, 0)]
    drafted = [DraftedText([1, 2, 3, 4], 0.4, 2, 4), DraftedText([5, 7], 0.1, 2, 6)]
    pairs = [(*pair, pair[0].seconds, pair[1].seconds) for pair in zip(plain, drafted, strict=True)]
    row = draft_row("code", pairs)
    assert (row.num_identical, row.drafted, row.accepted) == (1, 10, 2)
    assert row.accepted_share == 0.2
    assert row.tokens_per_pass == 6 / 4
    assert row.teacher_tokens_per_s == pytest.approx(6 / 1.5)
    assert row.tokens_per_s == pytest.approx(6 / 0.5)
    assert row.speedup == pytest.approx(3.0)
    # With two prompts the extremes of the bootstrap are those of a single prompt.
    np.testing.assert_allclose(np.array(row.accepted_interval, float), [0.0, 0.5])
    np.testing.assert_allclose(np.array(row.speedup_interval, float), [2.5, 5.0])


def test_a_family_without_a_cache_to_roll_back_gets_a_note() -> None:
    from collegium.errors import ModelError

    target, draft = model(model_type="mamba", state_size=4), model()
    with pytest.raises(ModelError, match=r"^mamba: transformers cannot draft for it"):
        drafting(target, draft).generate(PROMPTS[0], 4, is_drafted=True)


def test_a_run_is_measured_and_reported(tmp_path: Path) -> None:
    folder = write_finished(tmp_path)
    with refused(CollegiumError, "--teacher: "):
        run_draft(folder, teachers=["cod"])
    options = ["--prompts", "2", "--max-new-tokens", "6", "--drafted", "2"]
    result = CliRunner().invoke(app, ["draft", str(folder), *options])
    assert result.exit_code == 0, result.output
    files = read_run(folder)
    assert files.draft is not None
    assert [row.teacher for row in files.draft.rows] == list(TEACHERS)
    assert all(row.num_identical == 2 and row.speedup for row in files.draft.rows)
    assert (files.draft.num_prompts, files.draft.num_drafted) == (2, 2)
    assert "2 of 2" in result.stdout
    assert "Student as draft model: greedy, 2 tokens per pass" in render_run(files)
    stages, damaged = read_stages(folder)
    assert stages["draft"].status == "done"
    assert not damaged
    # Of another student: not shown.
    old = DraftResults.model_validate_json((folder / "draft.json").read_text())
    text = json.dumps(old.model_copy(update={"student": "0" * 64}).to_json())
    (folder / "draft.json").write_text(text)
    entries = {"train": stages["train"], "draft": stages["draft"].model_copy(update={"files": {}})}
    sealed_entries = {name: sealed(name, one).to_json() for name, one in entries.items()}
    (folder / STAGES).write_text(json.dumps(sealed_entries))
    assert read_run(folder).draft is None
