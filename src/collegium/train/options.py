"""Options of a training run: the loss, and its length, batch size and optimizer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from collegium.distributions import Capability
from collegium.fusion.options import Fusion
from collegium.fusion.requirements import Requirement
from collegium.kernels.backends import Backend
from collegium.losses.divergences import DIVERGENCES, Divergence, ForwardKL
from collegium.losses.pairing import (
    AttentionOptions,
    EmbeddingOptions,
    FeatureOptions,
    LayerTerm,
    RelationOptions,
    StateTerm,
)
from collegium.losses.row_terms import CrossEntropyTerm, DivergenceTerm, RouterTerm
from collegium.losses.schedule import Term
from collegium.options import OneOf, option

if TYPE_CHECKING:
    from transformers import TrainingArguments

Scheduler = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr",
    "warmup_stable_decay",
]  # fmt: skip
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"]
METRIC = "nll"
"""Of an evaluation, in nats per token of the text. Unlike a loss it can be compared between
objectives, and between the stages of one."""
EARLY_STOPPING = ("early_stopping_patience", "early_stopping_threshold")


@option
class TrainOptions:
    """Length, batch size and optimizer of a run, named like Hugging Face training arguments."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4
    """Peak learning rate."""
    max_steps: int = -1
    """Optimizer steps. -1 trains for `num_train_epochs`."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training windows, ignored if `max_steps` is set."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Windows per micro-batch."""
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    """Windows per evaluation batch."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimizer step. The gradient does not depend on this split."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up in steps, or as a fraction of all steps if below 1."""
    lr_scheduler_type: Scheduler = "cosine"
    """Learning-rate schedule after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, not applied to biases, norms and adapters."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the student's gradients to this norm. 0 disables clipping."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the second moment."""
    optim: Optimizer = "adamw_torch"
    """Optimizer."""
    bf16: bool = False
    """Run the student's layers in bfloat16. Weights, head and losses keep their dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    logging_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between rows of log.jsonl. The last step is always logged."""
    save_steps: Annotated[int, Field(ge=1)] = 200
    """Steps between checkpoints. The last step always saves one."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints to keep, at least 2 so that a run survives a damaged one."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations on the validation split, for its curve. The last step is evaluated
    too. None evaluates after training only."""
    eval_max_tokens: Annotated[int, Field(ge=1)] | None = 20_000
    """Tokens of the validation split that such an evaluation reads, evenly spread. None reads
    all."""
    load_best_model_at_end: bool | None = None
    """Deploy the student of the evaluation with the lowest NLL, not that of the last step. By
    default only where `early_stopping_patience` is given."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many evaluations in a row that do not lower the NLL. None never stops."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Nats by which an evaluation must lower the NLL to count as better."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes that collate batches. 0 collates in the training process."""
    torch_compile: bool = False
    """Compile the student's layers."""
    ddp_timeout: Annotated[int, Field(ge=1)] = 1800
    """Seconds that a process waits for the others in a step, with several processes."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps: got {self.max_steps}; must be at least 1, "
                "or -1 to train for num_train_epochs"
            )
        if self.max_steps > 0 and self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps: got {self.warmup_steps:g}; must be at most max_steps "
                f"({self.max_steps}), or the peak learning rate is never reached"
            )
        if self.eval_steps is None and self.selects_checkpoint:
            name = "early_stopping_patience"
            name = "load_best_model_at_end" if getattr(self, name) is None else name
            raise ValueError(
                f"{name}: got {getattr(self, name)} without eval_steps; must go with evaluations "
                "during training; set eval_steps"
            )
        if self.early_stopping_patience is None and self.early_stopping_threshold > 0:
            raise ValueError(
                f"early_stopping_threshold: got {self.early_stopping_threshold:g} without "
                "early_stopping_patience; must go with it; set both, or neither"
            )
        return self

    @property
    def loads_best(self) -> bool:
        """Whether the student is that of the best evaluation."""
        if self.load_best_model_at_end is None:
            return self.early_stopping_patience is not None
        return self.load_best_model_at_end

    @property
    def selects_checkpoint(self) -> bool:
        """Whether evaluations choose the student or the length of its training."""
        return self.loads_best or self.early_stopping_patience is not None


TERMS: dict[str, type[Term]] = {
    "divergence": DivergenceTerm,
    "ce": CrossEntropyTerm,
    "features": FeatureOptions,
    "embeddings": EmbeddingOptions,
    "attention": AttentionOptions,
    "relations": RelationOptions,
    "router": RouterTerm,
}
"""Name in a recipe -> class."""
SHORT_FORM = {"kd_ratio": 0.9, "temperature": 1.0, "divergence": ForwardKL()}
"""Default objective, without `terms`."""


@dataclasses.dataclass(frozen=True)
class PlacedTerm:
    """A term of an objective."""

    key: str
    """Path of its options in a recipe."""
    name: str
    """Its name in the log, of which those of single teachers are made."""
    term: Term


@option
class ObjectiveOptions:
    """The loss of the student, as a list of terms or by the short form of the paper.

    `kd_ratio`, `temperature`, `divergence` and `features` stand for the terms `divergence` with the
    weight `kd_ratio`, `ce` with the weight 1 - `kd_ratio`, and `features`.
    """

    kd_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the fused target, 0.9 by default. The labels have the rest; 0 trains on labels."""
    temperature: float | None = None
    """Softens target and student, 1 by default. The divergence is multiplied by its square."""
    divergence: Annotated[Divergence, OneOf(DIVERGENCES)] | None = None
    """Divergence between fused target and student, `forward_kl` by default."""
    features: FeatureOptions | None = None
    """Feature terms on hidden states; null for none."""
    terms: Annotated[list[Annotated[Term, OneOf(TERMS)]], Field(min_length=1)] | None = None
    """All terms of the loss, in the place of the options above; null for these."""
    block_size: Annotated[int, Field(ge=1)] | None = None
    """Rows per block of logits; null fits `block_megabytes`. Changes speed and memory only."""
    block_megabytes: Annotated[int, Field(ge=1)] | None = None
    """Memory of one block of logits; null is 256 on a CPU and 1024 on a GPU."""
    backend: Backend = "auto"
    """Kernels for the arithmetic over the vocabulary. Changes speed only, up to rounding."""

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError(f"got {value:g}; must be > 0; for hard labels use kd_ratio: 0")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [name for name in (*SHORT_FORM, "features") if getattr(self, name) is not None]
        if self.terms is not None and given:
            raise ValueError(
                f"terms: got both terms and {', '.join(given)}; must be one of the two forms; give "
                "the options to the terms"
            )
        if sum(isinstance(term, RouterTerm) for term in self.terms or ()) > 1:
            raise ValueError("terms: got several `router` terms; must be one; leave one out")
        return self

    def __post_init__(self) -> None:
        for name, value in SHORT_FORM.items() if self.terms is None else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def placed_terms(self) -> list[PlacedTerm]:
        """Return all terms with a weight, of both forms."""
        placed: list[PlacedTerm] = []
        counts: Counter[str] = Counter()
        for key, term in self._keyed_terms():
            kind = term.log_name
            counts[kind] += 1
            name = kind if counts[kind] == 1 else f"{kind}_{counts[kind]}"
            placed.append(PlacedTerm(key, name, term))
        return [one for one in placed if one.term.weight > 0 or isinstance(one.term, RouterTerm)]

    def _keyed_terms(self) -> list[tuple[str, Term]]:
        if self.terms is not None:
            return [(f"objective.terms.{i}", term) for i, term in enumerate(self.terms)]
        assert self.kd_ratio is not None
        assert self.temperature is not None
        assert self.divergence is not None
        kd = DivergenceTerm(
            weight=self.kd_ratio, temperature=self.temperature, divergence=self.divergence
        )
        terms = [("objective", kd), ("objective", CrossEntropyTerm(weight=1 - self.kd_ratio))]
        return terms + ([("objective.features", self.features)] if self.features else [])

    @property
    def has_divergence(self) -> bool:
        """Whether a term reads the fused target."""
        return any(isinstance(one.term, DivergenceTerm) for one in self.placed_terms())

    def state_terms(self) -> list[tuple[str, LayerTerm | EmbeddingOptions]]:
        """Return the terms on inner states of teachers, and the paths of their options."""
        placed = ((one.key, one.term) for one in self.placed_terms())
        return [(k, term) for k, term in placed if isinstance(term, LayerTerm | EmbeddingOptions)]

    def labels_only(self) -> ObjectiveOptions:
        """Return cross-entropy on the labels, in blocks of the same size."""
        return dataclasses.replace(self, kd_ratio=0.0, features=None, terms=None)

    def continued(self, num_steps: int) -> ObjectiveOptions:
        """Return the objective for further training after `num_steps`, with constant weights.

        Those of the last step, without the terms on inner states: their adapters are not kept.
        """
        if self.terms is None:
            return dataclasses.replace(self, features=None)
        last = num_steps - 1, num_steps
        terms = [
            dataclasses.replace(term, weight=term.weight_at(*last), schedule=None)
            for term in self.terms
            if not isinstance(term, StateTerm) and term.weight_at(*last) > 0
        ]
        if not any(isinstance(term, CrossEntropyTerm | DivergenceTerm) for term in terms):
            return self.labels_only()
        return dataclasses.replace(self, terms=terms)

    def limited_to(self, teachers: Collection[str]) -> ObjectiveOptions:
        """Return the options without those of other teachers."""
        features = self.features and self.features.limited_to(teachers)
        terms = self.terms and [
            term.limited_to(teachers) if isinstance(term, StateTerm) else term
            for term in self.terms
        ]
        return dataclasses.replace(self, features=features, terms=terms)

    def requirements(self) -> list[Requirement]:
        """The requirements on the source of targets."""
        needs = []
        for key, term in ((one.key, one.term) for one in self.placed_terms()):
            if isinstance(term, StateTerm):
                is_hidden = isinstance(term, FeatureOptions | EmbeddingOptions)
                capability = Capability.FEATURES if is_hidden else Capability.ATTENTION
                value, teachers = f"{term.log_name} terms", term.teachers
                needs.append(Requirement(key, value, "omitted", capability, teachers=teachers))
            elif isinstance(term, DivergenceTerm):
                value, softness = type(term.divergence).__name__, f"{term.temperature:g}"
                if not term.divergence.allows_draws:
                    needed, key_of = Capability.LOGARITHMS, f"{key}.divergence"
                    if term.divergence.needs_all_tokens:
                        needed = Capability.ALL_TOKENS
                    needs.append(Requirement(key_of, value, "forward_kl", needed))
                if term.temperature != 1.0:
                    any_of, key_of = Capability.ANY_TEMPERATURE, f"{key}.temperature"
                    needs.append(Requirement(key_of, softness, "1", any_of))
        return needs

    def problems(self, fusion: Fusion) -> Iterator[str]:
        """Yield `key: problem` for each term that the conflict policy of a fusion excludes."""
        placed, policy = self.placed_terms(), type(fusion.conflict).__name__
        read = [(one.key, one.term) for one in placed if isinstance(one.term, DivergenceTerm)]
        for key, term in read:
            if fusion.conflict.yields_to_labels and term.domains is not None:
                yield (
                    f"{key}.domains: got some with fusion.conflict {policy}; must be omitted, "
                    "since it moves the weight of a row to its label; remove one of the two"
                )
        if fusion.conflict.corrects_target and len({term.temperature for _, term in read}) > 1:
            yield (
                f"{read[1][0]}.temperature: got several temperatures with fusion.conflict "
                f"{policy}; must be one, since the softened target is corrected; remove one of the "
                "two"
            )


