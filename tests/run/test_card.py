"""The model card of a student, and its upload to a recorder in the place of the hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import fake_hub
from collegium.cli import app
from collegium.config.recipe import load_recipe
from collegium.errors import CollegiumError
from collegium.run import push as uploading
from collegium.run.artifacts import Card
from collegium.run.card import card_text, write_card
from collegium.run.context import RunContext
from collegium.run.push import plan_push, push
from collegium.storage.files import sha256_of
from collegium.storage.records import ExportInfo
from collegium.storage.stages import STAGES, damage, read_stages, sealed
from collegium.train import checkpoint
from export_cases import EQUAL
from finished_run import write_finished
from refusals import refused


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    write_finished(root)
    return root


@pytest.fixture
def run(zoo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo / "run", tmp_path / "run"))


class Recorder:
    """The calls that a push makes, as `HfApi` would answer them."""

    def __init__(self, *, is_private: bool = True, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.private = is_private
        self.error = error

    def create_repo(self, repo: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", (repo, options)))
        return f"hub:{repo}"

    def model_info(self, repo: str) -> Recorder:
        return self

    def create_commit(self, repo: str, operations: Any, *, commit_message: str) -> None:
        files = {one.path_in_repo: one.path_or_fileobj for one in operations}
        self.calls.append(("create_commit", (repo, files)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(uploading, "hub_api", lambda: recorder)
    return recorder


def add_export(run: Path, name: str, student: str | None = None) -> Path:
    """An export as `collegium export` leaves it: sealed, with the digest of its student."""
    digest = student or sha256_of(run / "student" / "MANIFEST.json")
    info = ExportInfo(
        name=name,
        student=digest,
        source={"file": "model.onnx"},
        versions={},
        bytes=5,
        verification=EQUAL,
    )

    def fill(folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"graph")
        (folder / "export.json").write_text(json.dumps(info.to_json()))

    checkpoint.write(run / "exports" / name, fill)
    return run / "exports" / name


def test_a_card_states_the_facts_of_the_run(zoo: Path, run: Path) -> None:
    (zoo / "scripture" / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    (zoo / "code" / "README.md").write_text("---\nlicense: [a, {b\n---\n")
    add_export(run, "onnx")
    text = card_text(run, repo="me/tiny")
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    metrics = {one.metric_type: one.metric_value for one in card.data.eval_results or ()}
    results = {row["kind"]: row for row in json.loads((run / "results.json").read_text())}
    assert metrics["perplexity"] == pytest.approx(results["student"]["perplexity"], abs=1e-4)
    # One teacher states none: the license of the student is open.
    assert card.data.license is None
    assert re.search(r"\| teacher `scripture` \| `scripture` \| – \| mit \|", text)
    assert re.search(r"\| teacher `code` \| `code` \| – \| not stated \|", text)
    assert 'from_pretrained("me/tiny")' in text
    assert "| train | `code.jsonl` |" in text
    assert "`uniform, linear`" in text
    assert "student (distilled)" in text
    assert "exports/onnx/model.onnx" in text
    assert "learning_rate: 0.01" in text
    # Paths name users and machines.
    assert str(zoo) not in text
    assert "output_dir" not in text
    (zoo / "code" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert ModelCard(card_text(run)).data.license == "mit"
    shutil.copy(zoo / "code" / "README.md", run / "student")  # not a card of ours
    assert write_card(run) == run / "student" / "README.md"
    assert ModelCard.load(run / "student" / "README.md").text.strip() == ""


def test_models_of_the_hub_have_their_commit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.write_models(tmp_path / "hub", ["Qwen/Qwen2.5-0.5B"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / fake_hub.COMMIT
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    scripture, code = (str(p) for p in re.findall(r"model: (/\S+)", text))
    text = text.replace(f"model: {scripture}\n", "model: Qwen/Qwen2.5-0.5B\n")
    recipe.write_text(text.replace(f"model: {code}\n", f"model: {snapshot}\n"))
    card = card_text(run)
    row = f"`Qwen/Qwen2.5-0.5B` | `{fake_hub.COMMIT}` | apache-2.0 |"
    assert f"| teacher `scripture` | {row}" in card
    assert f"| teacher `code` | {row}" in card


def test_the_card_breaks_no_digest_and_edits_survive(run: Path, zoo: Path) -> None:
    context = RunContext(load_recipe(run / "recipe.yaml", [f"output_dir={run}"]))
    path = Card(context).ensure()
    train = read_stages(run)[0]["train"]
    assert damage(run, train.files or {}) is None
    checkpoint.verify(run / "student")
    assert read_stages(run)[0].keys() == {"train", "evaluate"}
    first = path.read_text()
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("0.01", "0.02"))
    Card(context).ensure()
    assert path.read_text() != first  # written again, since nobody had edited it
    edited = path.read_text().replace("## Limits", "## Limits\n\n- For my use only.")
    path.write_text(edited)
    Card(context).ensure()
    assert path.read_text() == edited
    assert plan_push(run, "me/tiny")[0].source == edited.encode()
    shutil.rmtree(run / "student")
    assert write_card(run) is None


def test_a_secret_in_the_recipe_is_not_published(run: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("name: tiny", f"name: hf_{'a' * 30}"))
    with pytest.raises(CollegiumError) as error:
        card_text(run)
    assert "aaaa" not in str(error.value)


def test_push_uploads_listed_files_in_one_commit(run: Path, hub: Recorder) -> None:
    export = add_export(run, "onnx")
    add_export(run, "gguf-f16")
    (run / "student" / "notes.txt").write_text("private")
    uploads = plan_push(run, "me/tiny", ["onnx"])
    assert not hub.calls
    assert push("me/tiny", uploads) == "hub:me/tiny"
    (create, commit) = hub.calls
    assert create == ("create_repo", ("me/tiny", {"private": True, "exist_ok": True}))
    files = commit[1][1]
    student = {one.name for one in checkpoint.read_manifest(run / "student").files}
    expected = {*student, "MANIFEST.json", "README.md"}
    assert files.keys() == {
        *expected,
        *(f"exports/onnx/{name}" for name in ("model.onnx", "export.json", "MANIFEST.json")),
    }
    assert files["exports/onnx/model.onnx"] == str(export / "model.onnx")
    card = files["README.md"].decode()
    assert 'from_pretrained("me/tiny")' in card
    assert "exports/onnx" in card
    assert "gguf" not in card


def test_a_public_repository_needs_the_option(
    run: Path, hub: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private = False
    uploads = plan_push(run, "me/tiny")
    with refused(CollegiumError, "push: me/tiny"):
        push("me/tiny", uploads)
    assert [name for name, _ in hub.calls] == ["create_repo"]
    push("me/tiny", uploads, is_public=True)
    assert hub.calls[1][1][1] == {"private": False, "exist_ok": True}
    assert hub.calls[2][0] == "create_commit"
    # An error of the hub is one sentence, without the key that a URL may hold.
    hub.error = OSError("401 Unauthorized for user x")
    with refused(CollegiumError, "push: me/tiny: "):
        push("me/tiny", uploads)
    hub.error = OSError("no access to https://user:password@host/x")
    with pytest.raises(CollegiumError, match="OSError") as error:
        push("me/tiny", uploads)
    assert "password" not in str(error.value)


def test_unfinished_and_damaged_students_are_refused(run: Path, hub: Recorder) -> None:
    with refused(CollegiumError, "push: "):
        plan_push(run, "tiny")
    with refused(CollegiumError, "--export: "):
        plan_push(run, "me/tiny", ["onnx"])
    export = add_export(run, "onnx")
    (export / "model.onnx").write_bytes(b"grap")
    with refused(CollegiumError, "TMP/run/exports/onnx: "):
        plan_push(run, "me/tiny", ["onnx"])
    add_export(run, "old", student="0" * 64)
    with refused(CollegiumError, "TMP/run/exports/old: "):
        plan_push(run, "me/tiny", ["old"])
    student = run / "student"
    for file in ("model.safetensors", "MANIFEST.json"):
        data = (student / file).read_bytes()
        (student / file).write_bytes(data.replace(b"sha", b"shb") if file[0] == "M" else data[:-1])
        with pytest.raises(CollegiumError):
            plan_push(run, "me/tiny")
        (student / file).write_bytes(data)
    stages = read_stages(run)[0]
    running = stages["train"].model_copy(update={"status": "running", "files": None})
    for entry in (sealed("train", running), stages["train"].model_copy(update={"key": "other"})):
        (run / STAGES).write_text(json.dumps({"train": entry.to_json()}))
        with refused(CollegiumError, "TMP/run/student: "):
            plan_push(run, "me/tiny")
    (student / "MANIFEST.json").unlink()
    with refused(CollegiumError, "TMP/run: "):
        plan_push(run, "me/tiny")
    assert not hub.calls


def test_a_dry_run_lists_files_and_bytes_only(run: Path, hub: Recorder) -> None:
    result = CliRunner().invoke(app, ["push", str(run), "me/tiny", "--dry-run"])
    assert result.exit_code == 0, result.output
    size = (run / "student" / "model.safetensors").stat().st_size
    assert re.search(rf"model.safetensors +{size:,}", result.stdout)
    assert not hub.calls
    assert not (run / "student" / "README.md").exists()
    result = CliRunner().invoke(app, ["push", str(run), "me/tiny"])
    assert result.stdout.splitlines()[-1] == "uploaded: hub:me/tiny"
    assert [name for name, _ in hub.calls] == ["create_repo", "create_commit"]
