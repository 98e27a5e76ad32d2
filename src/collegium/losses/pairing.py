"""Pairs of layers of the student and of a teacher for feature losses, and the options of these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from collegium.errors import RecipeError, nearest
from collegium.options import option


@option
class FeatureOptions:
    """Options of the feature losses. The adapters are not part of the student."""

    loss: Literal["mse", "cosine"] = "mse"
    """`mse` is the mean squared difference of RMS-normalized states, `cosine` is 1 - cos."""
    layers: Literal["uniform", "last"] | dict[str, str] = "uniform"
    """Paired layers: evenly spread, only the last ones, or tap of student -> tap of teacher."""
    num_layers: Annotated[int, Field(ge=1)] = 1
    """Number of pairs for `uniform`."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of all feature terms."""
    teacher_weights: dict[str, Annotated[float, Field(ge=0)]] = field(default_factory=dict)
    """Factor per teacher, default 1. A factor of 0 disables the term of a teacher."""
    dynamic_scale: bool = True
    """Scale each term by (distribution loss / feature term) of the previous optimizer step.

    `weight` is then relative to the distribution loss.
    """

    def teacher_weight(self, teacher: str) -> float:
        """Return the factor of one teacher's term, without its dynamic scale."""
        return self.weight * self.teacher_weights.get(teacher, 1.0)


def feature_map(
    options: FeatureOptions,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    origin: Mapping[str, str] | None = None,
) -> list[tuple[str, str]]:
    """Pair taps of the student with taps of one teacher.

    `uniform` with m pairs takes layers ceil(i L / m) of L for i = 1 ... m on both sides. The last
    layers are therefore always a pair. Layers are all tap names of a model, in order of depth.
    `origin` maps the layers of a student that was cut out of this teacher to those that they are
    copies of, which replace the teacher's layers in `uniform` and `last`.

    Raises:
        RecipeError: a named tap does not exist, or there are fewer layers than pairs.
    """
    # Few mappings on purpose: the choice hardly matters (arXiv 2502.04499).
    if isinstance(options.layers, dict):
        sides = ((options.layers, student_layers), (options.layers.values(), teacher_layers))
        for tap, taps in ((tap, taps) for names, taps in sides for tap in names):
            if tap not in taps:
                raise RecipeError(
                    f"features.layers: got `{tap}`; must be a tap of the model{nearest(tap, taps)}"
                )
        return list(options.layers.items())
    num_pairs = 1 if options.layers == "last" else options.num_layers
    ours = _spread(student_layers, num_pairs)
    theirs = [origin[tap] for tap in ours] if origin else _spread(teacher_layers, num_pairs)
    return list(zip(ours, theirs, strict=True))


def _spread(taps: Sequence[str], num_pairs: int) -> list[str]:
    """Select `num_pairs` evenly spaced layers, the last one included."""
    layers = [tap for tap in taps if tap.startswith("layer_")]
    if num_pairs > len(layers):
        raise RecipeError(
            f"features.num_layers: got {num_pairs}; must be at most {len(layers)}, "
            "the layers of the smallest model; lower it"
        )
    return [layers[math.ceil(i * len(layers) / num_pairs) - 1] for i in range(1, num_pairs + 1)]
