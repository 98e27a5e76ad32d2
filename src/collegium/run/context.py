"""Parts that the artifacts of one run share, each created on first use: data, tokenizer, models."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.cache.processes import Ranks
from collegium.config.recipe import Recipe, data_values, dump_recipe
from collegium.console import quiet_libraries
from collegium.data.corpus_folder import CorpusFolder
from collegium.data.pack import lay_out
from collegium.data.sources import SourceSummary
from collegium.data.windows import PackedDataset
from collegium.distributions import Teacher
from collegium.evaluate.scoring import Windows
from collegium.losses.pairing import feature_map
from collegium.models.loading import vocab_size_of
from collegium.models.options import ModelFacts
from collegium.models.probe import probe
from collegium.models.student import StudentOptions
from collegium.models.used_vocabulary import UsedStudent, UsedVocabulary
from collegium.options import plain
from collegium.run.folder import RunFolder
from collegium.run.processes import SINGLE, Processes
from collegium.teachers.local import LocalTeacher
from collegium.types import Batch
from collegium.vocabulary.used import check_can_be_cut, cut_tokenizer, kept_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCRATCH = ".scratch"
IMPORTANCE_TOKENS = 16_384
"""Tokens of the calibration split on which the importance of a teacher's parts is measured."""


class RunContext:
    """The parts of one run, and the owner of its teachers."""

    def __init__(self, recipe: Recipe, processes: Processes = SINGLE) -> None:
        quiet_libraries()
        self.recipe = recipe
        self.processes = processes
        self.folder = RunFolder(Path(recipe.output_dir))
        self.values: Mapping[str, Any] = plain(recipe)
        """The resolved recipe as plain data."""
        self._identities: dict[str, dict[str, Any]] = {}
        self._loaded: dict[str, Teacher] = {}
        self.reserved_ids: dict[int, str] = {}
        """Ids that mean another token in a teacher, which no text may contain, with its path."""
        self.sources: Sequence[SourceSummary] = ()
        """What was read from each source, once `datasets` was used."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the recipe only: another process makes its own parts from it."""
        return RunContext, (self.recipe,)

    @property
    def is_uncoordinated(self) -> bool:
        """Whether several processes build caches without communication."""
        return self.processes.is_single and not Ranks.from_environment().is_single

    def claim_folder(self) -> None:
        """Record the resolved recipe and the environment in the run folder."""
        self.folder.claim(self.values, dump_recipe(self.recipe))

    def record_recipe(self) -> None:
        """Record a recipe that describes the same run in other words."""
        self.folder.record(self.values, dump_recipe(self.recipe))

    def inputs(self, *sections: str) -> dict[str, Any]:
        """Return sections of the recipe with digests of the files behind them.

        An artifact made from other weights, or other text under the same path, is not up to date.
        """
        values = {**self.values, "data": data_values(self.values["data"])}
        # A limit of waiting and a place of work shape no artifact.
        values["train"] = {k: v for k, v in values["train"].items() if k != "ddp_timeout"}
        values["cache"] = {k: v for k, v in values["cache"].items() if k != "ray"}
        return {name: [values[name], self._content(name)] for name in sections}

    def _content(self, section: str) -> dict[str, Any]:
        if section == "data":
            return {part: dataset.fingerprint for part, dataset in self.datasets.items()}
        if section == "teachers":
            return {name: self.teacher_identity(name) for name in self.recipe.teachers}
        return self.student.content() if section == "student" else {}

    def teacher_identity(self, name: str) -> dict[str, Any]:
        """Return everything that the outputs of a teacher depend on. Its files are read once."""
        if name not in self._identities:
            self._identities[name] = self.recipe.teachers[name].identity()
        return self._identities[name]

    @cached_property
    def student(self) -> StudentOptions:
        """The student of the recipe, which may start from one of the teachers."""
        whole = self.whole_student
        return whole if self.recipe.student.vocabulary == "all" else self.with_used(whole)

    @cached_property
    def whole_student(self) -> StudentOptions:
        """The student with all tokens of its tokenizer."""
        return self.recipe.student.bind(self.recipe.teachers, self._calibration)

    def with_used(self, student: StudentOptions) -> StudentOptions:
        """Return a student with the tokens that the corpus uses."""
        return UsedStudent(student, lambda: self._used)

    def _calibration(self) -> Iterator[Batch]:
        # With all tokens, as the teacher that the student is cut out of.
        split, size = self.whole_datasets["calibration"], self.recipe.preflight.batch_size
        for batch, _, _ in Windows.spread(split, size, IMPORTANCE_TOKENS).batches():
            yield batch

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the student."""
        return self.whole_tokenizer if self.used is None else self.used.tokenizer

    @cached_property
    def whole_tokenizer(self) -> Any:
        """Tokenizer of the student with all tokens, whose ids its teachers have."""
        return self.whole_student.load_tokenizer("student")

    @property
    def used(self) -> UsedVocabulary | None:
        """The tokens that the student keeps, None for all."""
        return None if self.recipe.student.vocabulary == "all" else self._used

    @cached_property
    def _used(self) -> UsedVocabulary:
        tokenizer, where = self.whole_tokenizer, "student.vocabulary"
        check_can_be_cut(tokenizer, where=where)
        splits = self.whole_datasets.values()
        kept_U = kept_ids(tokenizer, {i for one in splits for i in (*one.token_ids(), *one.stops)})
        return UsedVocabulary(kept_U, cut_tokenizer(tokenizer, kept_U, where=where))

    @cached_property
    def vocab_size(self) -> int:
        """V: the largest token id + 1."""
        return vocab_size_of(self.tokenizer)

    @cached_property
    def datasets(self) -> dict[str, PackedDataset]:
        """`train`, `calibration` and `validation`, disjoint by document."""
        if self.used is None:
            return self.whole_datasets
        new_ids_V = self.used.new_ids()
        return {part: one.renumbered(new_ids_V) for part, one in self.whole_datasets.items()}

    @cached_property
    def whole_datasets(self) -> dict[str, PackedDataset]:
        """The same with the ids of the whole vocabulary."""
        data, names, corpus = self.recipe.data, list(self.recipe.teachers), self.corpus.open()
        self.sources = corpus.sources
        return lay_out(corpus, data, self.whole_tokenizer, where="data", teachers=names)

    @cached_property
    def corpus(self) -> CorpusFolder:
        """The tokens of all sources, on disk once they are encoded."""
        data, names = self.recipe.data, list(self.recipe.teachers)
        root = data.corpus or self.folder.path / "corpus"
        return CorpusFolder(data, self.whole_tokenizer, root, where="data", teachers=names)

    def teachers(self, names: Sequence[str], *, in_step: bool = False) -> list[Teacher]:
        """Load these teachers, keep those loaded before, and release all others.

        `in_step` is whether all processes score as many batches, as sharded teachers require.
        """
        self._loaded = {
            name: one
            for name, one in self._loaded.items()
            if name in names and (in_step or not _is_sharded(one))
        }
        self._loaded |= {n: self.load_teacher(n) for n in names if n not in self._loaded}
        return [self._loaded[name] for name in names]

    def take_teacher(self, name: str) -> Teacher:
        """Return one teacher that the caller owns: loaded before, or now."""
        loaded = self._loaded.pop(name, None)
        return self.load_teacher(name) if loaded is None or _is_sharded(loaded) else loaded

    def load_teacher(self, name: str) -> Teacher:
        """Load a teacher, probed on windows as those of the data."""
        where, size = f"teachers.{name}", self.vocab_size
        kept_U = None if self.used is None else self.used.kept_U
        options = self.recipe.teachers[name]
        teacher = options.load(name, vocab_size=size, kept_U=kept_U, where=where)
        if isinstance(teacher, LocalTeacher):
            data = self.recipe.data
            teacher.probe(where, packed=data.packing, max_length=data.max_length)
        return teacher

    def new_student(self) -> PreTrainedModel:
        """Return the untrained student, probed: the same weights at every call."""
        stops = self.datasets["train"].stops
        student = self.student.build(seed=self.recipe.seed, where="student", stops=stops)
        packed, longest = self.recipe.data.packing, self.recipe.data.max_length
        probe(
            student, vocab_size=self.vocab_size, where="student", packed=packed, max_length=longest
        )
        return student

    @contextmanager
    def scratch(self, name: str = SCRATCH) -> Iterator[Path]:
        """Yield a temporary folder inside the run folder, deleted afterwards."""
        path = self.scratch_folder(name)
        shutil.rmtree(path, ignore_errors=True)  # of a killed process
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def scratch_folder(self, name: str = SCRATCH) -> Path:
        """Return the path of a temporary folder, which one process creates and deletes."""
        return self.folder.path / name

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps of the student."""
        options = self.recipe.train
        if options.max_steps > 0:
            return options.max_steps
        batch = options.per_device_train_batch_size * options.gradient_accumulation_steps
        batch *= self.processes.world_size
        per_epoch = max(1, math.ceil(len(self.datasets["train"]) / batch))
        return math.ceil(per_epoch * options.num_train_epochs)

    @cached_property
    def compute_ratio(self) -> float:
        """Compute of a step with all teachers over that of a step without.

        1 + sum_k 2 N_k / (6 N_S): a forward pass costs 2 operations per parameter and token,
        forward and backward together 6 (arXiv 2001.08361, section 2.1).
        """
        known = (count for count in self.teacher_parameters.values() if count is not None)
        return 1 + 2 * sum(known) / (6 * self.student_facts.num_parameters)

    @cached_property
    def student_facts(self) -> ModelFacts:
        """Architecture of the student."""
        return self.student.facts("student")

    @property
    def teacher_parameters(self) -> dict[str, int | None]:
        """Number of parameters of each teacher, None where it has no model."""
        return {n: f and f.num_parameters for n, f in self.teacher_facts.items()}

    @property
    def teacher_widths(self) -> dict[str, Mapping[str, int]]:
        """Width of each tap of each teacher."""
        return {n: f.tap_widths if f else {} for n, f in self.teacher_facts.items()}

    @cached_property
    def teacher_facts(self) -> dict[str, ModelFacts | None]:
        """Architecture of each teacher, None where it has no model."""
        return {name: one.facts(f"teachers.{name}") for name, one in self.recipe.teachers.items()}

    @cached_property
    def kept_taps(self) -> dict[str, list[str]]:
        """The hidden states that the cache stores of each teacher, by the pairs of the terms."""
        if self.recipe.cache.features is None:
            return {}
        student_taps, origins = list(self.student_facts.tap_widths), self.student.origins()
        kept = dict[str, list[str]]()
        for _, term in self.recipe.objective.state_terms():
            for name, widths in self.teacher_widths.items():
                if term.teacher_weight(name) > 0:
                    pairs = feature_map(term, student_taps, list(widths), origin=origins.get(name))
                    kept[name] = sorted({*kept.get(name, []), *(tap for _, tap in pairs)})
        return kept


def _is_sharded(teacher: Teacher) -> bool:
    return isinstance(teacher, LocalTeacher) and teacher.is_sharded
