"""Memory of a run by stage and device, from the shapes of its models and batches.

Each stage has moments, such as the end of the forward pass and the optimizer step, and needs the
largest. A part that a stage reads for a block of rows, such as a shard of a cache, is not counted.

Shapes: B windows of T tokens, N rows of a batch, n rows of a block, V vocabulary, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from collegium.distributions import Answer, HiddenRows
from collegium.evaluate.scoring import BLOCK_ELEMENTS
from collegium.fusion.fuse import Fusion, Target, TargetUse, fuse
from collegium.fusion.weighting import SCALAR_BYTES
from collegium.losses.engine import AUTOGRAD_BYTES, default_block_size
from collegium.losses.pairing import feature_map
from collegium.losses.terms import has_closed_form
from collegium.models.footprint import Pass, count_pass
from collegium.models.forward import head_layer
from collegium.models.loading import choose_device, empty_model, saved_dtype
from collegium.models.lora import add_lora
from collegium.models.options import ModelOptions
from collegium.preflight.measure import logit_bytes
from collegium.run.context import RunContext
from collegium.storage.files import fingerprint
from collegium.train.objective import Objective
from collegium.types import Head, Rows

Parts = Mapping[str, int]
"""Name of a part -> bytes."""
Moment = Counter[tuple[str, str]]
"""(device, part) -> bytes at one time."""
FLOAT = 4
"""Bytes of float32, the type of all losses and of the gradient of the head."""
PLAIN_BUFFERS = 3
"""(n, V) float32 tensors alive at once where distributions are read in plain PyTorch."""
ENCODING_BUFFERS = 6
"""The same where they are also encoded for a cache."""


@dataclass(frozen=True)
class StageMemory:
    """The largest moment of one stage on one device."""

    stage: str
    device: str
    parts: Parts

    @property
    def num_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class ModelMemory:
    """Memory of a frozen model."""

    device: torch.device
    weights: int
    head: int
    """Of the layer that stays when the body is released, with a tied embedding."""
    dtype: torch.dtype
    width: int
    base: str
    """Models with the same one share their weights."""

    def states(self, num_rows: int) -> int:
        """Bytes of (N, D) hidden states."""
        return num_rows * self.width * self.dtype.itemsize


class MemoryPlan:
    """The memory of all stages of a run."""

    def __init__(self, context: RunContext) -> None:
        """Plan the stages that the recipe has."""
        self.context = context
        self._recipe = context.recipe
        self._length = context.recipe.data.max_length
        self._vocab_size = context.vocab_size

    @cached_property
    def stages(self) -> list[StageMemory]:
        """The largest moment of each stage on each device, in the order of a run."""
        recipe, planned = self._recipe, list[StageMemory]()
        if self.teachers and (recipe.fusion == "auto" or recipe.evaluate.controls):
            planned += _largest("preflight", self._preflight())
        if recipe.cache.enabled and recipe.cache.url is None:
            planned += _largest("cache", self._cache())
        planned += _largest("train", self._train())
        planned += _largest("evaluate", self._evaluate())
        return planned

    @cached_property
    def teachers(self) -> dict[str, ModelMemory]:
        """The teachers with a model in this process, by name."""
        options = self._recipe.teachers.items()
        return {
            name: _frozen(one, f"teachers.{name}")
            for name, one in options
            if isinstance(one, ModelOptions)
        }

    @cached_property
    def _device(self) -> torch.device:
        return choose_device(self.context.student.device)

    @cached_property
    def _student(self) -> tuple[int, int, int]:
        """Bytes of the student's weights, trained weights, and head."""
        student = self.context.student
        model = empty_model(student.load_config("student"), "student")
        size = getattr(torch, getattr(student, "dtype", "float32")).itemsize
        weights = sum(p.numel() for p in model.parameters()) * size
        head = head_layer(model).weight
        if student.lora is None:
            return weights, weights, head.numel() * size
        add_lora(model, student.lora, seed=0, where="student")
        # Adapters are float32 under weights of any type.
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * FLOAT
        return weights + trained, trained, head.numel() * size

    def _train(self) -> Iterator[Moment]:
        weights, trained, head = self._student
        device, options = str(self._device), self._recipe.train
        adapters = self._adapter_bytes()
        trained += adapters
        moments = 2 * trained if options.optim.startswith("adamw") else 0
        common = self._live_teachers() + Counter(
            {
                (device, "weights"): weights + adapters,
                (device, "optimizer"): moments,
                (device, "blocks"): self._block_bytes(),
            }
        )
        # The end of the forward pass, in which the gradient of the head is formed.
        gradients = trained if options.gradient_accumulation_steps > 1 else 0
        if self.context.student.lora is None:
            gradients += head
        yield (
            common
            + Counter(
                {(device, "activations"): self._pass().peak, (device, "gradients"): gradients}
            )
            + self._teacher_states(options.per_device_train_batch_size)
        )
        # The optimizer step, with the square root of the moments of one tensor at a time.
        root = head if moments else 0
        yield common + Counter({(device, "gradients"): trained, (device, "optimizer"): root})
        # A checkpoint, with clones of the moments, or a copy of the student with merged adapters
        # before. The gradients are freed by then.
        yield common + Counter({("cpu", "checkpoint"): moments})
        if self.context.student.lora is not None:
            yield common + Counter({(device, "checkpoint"): weights})
        # The saved student is loaded again: mapped files and weights exist at the same time.
        yield Counter({(device, "weights"): 2 * weights})

    def _pass(self) -> Pass:
        """Count the student's passes over one micro-batch, roughly if it cannot be run."""
        student, options = self.context.student, self._recipe.train
        config = student.load_config("student")
        shape = options.per_device_train_batch_size, self._length
        counted = count_pass(
            config,
            shape,
            dtype=getattr(student, "dtype", "float32"),
            device=torch.device(self._device.type),
            attention=student.attention,
            is_checkpointed=student.gradient_checkpointing or options.gradient_checkpointing,
            autocast=options.bf16,
        )
        if counted is None:
            text = config.get_text_config()
            # Per token and layer about 34 values of the width: arXiv 2205.05198, equation 1.
            size = 34 * FLOAT // 2 * shape[0] * shape[1] * text.hidden_size
            counted = Pass(size * text.num_hidden_layers, size * text.num_hidden_layers)
        rows = shape[0] * shape[1]
        width = config.get_text_config().hidden_size
        # The rows of the last layer and their gradient, in float32 whatever the model's type.
        return replace(counted, peak=counted.peak + 2 * FLOAT * rows * width)

    @property
    def _is_live(self) -> bool:
        """Whether teachers answer during training."""
        objective = self._recipe.objective
        is_read = objective.has_divergence or bool(objective.state_terms())
        return is_read and not self._recipe.cache.enabled

    def _live_teachers(self) -> Moment:
        # Adapters of one base share its weights.
        bases = {one.base: one for one in self.teachers.values()} if self._is_live else {}
        sizes = Moment()
        for one in bases.values():
            sizes[str(one.device), "teachers"] += one.weights
        return sizes

    def _teacher_states(self, batch_size: int) -> Moment:
        """Hidden states of the live teachers for one batch, which the blocks read."""
        states = Moment()
        for one in self.teachers.values() if self._is_live else ():
            states[str(one.device), "teachers"] += one.states(batch_size * self._length)
        return states

    def _adapter_bytes(self) -> int:
        """Bytes of the adapters of all terms on hidden states, (D, D') in float32 each."""
        context, total = self.context, 0
        widths = context.student_facts.tap_widths
        for _, term in self._recipe.objective.state_terms():
            for name, theirs in context.teacher_widths.items():
                if term.teacher_weight(name) > 0:
                    pairs = feature_map(term, list(widths), list(theirs))
                    total += sum(FLOAT * widths[ours] * theirs[tap] for ours, tap in pairs)
        return total

    def _block_bytes(self) -> int:
        """All (n, V) tensors of one block of the loss."""
        rows = self._recipe.train.per_device_train_batch_size * self._length
        options = self._recipe.objective
        target = self._target()
        objective = Objective(options, None)
        objective.start_step(0, self.context.num_steps)
        is_closed = target is None or has_closed_form(objective._divergences)
        per_logit = FLOAT if target is None else target.bytes_per_logit(FLOAT)
        per_logit = per_logit if is_closed else AUTOGRAD_BYTES
        size = options.block_size or default_block_size(
            self._vocab_size,
            self._device,
            num_rows=rows,
            bytes_per_logit=per_logit if is_closed else None,
            megabytes=options.block_megabytes,
        )
        return min(size, rows) * self._vocab_size * per_logit

    def _target(self) -> Target | None:
        """A target of one row and one token, with the buffers of the real one."""
        recipe = self._recipe
        if not recipe.objective.has_divergence or not self.teachers or recipe.cache.enabled:
            return None
        zero = torch.zeros(1, dtype=torch.long)
        rows = Rows(index=zero, labels=zero, documents=zero, samples=zero)
        fusion = recipe.fusion if isinstance(recipe.fusion, Fusion) else Fusion()
        answers = []
        for name, one in self.teachers.items():
            one_11 = torch.zeros(1, 1, dtype=one.dtype)
            answers.append(Answer(name, HiddenRows(one_11, Head(one_11, None))))
        return fuse(fusion, answers, rows, use=TargetUse(1.0, reads_logp=False))

    def _preflight(self) -> Iterator[Moment]:
        options = self._recipe.preflight
        yield from self._recordings(options.batch_size)
        number, memory = len(self.teachers), int(1e9 * options.memory)
        sizes = {
            ("cpu", "blocks"): logit_bytes(memory, number, options.max_tokens),
            ("cpu", "measurements"): SCALAR_BYTES * number * options.max_tokens,
        }
        yield self._heads() + Counter(sizes)

    def _cache(self) -> Iterator[Moment]:
        cache = self._recipe.cache
        device = str(choose_device("auto"))
        rows = cache.batch_size * self._length
        size = min(rows, default_block_size(self._vocab_size, torch.device(device)))
        blocks = {(device, "blocks"): ENCODING_BUFFERS * FLOAT * size * self._vocab_size}
        groups = [[one] for one in self.teachers.values()]
        if cache.kind == "fused":
            groups = [list(self.teachers.values())]
        for group in groups:
            moment = Counter(blocks)
            for one in group:
                moment[str(one.device), "teachers"] += one.weights
                moment[str(one.device), "teachers"] += one.states(rows)
            yield moment

    def _evaluate(self) -> Iterator[Moment]:
        weights, _, head = self._student
        recipe = self._recipe
        yield from self._recordings(recipe.evaluate.batch_size)
        # The student before and after training, and its controls.
        students = (2 + len(recipe.evaluate.controls)) * head
        rows = recipe.evaluate.batch_size * self._length
        elements = min(rows * self._vocab_size, BLOCK_ELEMENTS)
        moment = self._heads() + Counter({(str(self._device), "heads"): students})
        moment["cpu", "blocks"] += PLAIN_BUFFERS * FLOAT * elements
        yield moment
        # Mapped files and loaded weights exist at the same time.
        yield Counter({(str(self._device), "weights"): 2 * weights}) + self._heads()

    def _recordings(self, batch_size: int) -> Iterator[Moment]:
        """One teacher after the other reads all batches, and keeps its head."""
        kept = Moment()
        for one in self.teachers.values():
            device = str(one.device)
            # Mapped files and loaded weights exist at the same time.
            yield kept + Counter({(device, "teachers"): 2 * one.weights})
            kept[device, "heads"] += one.head

    def _heads(self) -> Moment:
        kept = Moment()
        for one in self.teachers.values():
            kept[str(one.device), "heads"] += one.head
        return kept


