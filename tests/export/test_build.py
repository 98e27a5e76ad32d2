"""Exports as folders: comparison with the student, bounds, damage, and exports of a run."""

from __future__ import annotations

import itertools
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from collegium.cli import app
from collegium.config.recipe import Recipe, load_recipe, recipe_hash
from collegium.errors import CollegiumError, DataError, ExportError
from collegium.export import build, foreign, process
from collegium.export.build import build_export, open_export
from collegium.export.fake_quantization import WeightGrid
from collegium.export.format import Bounds, HuggingFace
from collegium.export.formats import FORMATS, INT8
from collegium.export.options import FormatName, RecoverOptions
from collegium.export.texts import save_texts
from collegium.run import exports
from collegium.run.context import RunContext
from collegium.run.exports import Export, export_run, verify_exports
from collegium.storage.files import sha256_of
from collegium.storage.records import Verification
from collegium.train.checkpoint import replace
from evaluation_cases import id_dataset, text_dataset
from export_cases import EQUAL
from refusals import refused
from tiny_run import recipe_text, write_zoo


class Bigram:
    """A model whose logits depend only on the current token. Its state counts the tokens read."""

    def __init__(self, logits_VV: np.ndarray) -> None:
        self.table, self.vocab_size = logits_VV.astype(np.float32), logits_VV.shape[1]

    def logits(self, ids_BT: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
        return self.table[ids_BT], (state or 0) + ids_BT.shape[1]


def in_this_process(request: dict[str, Any], **_: Any) -> dict[str, Any]:
    return foreign.compare({**request, "threads": 1})


@pytest.fixture
def student(tmp_path: Path) -> Path:
    new = tiny.save_tiny(tmp_path / "new", chat=True)
    replace(new, tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    save_texts(text_dataset(), 1000, tmp_path / "texts.npz")
    return tmp_path / "texts.npz"


@dataclass(frozen=True, kw_only=True)
class Scaled(HuggingFace):
    """A format in two forms, of which the second one has more scales."""

    kl: float
    next_kl: float | None = None

    @property
    def finer(self) -> Scaled | None:
        return None if self.next_kl is None else Scaled(bounds=self.bounds, kl=self.next_kl)


@pytest.mark.parametrize(
    ("kl", "next_kl", "kept"),
    [(0.1, 0.5, 0.1), (0.9, 0.1, 0.1), (0.9, 0.8, "rejected"), (0.8, 0.9, "rejected")],
)
def test_more_scales_are_tried_beyond_a_bound(
    kl: float, next_kl: float, kept: Any, student: Path, tmp_path: Path, texts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    form = Scaled(bounds=Bounds(bits_per_byte=0.2), kl=kl, next_kl=next_kl)
    monkeypatch.setitem(cast(Any, FORMATS), "onnx-int8", form)

    def compare(form: Scaled, *_: Any, **__: Any) -> Verification:
        changed = {"kl": form.kl, "bits_per_byte": 1 + form.kl}
        return Verification.model_validate({**EQUAL.model_dump(), **changed}, strict=False)

    monkeypatch.setattr(build, "compare", compare)
    export = tmp_path / "exports" / "onnx-int8"
    export.parent.mkdir()
    write = lambda: build_export("onnx-int8", student, export, texts=texts, threads=1)  # noqa: E731
    if kept == "rejected":
        with refused(ExportError, "export onnx-int8: "):
            write()
        kept, export = min(kl, next_kl), export.parent / "rejected" / "onnx-int8"
    else:
        write()
    info = open_export(export)
    assert info.verification.kl == kept
    assert info.has_more_scales == (kept != kl)


def test_comparison_agrees_with_a_float64_reference(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(7, 7)) for _ in range(2))
    documents = [rng.integers(0, 7, size).tolist() for size in (9, 3, 14, 5)]
    save_texts(id_dataset(documents, ["a"] * 4, max_length=8), 1000, tmp_path / "x.npz")
    sums = foreign._compared(Bigram(ours), Bigram(theirs), dict(np.load(tmp_path / "x.npz")))
    pairs = [pair for ids in documents for pair in itertools.pairwise(ids)]
    ours, theirs = (table.astype(np.float32).astype(np.float64) for table in (ours, theirs))
    logp, logq = (table - np.log(np.exp(table).sum(1, keepdims=True)) for table in (ours, theirs))
    expected = {
        "tokens": len(pairs),
        "bytes": 2 * len(pairs),
        "nll": -sum(logp[a, b] for a, b in pairs),
        "export_nll": -sum(logq[a, b] for a, b in pairs),
        "kl": sum(float((np.exp(logp[a]) * (logp[a] - logq[a])).sum()) for a, _ in pairs),
        "same_top1": sum(ours[a].argmax() == theirs[a].argmax() for a, _ in pairs),
        "max": max(np.abs(ours[a] - theirs[a]).max() for a, _ in pairs),
        "sum": sum(float(np.abs(ours[a] - theirs[a]).sum()) for a, _ in pairs),
    }
    assert {key: sums[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_continuations_count_differing_texts_and_their_closest_call() -> None:
    ours = np.zeros((4, 4))
    ours[range(4), [1, 2, 3, 0]] = 1.0
    theirs = ours.copy()
    theirs[2] = [0, 2.0, 0, 0]  # 2 -> 1 instead of 3, by a gap of 1 of the student
    prompts = np.array([[0, 1], [3, 0]])
    answer = foreign._continuations(Bigram(ours), Bigram(theirs), prompts, 1)
    assert answer == {"num_prompts": 2, "differing_texts": 0.0, "tie_gap": 0.0}
    answer = foreign._continuations(Bigram(ours), Bigram(theirs), prompts, 2)
    assert answer == {"num_prompts": 2, "differing_texts": 0.5, "tie_gap": 1.0}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bits_per_byte": 1.02}, "bits per byte change by +0.0200 (bound 0.01)"),
        ({"bits_per_byte": 0.98}, "bits per byte change by -0.0200 (bound 0.01)"),
        ({"max_logit_difference": 0.3}, "the largest logit difference is 0.3 (bound 0.2)"),
        ({"max_logit_difference": math.nan}, "the logits are not finite"),
        ({"kl": None}, "the logits are not finite"),
        (
            {"differing_texts": 0.5, "tie_gap": 0.5},
            "50% of the greedy continuations differ, by a logit gap of 0.5",
        ),
        ({"differing_tokenizations": 0.25}, "25.0% of the texts are tokenized differently"),
        ({"same_chat_template": False}, "the chat template differs"),
        ({"same_eos": False}, "the eos token differs"),
    ],
)
def test_each_bound_is_named_with_its_number(change: dict[str, Any], problem: str) -> None:
    bounds = Bounds(bits_per_byte=0.01, logits=0.1)
    measured = Verification.model_validate({**EQUAL.model_dump(), **change}, strict=False)
    assert list(bounds.problems(EQUAL)) == []
    assert list(bounds.problems(measured)) == [problem]


def test_ties_and_quantized_formats_may_continue_otherwise() -> None:
    tied = EQUAL.model_copy(update={"differing_texts": 0.5, "tie_gap": 0.3})
    assert not list(Bounds(bits_per_byte=0.01, logits=0.1).problems(tied))
    far = EQUAL.model_copy(update={"max_logit_difference": 9.0, "tie_gap": 5.0})
    assert not list(Bounds(bits_per_byte=0.01).problems(far))


def test_a_process_without_our_package_verifies(student: Path, texts: Path, tmp_path: Path) -> None:
    build_export("hf", student, tmp_path / "exports" / "hf", texts=texts, threads=1)
    info = open_export(tmp_path / "exports" / "hf")
    assert info.verification.max_logit_difference == 0
    assert info.verification.num_tokens == text_dataset().num_target_tokens
    assert info.bytes == sum(
        path.stat().st_size for path in student.iterdir() if path.name != "MANIFEST.json"
    )
    assert info.versions.keys() == {"torch", "transformers"}
    for name in ("tokenizer.json", "model.safetensors"):
        exported = tmp_path / "exports" / "hf" / name
        assert exported.read_bytes() == (student / name).read_bytes()


def test_a_tool_that_cannot_load_the_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    request = {"task": "measure", "model": {"loader": "onnxruntime", "folder": "x", "file": "y"}}
    with refused(ExportError, "export x", volatile=r"\(exit code.*\)"):
        process.run_foreign(request, where="export x", threads=1)


def test_an_export_beyond_a_bound_is_kept_aside(
    student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = EQUAL.model_copy(update={"bits_per_byte": 1.5})
    monkeypatch.setattr(build, "compare", lambda *_, **__: far)
    target = tmp_path / "exports" / "hf"
    with refused(ExportError, "export hf"):
        build_export("hf", student, target, texts=texts, threads=1)
    assert not target.exists()
    kept = json.loads((tmp_path / "exports" / "rejected" / "hf" / "export.json").read_text())
    assert kept["verification"]["bits_per_byte"] == 1.5
    assert [path.name for path in target.parent.iterdir()] == ["rejected"]


def test_damage_is_refused_with_a_sentence(
    student: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "run_foreign", in_this_process)
    target = tmp_path / "exports" / "hf"
    build_export("hf", student, target, texts=texts, threads=1)
    weights = target / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
        weights.unlink() if damaged is None else weights.write_bytes(damaged)
        with refused(ExportError):
            open_export(target)
    weights.write_bytes(content)
    open_export(target)
    (target / "MANIFEST.json").unlink()
    with refused(ExportError):
        open_export(target)


def test_another_tokenizer_is_seen(student: Path, texts: Path, tmp_path: Path) -> None:
    other = tiny.save_tiny(tmp_path / "other")
    tiny.tiny_tokenizer(300).save_pretrained(other)
    answer = in_this_process(
        {
            "student": {"loader": "transformers", "folder": str(student)},
            "export": {"loader": "transformers", "folder": str(other)},
            "texts": str(texts),
            "new_tokens": 2,
        }
    )
    assert answer["differing_tokenizations"] > 0
    assert not answer["same_chat_template"]


def test_text_without_targets_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "export"):
        save_texts(id_dataset([[3]], ["a"]), 10, tmp_path / "x.npz")


def test_the_table_has_the_formats_of_a_recipe() -> None:
    assert {*FORMATS} == {*get_args(FormatName)}


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HuggingFace, "packages", ("no-such-package",))
    with refused(ExportError, "export.to: hf"):
        FORMATS["hf"].check(None, None, "export.to: hf")  # type: ignore[arg-type]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose run folder has a student that was not trained."""
    monkeypatch.setattr(build, "run_foreign", in_this_process)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(write_zoo(tmp_path)))
    replace(tiny.save_tiny(tmp_path / "run" / "new"), tmp_path / "run" / "student")
    return load_recipe(file)


