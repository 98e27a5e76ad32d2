"""Quantized teachers: rounded on load, in the files of a folder, and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from collegium.config.recipe import load_recipe
from collegium.errors import ModelError
from collegium.models import gguf, quantized
from collegium.models.cut_student import CutStudent, LayerCut
from collegium.models.loading import empty_model, load_model
from collegium.models.quantized import model_bytes, quantized_bytes
from collegium.models.student import PretrainedStudent
from collegium.run import pipeline
from collegium.teachers.local import LocalTeacher
from collegium.teachers.options import LocalOptions
from refusals import refused
from tiny_run import recipe_text, write_zoo

HERE = "teachers.a"
IDS = torch.arange(48).reshape(2, 24)
BOUNDS = {"int8": 0.02, "int4": 0.2}
"""Largest relative error of the logits. Measured on the tiny models: 0.007 and 0.1."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return tiny.save_tiny(folder, seed=3, width=64, tie_word_embeddings=False)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    gguf._converted.cache_clear()


def load(options: LocalOptions) -> LocalTeacher:
    options.check(HERE)
    teacher = options.load("a", vocab_size=400, where=HERE)
    assert isinstance(teacher, LocalTeacher)
    teacher.probe(HERE)
    return teacher


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device), use_cache=False).logits.double().cpu()


