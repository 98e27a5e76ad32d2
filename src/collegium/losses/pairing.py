"""Options of the loss terms on inner states of the teachers, and the layers that they pair."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, replace
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from typing_extensions import Self

from collegium.errors import RecipeError, nearest
from collegium.losses.schedule import Term
from collegium.options import option

Layers = Literal["uniform", "last"] | dict[str, str]
Origins = Mapping[str, Mapping[str, str]]
"""Teacher -> layer of a student -> layer of the teacher that it is a copy of."""
NO_ORIGINS: Origins = MappingProxyType({})


@option
class StateTerm(Term):
    """One term per teacher on inner states of student and teacher."""

    section: ClassVar[str]
    """Its name in a recipe."""

    teachers: list[str] | None = None
    """Teachers that the term reads; null for all."""
    teacher_weights: dict[str, Annotated[float, Field(ge=0)]] = field(default_factory=dict)
    """Factor per teacher, default 1. A factor of 0 disables the term of a teacher."""
    dynamic_scale: bool = True
    """Scale each term by (distribution loss / term) of the previous optimizer step.

    `weight` is then relative to the distribution loss.
    """

    def teacher_weight(self, teacher: str) -> float:
        """Return the factor of one teacher's term, without its schedule and dynamic scale."""
        is_read = self.teachers is None or teacher in self.teachers
        return self.weight * self.teacher_weights.get(teacher, 1.0) if is_read else 0.0

    def named_teachers(self) -> Mapping[str, Collection[str]]:
        """Return the names of teachers in each option."""
        return {"teachers": self.teachers or (), "teacher_weights": self.teacher_weights}

    def limited_to(self, teachers: Collection[str]) -> Self:
        """Return the term without the options of other teachers."""
        weights = {name: x for name, x in self.teacher_weights.items() if name in teachers}
        named = None if self.teachers is None else [n for n in self.teachers if n in teachers]
        return replace(self, teacher_weights=weights, teachers=named)


@option
class LayerTerm(StateTerm):
    """A term on pairs of layers, the mean over the pairs."""

    layers: Layers = "uniform"
    """Paired layers: evenly spread, only the last ones, or tap of student -> tap of teacher."""
    num_layers: Annotated[int, Field(ge=1)] = 1
    """Number of pairs for `uniform`."""


@option
class FeatureOptions(LayerTerm):
    """Hidden states, adapted to the width of the teacher. The adapters are not in the student."""

    log_name: ClassVar[str] = "feature"
    section: ClassVar[str] = "features"

    loss: Literal["mse", "cosine", "raw_mse", "cka"] = "mse"
    """mse: mean squared difference of RMS-normalized states. cosine: 1 - cos.
    raw_mse: sum of squared differences of the states themselves, as in arXiv 2507.15198.
    cka: 1 - linear CKA over the rows of a micro-batch, without an adapter."""
    adapters: Literal["per_teacher", "shared"] = "per_teacher"
    """shared: one adapter for all teachers, into the width of the narrowest. Wider teachers are
    projected to it at random. A baseline: the terms then average unrelated spaces."""


@option
class EmbeddingOptions(StateTerm):
    """Input embeddings, adapted to the width of the teacher: a feature term on the tap `embed`.

    Source: TinyBERT, arXiv 1909.10351, with normalized states.
    """

    log_name: ClassVar[str] = "embedding"
    section: ClassVar[str] = "embeddings"
    layers: ClassVar[dict[str, str]] = {"embed": "embed"}
    adapters: ClassVar[str] = "per_teacher"
    num_layers: ClassVar[int] = 1

    loss: Literal["mse", "cosine"] = "mse"
    """`mse` is the mean squared difference of RMS-normalized states, `cosine` is 1 - cos."""


@option
class AttentionOptions(LayerTerm):
    """Attention of paired layers, per head, or the mean over heads where their numbers differ."""

    log_name: ClassVar[str] = "attention"
    section: ClassVar[str] = "attention"

    loss: Literal["mse", "kl"] = "mse"
    """`mse` compares scores before the softmax, `kl` the distributions, teacher to student."""


@option
class RelationOptions(LayerTerm):
    """Relations of queries, of keys and of values within a document."""

    log_name: ClassVar[str] = "relation"
    section: ClassVar[str] = "relations"

    layers: Layers = "last"
    """Paired layers: evenly spread, only the last ones, or tap of student -> tap of teacher."""
    relations: Annotated[list[Literal["query", "key", "value"]], Field(min_length=1)] = field(
        default_factory=lambda: ["query", "key", "value"]
    )
    """The vectors that are related."""
    num_heads: Annotated[int, Field(ge=1)] | None = None
    """Relation heads; null for the largest number that splits no attention head of either model."""


def feature_map(
    options: LayerTerm | EmbeddingOptions,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    *,
    origin: Mapping[str, str] | None = None,
    where: str = "features",
) -> list[tuple[str, str]]:
    """Pair taps of the student with taps of one teacher.

    `uniform` with m pairs takes layers ceil(i L / m) of L for i = 1 ... m on both sides. The last
    layers are therefore always a pair. Layers are all tap names of a model, in order of depth.
    `origin` maps the layers of a student that was cut out of this teacher to those that they are
    copies of, which replace the teacher's layers in `uniform` and `last`.

    Raises:
        RecipeError: a named tap does not exist, or there are fewer layers than pairs.
    """
    # Attention and relations belong to blocks, not to the states before or after all of them.
    if isinstance(options, AttentionOptions | RelationOptions):
        student_layers, teacher_layers = _blocks(student_layers), _blocks(teacher_layers)
    # Few mappings on purpose: the choice hardly matters (arXiv 2502.04499).
    if isinstance(options.layers, dict):
        sides = ((options.layers, student_layers), (options.layers.values(), teacher_layers))
        for tap, taps in ((tap, taps) for names, taps in sides for tap in names):
            if tap not in taps:
                raise RecipeError(
                    f"{where}.layers: got `{tap}`; must be a tap of the model{nearest(tap, taps)}"
                )
        return list(options.layers.items())
    num_pairs = 1 if options.layers == "last" else options.num_layers
    ours = _spread(_blocks(student_layers), num_pairs, where)
    theirs = (
        [origin[tap] for tap in ours]
        if origin
        else _spread(_blocks(teacher_layers), num_pairs, where)
    )
    return list(zip(ours, theirs, strict=True))


def _blocks(taps: Sequence[str]) -> list[str]:
    return [tap for tap in taps if tap.startswith("layer_")]


def _spread(layers: Sequence[str], num_pairs: int, where: str) -> list[str]:
    """Select `num_pairs` evenly spaced layers, the last one included."""
    if num_pairs > len(layers):
        raise RecipeError(
            f"{where}.num_layers: got {num_pairs}; must be at most {len(layers)}, "
            "the layers of the smallest model; lower it"
        )
    return [layers[math.ceil(i * len(layers) / num_pairs) - 1] for i in range(1, num_pairs + 1)]