def test_an_export_is_made_once_and_again_for_another_student(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(name: str, *args: Any, **options: Any) -> None:
        made.append(name)
        build_export(name, *args, **options)

    monkeypatch.setattr(exports, "build_export", counted)
    folder = recipe.output_dir / "exports" / "hf"
    first = export_run(recipe, ["hf"])["hf"]
    assert export_run(recipe, ["hf", "hf"])["hf"] == first
    assert verify_exports(recipe.output_dir) == {"hf": first}
    assert made == ["hf"]
    (folder / "config.json").write_text("{}")
    with pytest.raises(ExportError):
        verify_exports(recipe.output_dir)
    assert export_run(recipe, ["hf"])["hf"].student == first.student
    replace(tiny.save_tiny(tmp_path / "newer", seed=5), recipe.output_dir / "student")
    second = export_run(recipe, ["hf"])["hf"]
    assert made == ["hf"] * 3
    assert second.student != first.student
    previous = recipe.output_dir / "previous" / "1" / "exports" / "hf"
    assert open_export(previous).student == first.student


def test_what_cannot_be_exported_is_refused_at_the_start(recipe: Recipe, tmp_path: Path) -> None:
    with refused(ExportError, "--to"):
        export_run(recipe, ["onxx"])
    with refused(ExportError, "--to"):
        export_run(recipe)
    with refused(ExportError):
        verify_exports(recipe.output_dir)
    (recipe.output_dir / "student" / "MANIFEST.json").unlink()
    with refused(CollegiumError):
        export_run(recipe, ["hf"])
    assert not (recipe.output_dir / "exports").exists()


def test_exports_change_no_score_and_follow_the_evaluation(recipe: Recipe, tmp_path: Path) -> None:
    wanted = load_recipe(tmp_path / "recipe.yaml", ["export={to: [hf, gguf-f16]}"])
    assert recipe_hash(wanted) == recipe_hash(recipe)
    context = RunContext(wanted)
    artifacts = exports.exports(context)
    assert [one.name for one in artifacts] == ["export hf", "export gguf-f16"]
    assert not artifacts[0].is_done()
    assert isinstance(artifacts[0], Export)
    exports.check_exports(context)
    gpt2 = load_recipe(
        tmp_path / "recipe.yaml",
        ["export={to: [gguf-f16]}", "student.config={model_type: gpt2, n_embd: 8, n_head: 2}"],
    )
    with refused(ExportError, "export.to: gguf-f16"):
        exports.check_exports(RunContext(gpt2))


def test_the_command_prints_a_line_per_export(recipe: Recipe, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path / "recipe.yaml"), "--to", "hf"])
    assert result.exit_code == 0, result.output
    assert "exports/hf: " in result.output
    assert "bits per byte +0.0000" in result.output
    result = CliRunner().invoke(app, ["export", str(tmp_path / "recipe.yaml"), "--verify"])
    assert result.exit_code == 0, result.output