def error_of(model: Any, path: Path) -> float:
    """Relative error of the logits of a model against those of the floats in a folder."""
    exact = logits(load_model(LocalOptions(model=str(path), device="cpu"), where=HERE))
    return float((logits(model) - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_layers_are_rounded_and_nothing_else(model: Path, kind: Any, dtype: Any) -> None:
    pytest.importorskip("torchao")
    options = LocalOptions(model=str(model), quantize=kind, device="cpu", dtype=dtype)
    teacher = load(options)
    # A loss that reads another head would be no error of these few layers.
    rounding = 0.01 if dtype == "bfloat16" else 0.0
    error = error_of(teacher.model, model)
    assert BOUNDS[kind] / 10 < error < BOUNDS[kind] + rounding
    exact = load_file(model / "model.safetensors")
    rounded = quantized.quantized_layers(teacher.model, kind)
    assert len(rounded) == 14
    for name, parameter in teacher.model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer not in rounded:
            torch.testing.assert_close(parameter.float(), exact[name].to(parameter).float())
            continue
        # A step per row of 127 levels, or per group of 32 weights of 7: half a step at most.
        weight = exact[name].double()
        groups = weight.unflatten(1, (-1, 32)) if kind == "int4" else weight[:, None]
        step = groups.abs().amax(-1, keepdim=True) / (7 if kind == "int4" else 127)
        gap = (parameter.dequantize().double().view_as(groups) - groups).abs()
        assert (gap <= step * (0.5 + 0.02 * (1 + 127 * (dtype == "bfloat16")))).all(), layer
        assert gap.max() > 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bytes_are_known_before_loading(model: Path, kind: Any) -> None:
    pytest.importorskip("torchao")
    options = LocalOptions(model=str(model), quantize=kind, device="cpu")
    empty = empty_model(options.load_config(HERE), HERE)
    predicted = quantized_bytes(empty, kind, torch.device("cpu"))
    assert predicted == pytest.approx(model_bytes(load(options).model), rel=0.01)
    assert predicted < 0.6 * quantized_bytes(empty, "int8", torch.device("cpu")) * 4


def test_identity_of_a_teacher_includes_its_rounding(model: Path) -> None:
    plain = LocalOptions(model=str(model)).identity()
    # Without the key, so that caches of earlier versions remain valid.
    assert "quantize" not in plain
    others = [LocalOptions(model=str(model), quantize=kind).identity() for kind in BOUNDS]
    assert others == [{**plain, "quantize": kind} for kind in BOUNDS]


def test_a_run_may_have_a_teacher_and_its_rounded_copy(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    root = write_zoo(tmp_path)
    text = recipe_text(root).replace("/code}\n", "/scripture, quantize: int8}\n")
    (root / "r.yaml").write_text(text)
    recipe = load_recipe(root / "r.yaml")
    lines = pipeline.check(recipe).lines
    assert any("torchao" in line for line in lines)


def test_without_torchao(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_is_installed", lambda _: False)
    with refused(ModelError, "teachers.a.quantize"):
        LocalOptions(model=str(model), quantize="int8").check(HERE)


def integers(model: Path, folder: Path, **settings: Any) -> Path:
    """Copy a model with one tensor of integers, and this `quantization_config`."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].to(torch.int8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "gptq"])
def test_a_quantized_folder_names_its_package(
    model: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = integers(model, tmp_path / "m", quant_method=method)
    options = LocalOptions(model=str(folder), device="cpu")
    monkeypatch.setattr(quantized, "_is_installed", lambda _: False)
    with refused(ModelError, HERE):
        options.check(HERE)
    monkeypatch.setattr(quantized, "_is_installed", lambda _: True)
    options.check(HERE)
    assert not any("quantization_config" in line for line in options.warnings(HERE))
    other = integers(model, tmp_path / "n", quant_method=method, bits=4)
    assert LocalOptions(model=str(other)).identity() != options.identity()
    for key in ("quantize", "offload", "shard"):
        value: Any = "int8" if key == "quantize" else True
        with refused(ModelError, f"{HERE}.{key}"):
            LocalOptions(model=str(folder), **{key: value}).check(HERE)


@pytest.mark.parametrize("settings", [{}, {"quant_method": "awq"}], ids=["none", "awq"])
def test_integers_of_an_unknown_method(
    model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = integers(model, tmp_path / "m", **settings)
    with refused(ModelError, HERE):
        LocalOptions(model=str(folder)).check(HERE)


def test_a_student_starts_from_floats(model: Path, tmp_path: Path) -> None:
    folder = integers(model, tmp_path / "m", quant_method="gptq")
    for path in (folder, tmp_path / "x.gguf"):
        with refused(ModelError, "student"):
            PretrainedStudent(model=str(path)).check("student")
    cut = CutStudent(from_layers=LayerCut(teacher="a", keep=1))
    with refused(ModelError, "student"):
        cut.bind({"a": LocalOptions(model=str(folder))}, lambda: ()).check("student")


def test_a_student_is_cut_out_of_the_floats_of_a_rounded_teacher(model: Path) -> None:
    teacher = LocalOptions(model=str(model), quantize="int4", device="cpu")
    cut = CutStudent(from_layers=LayerCut(teacher="a", keep=2), device="cpu")
    student = cut.bind({"a": teacher}, lambda: ())
    student.check("student")
    built = student.build(seed=0, where="student").eval()
    assert error_of(built, model) == 0


def test_bitsandbytes_folders_load(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options: dict[str, Any] = {"quantization_config": config, "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(model, **options).save_pretrained(tmp_path / "m")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "m")
    teacher = load(LocalOptions(model=str(tmp_path / "m"), device="cpu"))
    assert 0 < error_of(teacher.model, model) < BOUNDS["int4"]


def gguf_file(model: Path, path: Path) -> Path:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    source = load_model(LocalOptions(model=str(model), device="cpu"), where=HERE)
    return write_gguf(path, source, tiny.tiny_tokenizer())


def test_a_gguf_file_is_converted_once(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = gguf_file(model, tmp_path / "a.gguf")
    options = LocalOptions(model=str(file), device="cpu")
    teacher = load(options)
    assert 0 < error_of(teacher.model, model) < BOUNDS["int8"]
    assert options.warnings(HERE) == []
    assert "converting a.gguf once" in capfd.readouterr().err
    theirs, ours = options.load_tokenizer(HERE), tiny.tiny_tokenizer()
    assert all(theirs.encode(text) == ours.encode(text) for text in tiny.TEXT)
    assert theirs.eos_token == ours.eos_token
    # Another process finds the folder; the same content elsewhere is the same model.
    gguf._converted.cache_clear()
    copy = tmp_path / "elsewhere" / "a.gguf"
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    assert LocalOptions(model=str(copy), device="cpu").identity() == options.identity()
    assert "converting" not in capfd.readouterr().err
    (folder,) = (tmp_path / "cache" / "gguf").iterdir()
    assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4aaaa", b"GGUF\1\0\0\0", b"GGUF\3\0\0\0"])
def test_a_damaged_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with refused(ModelError, HERE, volatile=r"\(.*\)"):
        LocalOptions(model=str(tmp_path / "a.gguf")).check(HERE)


def test_a_gguf_file_without_its_package_or_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0")
    options = LocalOptions(model=str(tmp_path / "a.gguf"))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "BYTES_PER_FILE_BYTE", 10**15)
        with refused(ModelError, HERE, volatile=r"[\d.]+ GB free"):
            options.check(HERE)
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    with refused(ModelError, HERE):
        options.check(HERE)
    with refused(ModelError, HERE):
        LocalOptions(model=str(tmp_path / "b.gguf")).check(HERE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_int4_is_packed_on_cuda(model: Path) -> None:
    pytest.importorskip("torchao")
    options = LocalOptions(model=str(model), quantize="int4", device="cuda", dtype="bfloat16")
    assert error_of(load(options).model, model) < BOUNDS["int4"]
