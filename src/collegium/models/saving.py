"""Saving a student: what its folder says must load, and give the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from collegium.errors import ModelError, first_line
from collegium.models.folder import resolve_folder
from collegium.models.identity import without_neutral
from collegium.models.weights import CONFIG, read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

    from collegium.models.options import ModelOptions

GENERATION_CONFIG = "generation_config.json"
SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
"""Keys of a generation config that transformers refuses to save unless `do_sample` is true."""

INERT = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0}
"""Sampling values that change nothing, and may be saved without `do_sample`."""


def repair_generation(config: GenerationConfig | None) -> list[str]:
    """Make sampling values savable, in place. Return the names of those without effect so far.

    Values without `do_sample` are meant for sampling, so it is set. With `do_sample: false` they
    have no effect, and are removed.
    """
    if config is None or config.do_sample:
        return []
    default = type(config)()
    names = [
        name
        for name in SAMPLING
        if getattr(config, name, None) not in (None, getattr(default, name, None), INERT.get(name))
    ]
    if names and config.do_sample is None:
        config.do_sample = True
    elif names:
        for name in names:
            setattr(config, name, None)
    return names


def check_generation_file(options: ModelOptions, *, where: str) -> None:
    """Raise ModelError if the generation config of a folder cannot be loaded."""
    folder = resolve_folder(options.model, where=where)
    if folder is None or not (folder / GENERATION_CONFIG).is_file():
        return
    from transformers import GenerationConfig

    # transformers would replace a file that is no JSON by default values.
    read_json(folder / GENERATION_CONFIG, where=where)
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # of any type for bad values
        raise ModelError(
            f"{where}: {GENERATION_CONFIG}: cannot be loaded ({first_line(error)}); fix its values"
        ) from error


def generation_notes(options: ModelOptions, *, where: str) -> list[str]:
    """Return a line if the generation config of a folder is saved differently with a student."""
    from transformers import GenerationConfig

    folder = resolve_folder(options.model, where=where)
    if folder is None or not (folder / GENERATION_CONFIG).is_file():
        return []
    config = GenerationConfig.from_pretrained(folder)
    names = repair_generation(config)
    if not names:
        return []
    change = "with `do_sample: true`" if config.do_sample else "without them"
    place = f"{where}: {GENERATION_CONFIG}"
    return [f"{place} has {', '.join(names)} but no do_sample; the student is saved {change}"]


def load_generation(folder: Path) -> GenerationConfig | None:
    """Load the generation config of a saved model, None if it has none."""
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def stop_ids(config: GenerationConfig | None) -> frozenset[int]:
    """Return the ids at which generation stops by a generation config."""
    eos: Any = None if config is None else config.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def check_saving(model: PreTrainedModel, *, where: str) -> None:
    """Save and load the configs of a student, which has no values yet.

    Raises ModelError if transformers refuses to save one of them, or loads another one.
    """
    generation: Any = model.generation_config
    with TemporaryDirectory() as folder:
        _check_round_trip(model.config, Path(folder), f"{where}: {CONFIG}")
        if generation is None:
            return
        place = f"{where}: {GENERATION_CONFIG}"
        repair_generation(generation)
        _check_types(generation, place)
        try:
            # A config that was not changed after loading is saved without this check, but a student
            # gets the stop token of its tokenizer.
            generation.validate(strict=True)
            generation.save_pretrained(folder)
            type(generation).from_pretrained(folder)
        except Exception as error:  # of any type for bad values
            raise ModelError(
                f"{place}: cannot be saved with a student ({first_line(error)}); fix its values"
            ) from error


def _check_types(config: GenerationConfig, place: str) -> None:
    # transformers saves values of any type, and fails when they are used.
    stops = config.eos_token_id
    for stop in stops if isinstance(stops, list) else [stops]:
        if stop is not None and type(stop) is not int:
            raise ModelError(f"{place}: eos_token_id: got {stop!r}; must be token ids; fix it")
    for name in SAMPLING:
        value = getattr(config, name, None)
        if not isinstance(value, (int, float, type(None))):
            raise ModelError(f"{place}: {name}: got {value!r}; must be a number; fix it")


def _check_round_trip(config: PretrainedConfig, folder: Path, place: str) -> None:
    try:
        config.save_pretrained(folder)
        loaded = type(config).from_pretrained(folder)
    # Bad values make config classes raise errors of any type.
    except Exception as error:
        raise ModelError(
            f"{place}: cannot be saved with a student ({first_line(error)}); fix its values"
        ) from error
    expected, actual = _plain(config), _plain(loaded)
    for key in sorted(expected.keys() | actual.keys()):
        if expected.get(key) != actual.get(key):
            raise ModelError(
                f"{place}: {key}: got {expected.get(key)!r}, which transformers loads from a saved "
                f"student as {actual.get(key)!r}; must be saved as it is; fix its value"
            )


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    return without_neutral(json.loads(config.to_json_string(use_diff=False)))