@dataclass
class Trained:
    """Stands for training: another student, and the calls for it."""

    folder: Path
    options: RecoverOptions
    learning_rate: float = 0.5
    calls: list[tuple[WeightGrid, str]] = field(default_factory=list)

    def train(self, grid: WeightGrid, name: str) -> Path:
        self.calls.append((grid, name))
        return self.folder


@pytest.mark.parametrize(
    ("before", "after", "bound", "is_trained", "is_kept"),
    [
        (1.03, 1.01, None, True, True),
        (1.03, 0.5, None, True, True),  # further training may make a better student
        (1.03, 1.04, None, True, False),
        (1.015, 1.00, None, False, False),  # within the bound of the format
        (1.015, 1.00, 0.01, True, True),
        (0.985, 0.98, 0.0, False, False),  # a rounded student that is better by chance
        (None, None, 0.0, False, False),  # text without bytes
    ],
)
def test_an_export_beyond_its_bound_is_trained_and_the_better_one_kept(
    before: float | None,
    after: float | None,
    bound: float | None,
    is_trained: bool,
    is_kept: bool,
    student: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = WeightGrid(bits=8)
    monkeypatch.setattr(HuggingFace, "grid", property(lambda _: grid))
    monkeypatch.setitem(cast(dict[str, Any], FORMATS), "hf", HuggingFace(bounds=INT8))
    results = iter([EQUAL.model_copy(update={"bits_per_byte": bits}) for bits in (before, after)])
    monkeypatch.setattr(build, "compare", lambda *_, **__: next(results))
    replace(tiny.save_tiny(tmp_path / "new2", seed=3), tmp_path / "trained")
    trained = Trained(tmp_path / "trained", RecoverOptions(steps=7, bits_per_byte=bound))
    target = tmp_path / "exports" / "hf"
    is_beyond = not is_kept and is_trained
    with refused(ExportError, "export hf") if is_beyond else nullcontext():
        build_export("hf", student, target, texts=texts, threads=1, recoverer=trained)
    assert trained.calls == [(grid, "hf")] * is_trained
    place = target.parent / "rejected" / "hf" if is_beyond else target
    source = trained.folder if is_kept else student
    assert (place / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    info = open_export(place)
    assert info.verification.bits_per_byte == (after if is_kept else before)
    assert info.student == sha256_of(student / "MANIFEST.json")
    if is_trained:
        assert info.recovery is not None
        steps, is_recorded = info.recovery.steps, info.recovery.is_kept
        assert (steps, is_recorded, info.recovery.learning_rate) == (7, is_kept, 0.5)
        bits = info.recovery.before.bits_per_byte, info.recovery.after.bits_per_byte
        assert bits == (before, after)
        assert info.recovery.bits_per_byte == (0.02 if bound is None else bound)
        assert f"{7} steps of recovery" in build.summary_lines(info)[1]
    else:
        assert info.recovery is None
        assert len(build.summary_lines(info)) == 1
    assert {path.name for path in target.parent.iterdir()} <= {"hf", "rejected"}
