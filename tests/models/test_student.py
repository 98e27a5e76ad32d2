"""The student: built from a config or loaded from a folder, never resized, with a stop token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from collegium.errors import ModelError
from collegium.models.kinds import AnyStudent
from collegium.models.loading import empty_model
from collegium.models.probe import probe
from collegium.models.saving import check_saving
from collegium.models.student import FreshStudent, PretrainedStudent
from refusals import check_message, refused
from tiny import save_tiny, tiny_model, tiny_tokenizer

STUDENT = TypeAdapter(AnyStudent)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def fresh(tokenizer: str, changes: dict[str, object] | None = None) -> FreshStudent:
    return FreshStudent(config={**CONFIG, **(changes or {})}, tokenizer=tokenizer, device="cpu")


def test_new_student_has_the_ids_of_its_tokenizer(tokenizer: str) -> None:
    options = fresh(tokenizer)
    options.check("student")
    student = options.build(seed=3, where="student")
    ids = tiny_tokenizer()
    assert student.get_input_embeddings().weight.shape == (len(ids), 32)
    assert student.config.eos_token_id == ids.eos_token_id
    assert student.generation_config.eos_token_id == ids.eos_token_id
    assert student.generation_config.pad_token_id == ids.pad_token_id
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in student.parameters())
    again = options.build(seed=3, where="student")
    other = options.build(seed=4, where="student")
    assert torch.equal(student.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(student.lm_head.weight, other.lm_head.weight)
    probe(student, vocab_size=len(ids), where="student")


def test_student_from_a_folder(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", seed=6)
    options = PretrainedStudent(model=str(folder), device="cpu")
    options.check("student")
    student = options.build(seed=0, where="student")
    expected = tiny_model(len(tiny_tokenizer()), seed=6).state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert options.load_tokenizer("student").get_vocab() == tiny_tokenizer().get_vocab()


def test_weights_are_compared_with_the_config(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('_layers": 2', '_layers": 1'))
    with refused(ModelError, "student"):
        PretrainedStudent(model=str(folder)).check("student")


def test_the_config_is_available_before_the_model(tokenizer: str, tmp_path: Path) -> None:
    changed = fresh(tokenizer, {"max_position_embeddings": 77})
    assert changed.max_length("student") == 77
    saved = PretrainedStudent(model=str(save_tiny(tmp_path / "m")))
    assert saved.max_length("student") == 128


def test_padded_student_keeps_its_rows(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    tiny_model(512).save_pretrained(tmp_path / "m")
    options = PretrainedStudent(model=str(tmp_path / "m"), device="cpu")
    student = options.build(seed=0, where="student")
    assert student.get_input_embeddings().weight.shape[0] == 512


def test_token_without_a_row(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    tiny_model(300).save_pretrained(tmp_path / "m")
    options = PretrainedStudent(model=str(tmp_path / "m"), device="cpu")
    for call in (lambda: options.build(seed=0, where="student"), lambda: options.check("student")):
        with refused(ModelError, "student"):
            call()


def test_stop_tokens_of_the_model_are_kept(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", eos_token_id=[5, 6])
    student = PretrainedStudent(model=str(folder), device="cpu").build(seed=0, where="student")
    assert student.generation_config.eos_token_id == [5, 6, tiny_tokenizer().eos_token_id]


def generation(folder: Path, values: object) -> PretrainedStudent:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return PretrainedStudent(model=str(folder), device="cpu")


@pytest.mark.parametrize(
    ("values", "saved", "note"),
    [
        (
            {"temperature": 0.9, "top_p": 0.6},
            {"temperature": 0.9, "top_p": 0.6, "do_sample": True},
            "temperature, top_p but no do_sample; the student is saved with `do_sample: true`",
        ),
        (
            {"top_k": 5, "do_sample": False},
            {"do_sample": False},
            "top_k but no do_sample; the student is saved without them",
        ),
        ({"top_p": 0.6, "do_sample": True}, {"top_p": 0.6, "do_sample": True}, None),
        ({"temperature": 1.0}, {"temperature": 1.0}, None),
    ],
    ids=str,
)
def test_sampling_values_without_sampling_are_repaired(
    tmp_path: Path, values: dict[str, object], saved: dict[str, object], note: str | None
) -> None:
    """transformers loads such a config, and refuses to save it once a stop token was added."""
    options = generation(save_tiny(tmp_path / "m"), values)
    options.check("student")
    place = "student: generation_config.json has "
    assert options.warnings("student") == ([] if note is None else [place + note])
    student = options.build(seed=0, where="student")
    student.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {key: written.get(key) for key in (*values, *saved)} == {
        key: saved.get(key) for key in (*values, *saved)
    }


def test_sampling_values_in_a_config(tmp_path: Path) -> None:
    """Older models have them in config.json, from where transformers moves them."""
    folder = save_tiny(tmp_path / "m")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "temperature": 0.7}))
    options = PretrainedStudent(model=str(folder), device="cpu")
    options.check("student")
    options.build(seed=0, where="student").save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "values",
    [
        {"length_penalty": 2.0},
        {"num_return_sequences": 4},
        {"eos_token_id": "x"},
        {"eos_token_id": [1.5]},
        {"pad_token_id": -1},
        {"max_new_tokens": 0},
        {"temperature": "hot"},
        [],
    ],
    ids=str,
)
def test_generation_config_that_cannot_be_saved(tmp_path: Path, values: object) -> None:
    options = generation(save_tiny(tmp_path / "m"), values)
    # The message may quote an error of transformers, which differs between versions.
    with refused(ModelError, "student: ", volatile=r"(?<=\().*(?=\))"):
        options.check("student")


def test_generation_config_that_is_not_json(tmp_path: Path) -> None:
    """transformers would replace it by default values without a word."""
    folder = save_tiny(tmp_path / "m")
    (folder / "generation_config.json").write_text("{")
    with refused(ModelError, "student"):
        PretrainedStudent(model=str(folder)).check("student")


def test_config_that_cannot_be_saved(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = empty_model(fresh(tokenizer).load_config("student"), "student")
    check_saving(model, where="student")
    other = fresh(tokenizer, {"rms_norm_eps": 0.5}).load_config("student")
    with monkeypatch.context() as patch, refused(ModelError, "student: config.json"):
        patch.setattr(type(other), "from_pretrained", lambda folder: other)
        check_saving(model, where="student")
    model.config.note = object()
    with refused(ModelError, "student: config.json", volatile=r"(?<=\().*(?=\))"):
        check_saving(model, where="student")


def test_composite_student_has_a_cache_switch(tmp_path: Path) -> None:
    """Trainers read and set it at the top of the config."""
    config = AutoConfig.for_model("gemma3", **GEMMA3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    options = PretrainedStudent(model=str(tmp_path / "m"), device="cpu")
    options.check("student")
    assert options.build(seed=0, where="student").config.use_cache is True


GEMMA3 = {
    "text_config": {
        **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"max_position_embeddings": 128, "sliding_window": 4, "query_pre_attn_scalar": 8},
    },
    "vision_config": {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    },
    **{"mm_tokens_per_image": 4, "image_token_index": 1, "boi_token_index": 2},
    "eoi_token_index": 3,
}


def test_content_covers_weights_and_config(tmp_path: Path) -> None:
    options = PretrainedStudent(model=str(save_tiny(tmp_path / "m")), device="cpu")
    before = options.content()
    model = options.build(seed=0, where="student")
    tiny_tokenizer().save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again", max_shard_size="70KB")
    assert PretrainedStudent(model=str(tmp_path / "again"), device="cpu").content() == before
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert options.content() != before


def test_tokenizer_without_eos(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer).save_pretrained(
        tmp_path / "t"
    )
    options = fresh(str(tmp_path / "t"))
    for call in (options.load_tokenizer, options.check):
        with refused(ModelError, "student"):
            call("student")


def test_half_precision_keeps_the_rotary_frequencies(tokenizer: str, tmp_path: Path) -> None:
    """In bfloat16 they would differ from those of the saved student, more at later positions."""
    options = FreshStudent(config=CONFIG, tokenizer=tokenizer, device="cpu", dtype="bfloat16")
    student = options.build(seed=0, where="student")
    student.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    inputs = {"input_ids": torch.arange(300)[None]}
    assert student.training
    with torch.no_grad():
        assert torch.equal(student.eval()(**inputs).logits, saved(**inputs).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(tokenizer: str, tmp_path: Path, dtype: str) -> None:
    folder = save_tiny(tmp_path / "m")
    for origin in ({"model": str(folder)}, {"config": CONFIG, "tokenizer": tokenizer}):
        options = STUDENT.validate_python({**origin, "dtype": dtype, "device": "cpu"})
        student = options.build(seed=0, where="student")
        assert {str(p.dtype) for p in student.parameters()} == {f"torch.{dtype}"}


def test_gradient_checkpointing(tokenizer: str) -> None:
    options = FreshStudent(
        config=CONFIG, tokenizer=tokenizer, device="cpu", gradient_checkpointing=True
    )
    student = options.build(seed=0, where="student")
    assert all(layer.gradient_checkpointing for layer in student.model.layers)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"hiden_size": 8}, "student.config.hiden_size"),
        ({"vocab_size": 7}, "student.config.vocab_size"),
        ({"model_type": "lama"}, "student.config.model_type"),
        ({"hidden_size": 30}, "student.config: llama"),
        ({"num_attention_heads": 0}, "student.config: llama"),
        ({"hidden_size": -4}, "student.config"),
    ],
    ids=str,
)
def test_config_is_checked_before_anything_is_built(
    tokenizer: str, changes: dict[str, object], where: str
) -> None:
    # Reasons of transformers and its nearest model type differ between versions.
    volatile = r"(?<=these values; ).*|(?<=qwen3`).*|(?<=model \()[^)]*"
    for call in (
        lambda options: options.check("student"),
        lambda options: options.build(seed=0, where="student"),
    ):
        with refused(ModelError, where, volatile=volatile):
            call(fresh(tokenizer, changes))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": "m", "config": {"model_type": "llama"}, "tokenizer": "t"},
        {"config": {"model_type": "llama"}},
    ],
    ids=str,
)
def test_options_are_checked_together(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        STUDENT.validate_python(options)
    check_message(caught.value.errors()[0]["msg"])


@pytest.mark.parametrize(
    ("options", "field"), [({"dtype": "auto"}, "dtype"), ({"vocab": 3}, "vocab")]
)
def test_options_are_strict(options: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PretrainedStudent(model="m", **options)  # type: ignore[arg-type]
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_missing_folders(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    for options in (PretrainedStudent(model=missing), fresh(missing)):
        with refused(ModelError, "student"):
            options.check("student")


def test_special_ids_of_a_config_are_kept(tokenizer: str) -> None:
    student = fresh(tokenizer, {"eos_token_id": 5}).build(seed=0, where="student")
    assert student.config.eos_token_id == 5
    assert student.generation_config.eos_token_id == [5, tiny_tokenizer().eos_token_id]
