"""What the stages of one run share, each made when it is first asked for: tokenizer, data, teachers, students."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.cache.feature_store import FeatureCache
from collegium.cache.store import TargetCache
from collegium.console import quiet_libraries
from collegium.data.pack import Collator, PackedDataset, build_datasets
from collegium.losses.features import FeatureLoss, feature_map
from collegium.models import (
    count_parameters,
    probe,
    tap_names,
    tap_width,
    vocab_size_of,
    weights_digest,
)
from collegium.models.config import load_config
from collegium.models.loading import empty_model
from collegium.recipe import Recipe, dump_recipe, plain
from collegium.run_folder import RunFolder
from collegium.storage.files import fingerprint
from collegium.student import build_student, load_student_tokenizer, student_config
from collegium.teachers.cached import BatchKeys, CachedTargets, CachedTeacher
from collegium.teachers.local import LocalTeacher
from collegium.teachers.prefetch import PrefetchingCollator
from collegium.train.objective import Objective
from collegium.train.options import training_arguments
from collegium.variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collegium.train.trainer import DistillTrainer


class Workspace:
    """The parts of one run."""

    def __init__(self, recipe: Recipe) -> None:
        quiet_libraries()
        self.recipe = recipe
        self.folder = RunFolder(Path(recipe.output_dir))
        self.values: Mapping[str, Any] = plain(recipe)
        """The resolved recipe as plain data."""
        self._digests: dict[str, str] = {}

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as YAML."""
        return dump_recipe(self.recipe)

    def key(self, *sections: str) -> str:
        """Fingerprint of the named sections of the recipe and of the files behind them.

        A stage that was done with other weights or other text under the same path is not done.
        """
        return fingerprint(
            {section: [self.values[section], self._content(section)] for section in sections}
        )

    def _content(self, section: str) -> dict[str, str]:
        """Digests of what a section names: weights, and the windows that texts and tokenizer gave."""
        if section == "data":
            return {part: dataset.fingerprint for part, dataset in self.datasets.items()}
        if section == "teachers":
            return {
                name: self.digest(options.model) for name, options in self.recipe.teachers.items()
            }
        model = self.recipe.student.model if section == "student" else None
        return {} if model is None else {"student": self.digest(model)}

    def digest(self, model: str) -> str:
        """SHA-256 of a model's weights, read once."""
        if model not in self._digests:
            self._digests[model] = weights_digest(model)
        return self._digests[model]

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return load_student_tokenizer(self.recipe.student, where="student")

    @cached_property
    def vocab_size(self) -> int:
        """V: the largest token id + 1."""
        return vocab_size_of(self.tokenizer)

    @cached_property
    def datasets(self) -> dict[str, PackedDataset]:
        """`train`, `calibration` and `validation`, disjoint by document."""
        return build_datasets(
            self.recipe.data, self.tokenizer, where="data", teachers=list(self.recipe.teachers)
        )

    @cached_property
    def teachers(self) -> list[LocalTeacher]:
        """All teachers, loaded and probed, in the order of the recipe."""
        return [self.load_teacher(name) for name in self.recipe.teachers]

    def load_teacher(self, name: str) -> LocalTeacher:
        """One teacher, loaded and probed; it lives as long as the caller keeps it."""
        where = f"teachers.{name}"
        options = self.recipe.teachers[name]
        teacher = LocalTeacher.load(name, options, vocab_size=self.vocab_size, where=where)
        probe(teacher.model, vocab_size=self.vocab_size, where=where)
        return teacher

    @cached_property
    def kept_taps(self) -> dict[str, list[str]]:
        """The hidden states that the cache keeps of each teacher, by the pairs of the feature terms; none where it keeps none."""
        options, cache = self.recipe.objective.features, self.recipe.cache
        if options is None or cache.features is None:
            return {}
        student = empty_model(student_config(self.recipe.student, where="student"), "student")
        ours = tap_names(student)
        return {
            name: sorted({tap for _, tap in feature_map(options, ours, list(widths))})
            for name, widths in self.teacher_widths.items()
            if options.teacher_weight(name) > 0
        }

    @cached_property
    def teacher_widths(self) -> dict[str, dict[str, int]]:
        """The width of each tap of each teacher, from its config alone."""
        found = {}
        for name, options in self.recipe.teachers.items():
            where = f"teachers.{name}"
            found[name] = _tap_widths(empty_model(load_config(options, where=where), where))
        return found

    def new_student(self) -> PreTrainedModel:
        """The untrained student, probed: the same weights at every call."""
        student = build_student(self.recipe.student, seed=self.recipe.seed, where="student")
        probe(student, vocab_size=self.vocab_size, where="student")
        return student

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps of the student."""
        options = self.recipe.train
        if options.max_steps > 0:
            return options.max_steps
        batch = options.per_device_train_batch_size * options.gradient_accumulation_steps
        per_epoch = max(1, math.ceil(len(self.datasets["train"]) / batch))
        return math.ceil(per_epoch * options.num_train_epochs)

    @cached_property
    def compute_ratio(self) -> float:
        """Operations of a step with all teachers over those of a step without: 1 + sum_k 2 N_k / (6 N_S).

        A forward pass costs 2 operations per parameter and token, forward and backward together 6.
        """
        student = count_parameters(self.new_student())
        return 1 + sum(2 * teacher.num_parameters for teacher in self.teachers) / (6 * student)

    def trainer(
        self,
        variant: Variant,
        folder: Path,
        *,
        caches: Mapping[str, TargetCache] | None = None,
        features: Mapping[str, FeatureCache] | None = None,
    ) -> DistillTrainer:
        """The trainer of one student, writing to `folder`.

        Args:
            variant: which.
            folder: where.
            caches: what it reads instead of its teachers, by their names; a finished target under the name "".
            features: hidden states that go with these, by the names of the teachers that have some.
        """
        # imported late: it takes longer than a whole check
        from collegium.train.trainer import DistillTrainer

        student = self.new_student()
        dataset = self.datasets["train"]
        live = [] if caches else self.teachers_of(variant)
        features = features or {}
        stored, targets = self._cached(caches, features) if caches else ([], None)
        sources = [*stored, *([targets] if targets else [])]
        # Worker processes have their own memory and cannot prefetch for this one.
        is_ahead = bool(sources) and not self.recipe.train.dataloader_num_workers
        widths = {teacher.name: _tap_widths(teacher.model) for teacher in live}
        widths |= {name: self.teacher_widths[name] for name in caches or () if name in features}
        options = dataclasses.replace(
            self.recipe.train, max_steps=round(self.num_steps * variant.steps_factor)
        )
        return DistillTrainer(
            model=student,
            teachers=stored or live,
            targets=targets,
            data_collator=PrefetchingCollator(Collator(), sources) if is_ahead else None,
            args=training_arguments(
                options,
                output_dir=folder,
                seed=self.recipe.seed,
                on_cpu=student.device.type == "cpu",
            ),
            train_dataset=dataset,
            objective=self._objective(variant, student, widths),
            processing_class=self.tokenizer,
            identity={
                "variant": fingerprint(variant.identity()),
                **{
                    f"weights of {name}": self.digest(self.recipe.teachers[name].model)
                    for name in variant.teachers
                },
                **{f"cache {name}".rstrip(): one.digest for name, one in (caches or {}).items()},
                **{f"features {name}": one.digest for name, one in features.items()},
            },
        )

    def _cached(
        self, caches: Mapping[str, TargetCache], features: Mapping[str, FeatureCache]
    ) -> tuple[list[CachedTeacher], CachedTargets | None]:
        """Teachers out of a per-teacher cache, or the targets of a fused one."""
        documents = self.datasets["train"].sample_names
        if set(caches) == {""}:
            return [], CachedTargets(caches[""], documents)
        keys = BatchKeys(documents)
        return [
            CachedTeacher(name, cache, keys, features.get(name)) for name, cache in caches.items()
        ], None

    def teachers_of(self, variant: Variant) -> list[LocalTeacher]:
        """The teachers that a variant listens to; none is loaded for a variant without."""
        if not variant.teachers:
            return []
        return [teacher for teacher in self.teachers if teacher.name in variant.teachers]

    def _objective(
        self,
        variant: Variant,
        student: PreTrainedModel,
        teacher_widths: Mapping[str, Mapping[str, int]],
    ) -> Objective:
        options = variant.objective
        features = None
        if options.features is not None and teacher_widths:
            factors = {
                name: factor
                for name, factor in options.features.teacher_weights.items()
                if name in teacher_widths
            }
            features = FeatureLoss(
                dataclasses.replace(options.features, teacher_weights=factors),
                _tap_widths(student),
                teacher_widths,
                seed=self.recipe.seed,
            )
        return Objective(options, variant.fusion, features=features)


def _tap_widths(model: PreTrainedModel) -> dict[str, int]:
    """The width of each tap, in order of depth."""
    return {tap: tap_width(model, tap) for tap in tap_names(model)}
