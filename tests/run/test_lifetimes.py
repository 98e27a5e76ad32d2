"""Models alive in each stage: those in use and at most one more."""

import gc
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_run
from collegium.config.recipe import Recipe, load_recipe
from collegium.models import forward
from collegium.run import pipeline
from collegium.run.folder import RunFolder

TEACHERS = 4
CONTROLS = "evaluate.controls=[ce_only, ce_only_equal_compute, best_single, uniform]"
SMALL = (
    "train.max_steps=1",
    "data.max_train_tokens=300",
    "data.max_validation_tokens=300",
    "preflight.candidates=standard",
)
PER_TEACHER = ("cache.enabled=true", "cache.kind=per_teacher")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_zoo(tmp_path_factory.mktemp("zoo"), teachers=TEACHERS)


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Largest number of models alive during a forward pass of each stage."""
    from transformers import PreTrainedModel

    # Reference counts must release the models: a full collection takes 0.3 s.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    gc.disable()

    alive: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
    found: dict[str, int] = defaultdict(int)
    running = ["check"]
    init, body, stage = PreTrainedModel.__init__, forward.body_of, RunFolder.stage

    def recording_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # The body of a model is itself a model, and not counted.
        if type(self).__name__.endswith("ForCausalLM"):
            alive.add(self)

    def counting_body(model: PreTrainedModel) -> torch.nn.Module:
        count = sum(one.device.type != "meta" for one in alive)
        found[running[-1]] = max(found[running[-1]], count)
        return body(model)

    def naming_stage(self: RunFolder, name: str, *key: Any) -> AbstractContextManager[None]:
        running.append(name)
        return stage(self, name, *key)

    monkeypatch.setattr(PreTrainedModel, "__init__", recording_init)
    monkeypatch.setattr(forward, "body_of", counting_body)
    monkeypatch.setattr(RunFolder, "stage", naming_stage)
    yield found
    gc.enable()


def _recipe(zoo: Path, output_dir: Path, *overrides: str) -> Recipe:
    file = output_dir.with_suffix(".yaml")
    file.write_text(tiny_run.recipe_text(zoo, teachers=TEACHERS), encoding="utf-8")
    return load_recipe(file, [f"output_dir={output_dir}", *SMALL, *overrides])


def test_a_cached_run_holds_one_model_at_a_time(
    zoo: Path, tmp_path: Path, peaks: dict[str, int]
) -> None:
    pipeline.run(_recipe(zoo, tmp_path / "run", CONTROLS, *PER_TEACHER))
    caches = {name for name in peaks if name.startswith("cache")}
    assert len(caches) == 2 * TEACHERS
    assert {"train", "control uniform", "evaluate"} <= set(peaks)
    # A check builds models on the meta device only. The student is probed once there is text.
    assert [peaks.pop(name, 0) for name in ("check", "corpus")] == [0, 1]
    assert dict(peaks) == dict.fromkeys(peaks, 1)


def test_a_live_run_holds_its_teachers_and_one_model(
    zoo: Path, tmp_path: Path, peaks: dict[str, int]
) -> None:
    pipeline.run(_recipe(zoo, tmp_path / "run", CONTROLS))
    in_use = {
        "preflight": 0,
        "train": TEACHERS,
        "control ce_only": 0,
        "control ce_only_equal_compute": 0,
        "control best_single": 1,
        "control uniform": TEACHERS,
    }
    for stage, count in in_use.items():
        assert peaks[stage] == count + 1, stage
    # The teachers of the last control are recorded first, and released one by one.
    assert peaks["evaluate"] == TEACHERS


def test_tasks_hold_one_model_besides_fused_teachers(
    zoo: Path, tmp_path: Path, peaks: dict[str, int]
) -> None:
    asked = "evaluate.generation={max_prompts: 2, prompt_tokens: 4, max_new_tokens: 2}"
    few = ("evaluate.controls=[ce_only]", asked)
    for rule, count in (("uniform", TEACHERS), ("min_ce", 1)):
        fusion = f"fusion={{weighting: {rule}}}"
        pipeline.run(_recipe(zoo, tmp_path / rule, fusion, *few, *PER_TEACHER))
        assert peaks.pop("generation") == count, rule
