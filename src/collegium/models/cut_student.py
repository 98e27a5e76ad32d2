"""A student that starts as a part of a teacher: some of its layers, or a narrower copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from collegium.errors import ModelError, nearest
from collegium.models import cut, folder, forward, loading, saving
from collegium.models.cut import Cut, Width
from collegium.models.identity import model_identity
from collegium.models.importance import Importance, largest, measure
from collegium.models.lora import LoraOptions, add_lora
from collegium.models.options import Attention, Device, ModelOptions
from collegium.models.student import (
    Calibration,
    StudentKind,
    StudentOptions,
    TrainedDType,
    Vocabulary,
    check_rows,
    require_floats,
    with_eos,
)
from collegium.options import option, torch
from collegium.storage.files import fingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerFast as Tokenizer

RULES = ("first_and_last", "by_importance")
Count = Annotated[int, Field(ge=1)]


@option
class LayerCut:
    """Layers of a teacher, copied with its embeddings, final norm and head."""

    teacher: str
    """Name of the teacher."""
    keep: Count | list[Annotated[int, Field(ge=0)]] | str
    """Number of layers, evenly spread with the first and the last one. Or the ascending numbers of
    the layers, from 0. Or a rule for `num_layers`: the first and last ones without the middle, or
    those that change their input most on calibration text: `first_and_last`, `by_importance`."""
    num_layers: Count | None = None
    """Number of layers of `first_and_last` and `by_importance`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.keep == [] or (isinstance(self.keep, str) and self.keep not in RULES):
            raise ValueError(
                f"keep: got {self.keep}; must be a number of layers, a list of their numbers, "
                f"{' or '.join(f'`{rule}`' for rule in RULES)}"
            )
        if isinstance(self.keep, str) != (self.num_layers is not None):
            raise ValueError(
                f"num_layers: got {self.num_layers or 'none'} with keep {self.keep}; must be a "
                "number with `first_and_last` and `by_importance`, and omitted otherwise"
            )
        if isinstance(self.keep, list) and self.keep != sorted(set(self.keep)):
            raise ValueError(f"keep: got {self.keep}; must be ascending, each layer once; sort it")
        return self

    def count(self) -> int:
        """Return the number of kept layers."""
        if isinstance(self.keep, list):
            return len(self.keep)
        return self.keep if isinstance(self.keep, int) else self.num_layers or 0

    def layers(self, total: int, importance: Importance | None) -> list[int]:
        """Return the kept ones of `total` layers. Without importances, `by_importance` is even."""
        count = self.count()
        if isinstance(self.keep, list):
            return self.keep
        if self.keep == "first_and_last":
            return [*range((count + 1) // 2), *range(total - count // 2, total)]
        if self.keep == "by_importance" and importance is not None:
            return largest(importance.layers, count).tolist()
        gaps = max(1, count - 1)
        return [(i * (total - 1) + gaps // 2) // gaps for i in range(count)]


@option
class WidthCut:
    """Sizes of a narrower copy of a teacher, whose most active parts are kept.

    All layers have the same sizes. Which parts they keep is measured on calibration text.

    Source: Minitron, arXiv 2407.14679.
    """

    teacher: str
    """Name of the teacher."""
    hidden_size: Count | None = None
    """Channels of the hidden states. Defaults to all."""
    ffn: Count | None = None
    """Units of the FFN of each layer. Defaults to all."""
    heads: Count | None = None
    """Query heads of each layer, in whole groups that share keys and values. Defaults to all."""

    @model_validator(mode="after")
    def _cuts(self) -> Self:
        if self.hidden_size is self.ffn is self.heads is None:
            raise ValueError(
                "hidden_size: got none of hidden_size, ffn and heads; set at least one"
            )
        return self


@option
class CutStudent(StudentKind):
    """A student cut out of a teacher in depth, in width, or in both.

    It has the tokenizer of the teacher. Keeping everything gives the teacher itself, bit for bit.
    """

    from_layers: LayerCut | None = None
    """Depth: the layers to keep. Defaults to all."""
    from_width: WidthCut | None = None
    """Width: the sizes to keep, for llama, mistral, qwen2 and qwen3. Defaults to all."""
    dtype: TrainedDType = "float32"
    """Data type of the trained weights."""
    device: Device = "auto"
    """`auto` is the first CUDA device, else MPS, else the CPU."""
    attention: Attention = "auto"
    """`auto` is `sdpa` if the model supports it, else `eager`."""
    lora: LoraOptions | None = None
    """Train low-rank adapters only."""
    vocabulary: Vocabulary = "all"
    """`used` cuts the tokens that the corpus never uses out of embedding, head and tokenizer."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass to save memory."""

    def _cuts(self) -> dict[str, LayerCut | WidthCut]:
        cuts = {"from_layers": self.from_layers, "from_width": self.from_width}
        return {key: part for key, part in cuts.items() if part is not None}

    def problems(self, teachers: Mapping[str, Any]) -> Iterator[str]:
        names = {f"student.{key}.teacher": part.teacher for key, part in self._cuts().items()}
        for key, name in names.items():
            if name not in teachers:
                yield f"{key}: got `{name}`; must be a teacher{nearest(name, teachers)}"
            elif not isinstance(teachers[name], ModelOptions):
                yield f"{key}: got `{name}`; must be a teacher with a model of its own"
        if len(set(names.values())) > 1:
            one, other = names.values()
            yield f"student.from_width.teacher: got `{other}`; must be `{one}`, as in from_layers"

    def bind(self, teachers: Mapping[str, Any], calibration: Calibration) -> StudentOptions:
        name = next(part.teacher for part in self._cuts().values())
        teacher = teachers[name]
        source = ModelOptions(
            model=teacher.model,
            revision=teacher.revision,
            adapter=teacher.adapter,
            tokenizer=teacher.tokenizer,
            trust_remote_code=teacher.trust_remote_code,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
        )
        return BoundCut(self, name, source, calibration)


@dataclass(frozen=True)
class BoundCut(StudentOptions):
    """A student to cut out of the teacher that its options name."""

    options: CutStudent
    teacher: str
    source: ModelOptions
    calibration: Calibration

    @property
    def device(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.options.device

    @property
    def attention(self) -> Attention:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.options.attention

    @property
    def gradient_checkpointing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.options.gradient_checkpointing

    @property
    def lora(self) -> LoraOptions | None:
        return self.options.lora

    @property
    def dtype(self) -> TrainedDType:
        """Data type of the trained weights."""
        return self.options.dtype

    def paths(self) -> dict[str, str]:
        return {}  # those of the teacher

    def check(self, where: str) -> None:
        folder.check_device(self.device, self.attention, where=where)
        if self.source.runs_code(where):
            raise ModelError(
                f"{where}: teacher `{self.teacher}` runs code of its own; must be of a type in "
                "transformers; start from a whole model with `model`"
            )
        require_floats(self.source, where=f"{where}: teacher `{self.teacher}`")
        config = self.source.load_config(where)
        self._check_sizes(config.get_text_config(), where)
        model = cut.check_cut(config, self._cut(config, None), where=where)
        saving.check_saving(model, where=where)
        if self.lora is not None:
            add_lora(model, self.lora, seed=0, where=where)
        rows = forward.input_layer(model).num_embeddings
        check_rows(rows, self.load_tokenizer(where), where=where)

    def _check_sizes(self, config: PretrainedConfig, where: str) -> None:
        layers, width = self.options.from_layers, self.options.from_width
        total = config.num_hidden_layers
        if layers is not None and layers.count() > total:
            key = "keep" if layers.num_layers is None else "num_layers"
            raise self._size_error(f"{where}.from_layers.{key}", layers.count(), total, "layers")
        if layers is not None and (last := layers.layers(total, None)[-1]) >= total:
            raise self._size_error(f"{where}.from_layers.keep", last, total - 1, "last layer")
        if width is None:
            return
        if config.model_type not in cut.WIDTH_TYPES:
            raise ModelError(
                f"{where}.from_width: got a teacher of type {config.model_type}; must be one of "
                f"{', '.join(cut.WIDTH_TYPES)}; cut its layers with from_layers"
            )
        heads = config.num_attention_heads
        sizes = {"hidden_size": config.hidden_size, "ffn": config.intermediate_size, "heads": heads}
        for key, size in sizes.items():
            if (getattr(width, key) or 0) > size:
                given = getattr(width, key)
                raise self._size_error(f"{where}.from_width.{key}", given, size, key)
        group = heads // config.num_key_value_heads
        if (width.heads or 0) % group:
            raise ModelError(
                f"{where}.from_width.heads: got {width.heads}; must be a multiple of {group}, the "
                f"heads of teacher `{self.teacher}` that share keys and values"
            )
        kept = {key: getattr(width, key) or size for key, size in sizes.items()}
        if kept["hidden_size"] % kept["heads"]:
            # Llama configs refuse it, although the size of a head is a key of its own.
            raise ModelError(
                f"{where}.from_width.hidden_size: got {kept['hidden_size']}; must be a multiple of "
                f"{kept['heads']}, the number of heads"
            )

    def _size_error(self, key: str, given: int, limit: int, noun: str) -> ModelError:
        return ModelError(
            f"{key}: got {given}; must be at most {limit}, the {noun} of teacher `{self.teacher}`"
        )

    def _cut(self, config: PretrainedConfig, importance: Importance | None) -> Cut:
        """Return the parts to keep. Without importances their sizes are right, not their choice."""
        part, layers, width = config.get_text_config(), self.options.from_layers, None
        kept = list(range(part.num_hidden_layers))
        if layers is not None:
            kept = layers.layers(part.num_hidden_layers, importance)
        if self.options.from_width is not None:
            width = _width(self.options.from_width, part, kept, importance)
        return Cut(kept, width)

    @property
    def needs_importance(self) -> bool:
        layers = self.options.from_layers
        return layers is not None and layers.keep == "by_importance"

    @cached_property
    def _importance(self) -> Importance | None:
        if self.options.from_width is None and not self.needs_importance:
            return None
        model = loading.load_model(self.source, where="student")
        return measure(model, self.calibration(), width=self.options.from_width is not None)

    def warnings(self, where: str) -> list[str]:
        return saving.generation_notes(self.source, where=where)

    def content(self) -> dict[str, str]:
        return {"student": fingerprint(model_identity(self.source))}

    def load_tokenizer(self, where: str) -> Tokenizer:
        return with_eos(self.source.load_tokenizer(where), self.source.tokenizer_path, where)

    def load_config(self, where: str) -> PretrainedConfig:
        config = self.source.load_config(where)
        return self._cut(config, None).config(config)

    def origins(self) -> dict[str, dict[str, str]]:
        importance = self._importance if self.needs_importance else None
        kept = self._cut(self.source.load_config("student"), importance).layers
        return {self.teacher: {f"layer_{i}": f"layer_{layer}" for i, layer in enumerate(kept)}}

    def _initial_model(self, *, seed: int, where: str) -> PreTrainedModel:
        importance = self._importance  # first: it loads the teacher, too
        teacher = loading.load_model(self.source, where=where)
        return cut.cut_model(teacher, self._cut(teacher.config, importance), where=where)


def _width(
    options: WidthCut, config: PretrainedConfig, layers: list[int], importance: Importance | None
) -> Width:
    """Return the most important parts of each kept layer, or the first ones if none are known."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    per_group = heads // groups
    kept = {
        "channels": options.hidden_size or config.hidden_size,
        "units": options.ffn or config.intermediate_size,
        "groups": (options.heads or heads) // per_group,
    }
    if importance is None:
        first = {name: torch.arange(size) for name, size in kept.items()}
        channels, units, groups = first["channels"], first["units"], first["groups"]
        units_l, groups_l = [units] * len(layers), [groups] * len(layers)
    else:
        assert importance.channels is not None
        assert importance.units is not None
        assert importance.groups is not None
        channels = largest(importance.channels, kept["channels"])
        units_l = [largest(importance.units[layer], kept["units"]) for layer in layers]
        groups_l = [largest(importance.groups[layer], kept["groups"]) for layer in layers]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Width(channels, units_l, groups_l, per_group, head_dim)