def _frozen(options: ModelOptions, where: str) -> ModelMemory:
    config = options.load_config(where)
    dtype = options.dtype
    if dtype == "auto":
        dtype = saved_dtype(options, where=where) or str(config.dtype or "float32")
    kind = getattr(torch, dtype.removeprefix("torch."))
    device = choose_device(options.device)
    model = empty_model(config, where).to(kind)
    head = head_layer(model).weight
    # Teachers with adapters of one base share it, unless each is rounded after merging.
    is_shared = options.adapter is not None and getattr(options, "quantize", None) is None
    base = fingerprint([options.model, options.revision, dtype, str(device)])
    return ModelMemory(
        device=device,
        weights=options.num_bytes(model, device, where),
        head=head.nbytes,
        dtype=kind,
        width=head.shape[1],
        base=base if is_shared else where,
    )


def _largest(stage: str, moments: Iterator[Moment]) -> list[StageMemory]:
    """Return the largest moment of a stage on each device."""
    largest: dict[str, StageMemory] = {}
    for moment in moments:
        for device in {device for device, _ in moment}:
            parts = {part: size for (at, part), size in moment.items() if at == device and size}
            planned = StageMemory(stage, device, parts)
            if device not in largest or planned.num_bytes > largest[device].num_bytes:
                largest[device] = planned
    return [one for one in largest.values() if one.num_bytes]