def training_arguments(
    options: TrainOptions, *, output_dir: str | Path, seed: int, on_cpu: bool | None = None
) -> TrainingArguments:
    """Translate the options to transformers: no external reporting, no filtering, all seeded.

    The folder `output_dir` is for the log and the checkpoints, the seed for dropout and the data
    order. `on_cpu` None uses an accelerator if there is one.
    """
    import torch
    from transformers import TrainingArguments

    from collegium.train.arguments import adopt_arguments

    on_accelerator = torch.accelerator.is_available() if on_cpu is None else not on_cpu
    # Early stopping is a callback, see `train.selection`.
    elsewhere = ("eval_max_tokens", "load_best_model_at_end", *EARLY_STOPPING)
    named_alike = {k: v for k, v in dataclasses.asdict(options).items() if k not in elsewhere}
    is_checkpointed = named_alike.pop("gradient_checkpointing")
    arguments = TrainingArguments(
        **named_alike,
        output_dir=str(output_dir),
        seed=seed,
        use_cpu=not on_accelerator,
        dataloader_pin_memory=on_accelerator,
        report_to="none",
        disable_tqdm=True,
        log_level_replica="passive",  # "warning" would undo `quiet_libraries`
        logging_strategy="steps",
        save_strategy="steps",
        eval_strategy="no" if options.eval_steps is None else "steps",
        metric_for_best_model=METRIC if options.selects_checkpoint else None,
        greater_is_better=False if options.selects_checkpoint else None,
        restore_callback_states_from_checkpoint=options.selects_checkpoint,
    )
    # Set afterwards: transformers asks for save_steps in multiples of eval_steps, since it saves
    # no other evaluation. Ours that are the best so far are saved at any step.
    arguments.load_best_model_at_end = options.loads_best
    # Set afterwards: transformers 6 renames this argument, and both names are read here.
    arguments.gradient_checkpointing = arguments.activation_checkpointing = is_checkpointed
    adopt_arguments(arguments)
    return arguments
