"""`forward_rows` and its head reproduce the logits of the model, for every supported family."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

from collegium.errors import ModelError
from collegium.models import probe as probe_module
from collegium.models.forward import forward_rows, model_head, tap_names, tap_width
from collegium.models.loading import enable_checkpointing
from collegium.models.probe import probe
from collegium.types import IGNORE, Batch, Rows
from refusals import refused
from tiny import tiny_model

V, ROWS = 90, 96
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 3}
FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 8}),
    ("gemma2", {**GEMMA, "final_logit_softcapping": 0.05}),
    ("gemma3_text", {**GEMMA, "final_logit_softcapping": 0.05}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("phi", {}),
    ("phi3", {}),
    ("mistral", {"sliding_window": 3}),
    ("olmo2", {}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 4.0}),
    ("hyperclovax", {"logits_scaling": 3.0}),
    ("starcoder2", {}),
    ("stablelm", {}),
    ("mixtral", {}),
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(FAMILIES)]
DIFFERENCE = r"(?<=largest difference )[\d.e+-]+"
LEAKY = [("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}), ("biogpt", {})]


def windows(lengths: list[list[int]]) -> Batch:
    """Random ids, one window per list of document lengths, with labels everywhere."""
    generator = torch.Generator().manual_seed(3)
    size = (len(lengths), sum(lengths[0]))
    ids = torch.randint(V, size, generator=generator)
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return Batch(ids, position, ids.clone(), torch.zeros_like(ids))


def every_row(batch: Batch) -> Rows:
    index = torch.arange(batch.input_ids.numel())
    return Rows(index=index, labels=index, documents=index, samples=index)


@pytest.mark.parametrize(("model_type", "config"), FAMILIES, ids=IDS)
def test_rows_equal_the_logits_of_the_model(model_type: str, config: dict[str, object]) -> None:
    model = tiny_model(ROWS, model_type=model_type, **config)
    batch = windows([[9], [9]])
    rows = batch.rows()
    hidden_rows = forward_rows(model, batch, rows, vocab_size=V)
    own_BTV = model(input_ids=batch.input_ids).logits
    expected_NV = own_BTV[:, :-1, :V].reshape(-1, V)
    assert len(rows) == 16
    torch.testing.assert_close(hidden_rows.logits(slice(None)), expected_NV, atol=1e-5, rtol=1e-5)
    assert hidden_rows.logits(slice(2, 5)).shape == (3, V)


@pytest.mark.parametrize(("model_type", "config"), FAMILIES, ids=IDS)
def test_packed_documents_equal_unpacked_ones(model_type: str, config: dict[str, object]) -> None:
    model = tiny_model(ROWS, model_type=model_type, **config)
    packed = windows([[1, 6, 5], [5, 4, 3]])
    packed_hidden = forward_rows(model, packed, every_row(packed), vocab_size=V).hidden.view(
        2, 12, -1
    )
    for window, start, stop in [(0, 0, 1), (0, 1, 7), (0, 7, 12), (1, 0, 5), (1, 5, 9), (1, 9, 12)]:
        ids = packed.input_ids[window : window + 1, start:stop]
        expected = model.base_model(input_ids=ids).last_hidden_state[0]
        actual = packed_hidden[window, start:stop]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "config"), FAMILIES, ids=IDS)
def test_probe_accepts(model_type: str, config: dict[str, object]) -> None:
    probe(tiny_model(ROWS, model_type=model_type, **config), vocab_size=V, where="student")


@pytest.mark.parametrize(("model_type", "config"), LEAKY)
def test_probe_refuses_models_that_mix_documents(
    model_type: str, config: dict[str, object]
) -> None:
    model = tiny_model(ROWS, model_type=model_type, **config)
    with refused(ModelError, f"teachers[0]: {model_type}"):
        probe(model, vocab_size=V, where="teachers[0]")


def test_probe_refuses_models_without_positions() -> None:
    with refused(ModelError, "student: bloom"):
        probe(tiny_model(ROWS, model_type="bloom"), vocab_size=V, where="student")


BLOOM = ("bloom", {})


@pytest.mark.parametrize(("model_type", "config"), [*LEAKY, BLOOM])
def test_probe_accepts_one_document_per_window(model_type: str, config: dict[str, object]) -> None:
    model = tiny_model(ROWS, model_type=model_type, **config)
    probe(model, vocab_size=V, where="student", packed=False)
    batch = windows([[12], [12]])
    expected = model(input_ids=batch.input_ids).logits[..., :V].flatten(0, 1)
    actual = forward_rows(model, batch, every_row(batch), vocab_size=V).logits(slice(None))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_probe_refuses_a_model_that_sees_later_tokens(packed: bool) -> None:
    model = tiny_model(ROWS)
    mean = model.model.register_forward_hook(_see_all)
    with refused(ModelError, "student: llama"):
        probe(model, vocab_size=V, where="student", packed=packed)
    mean.remove()
    probe(model, vocab_size=V, where="student", packed=packed)


def _see_all(module: nn.Module, inputs: Any, output: Any) -> Any:
    hidden_BTD = output.last_hidden_state
    output.last_hidden_state = hidden_BTD + hidden_BTD.mean(1, keepdim=True)
    return output


FACTORS = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("rope", "config", "limit"),
    [
        (LONGROPE, {"original_max_position_embeddings": 16}, 16),
        (DYNAMIC, {"max_position_embeddings": 20}, 20),
    ],
    ids=["longrope", "dynamic"],
)
def test_frequencies_that_depend_on_the_longest_document(
    rope: dict[str, object], config: dict[str, object], limit: int
) -> None:
    """Beyond a length such models rotate all documents of a batch by other frequencies."""
    kind = "phi3" if rope is LONGROPE else "llama"
    settings = {"initializer_range": 0.3, "rope_parameters": rope, **config}
    model = tiny_model(ROWS, model_type=kind, **settings)
    short, mixed = windows([[12]]), windows([[12, limit]])
    too_long = windows([[12, limit + 1]])
    same, other = (
        forward_rows(model, batch, every_row(batch), vocab_size=V).hidden[:12]
        for batch in (mixed, too_long)
    )
    fresh = forward_rows(
        tiny_model(ROWS, model_type=kind, **settings), short, every_row(short), vocab_size=V
    ).hidden
    assert torch.equal(short.input_ids[0], mixed.input_ids[0, :12])
    torch.testing.assert_close(same, fresh, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other, same, atol=1e-2)
    probe(model, vocab_size=V, where="student", max_length=limit)
    for max_length in (limit + 1, None):
        with refused(ModelError, f"student: {kind}"):
            probe(model, vocab_size=V, where="student", max_length=max_length)


def test_probe_refuses_an_unknown_head() -> None:
    model = tiny_model(ROWS, model_type="granite", logits_scaling=4.0)
    model.config.model_type = "hyperclovax"  # multiplies, while the model divides
    with refused(ModelError, "student: hyperclovax", volatile=DIFFERENCE):
        probe(model, vocab_size=V, where="student")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_detects_a_small_factor_on_the_logits_in_any_dtype(dtype: torch.dtype) -> None:
    model = tiny_model(ROWS, initializer_range=0.4).to(dtype)
    probe(model, vocab_size=V, where="student")
    model.register_forward_hook(lambda module, inputs, output: _scaled(output, 1.25))
    with refused(ModelError, "student: llama", volatile=DIFFERENCE):
        probe(model, vocab_size=V, where="student")


def _scaled(output: Any, factor: float) -> Any:
    output.logits = output.logits * factor
    return output


def test_probe_restores_the_modes_of_the_modules() -> None:
    model = tiny_model(ROWS, model_type="gpt2").train()
    model.transformer.h[0].eval()
    probe(model, vocab_size=V, where="student")
    assert model.training
    assert model.transformer.h[1].training
    assert not model.transformer.h[0].training


def test_head_of_padded_model_is_truncated() -> None:
    model = tiny_model(ROWS)
    head = model_head(model, V)
    assert head.weight.shape == (V, 32)
    assert head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_head_with_too_few_rows() -> None:
    with refused(ModelError, "llama"):
        model_head(tiny_model(ROWS), 97)


def test_head_that_is_not_a_linear_layer() -> None:
    model = tiny_model(ROWS)
    model.lm_head = nn.Sequential(model.lm_head)
    with refused(ModelError, "llama"):
        model_head(model, V)


def test_head_carries_bias_scale_and_softcap() -> None:
    phi = tiny_model(ROWS, model_type="phi")
    nn.init.normal_(phi.lm_head.bias)
    bias = model_head(phi, V).bias
    assert bias is not None
    torch.testing.assert_close(bias, phi.lm_head.bias[:V])
    probe(phi, vocab_size=V, where="student")
    assert model_head(tiny_model(ROWS, model_type="cohere", logit_scale=0.25), V).scale == 0.25
    assert model_head(tiny_model(ROWS, model_type="granite", logits_scaling=4.0), V).scale == 0.25
    gemma = tiny_model(ROWS, model_type="gemma2", **GEMMA, final_logit_softcapping=2.0)
    assert model_head(gemma, V).softcap == 2.0


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_reaches_the_parameters(tied: bool) -> None:
    model = tiny_model(ROWS, tie_word_embeddings=tied)
    batch = windows([[9], [9]])
    rows = batch.rows()
    forward_rows(model, batch, rows, vocab_size=V).logits(slice(None))[:, 7].sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(input_ids=batch.input_ids).logits[:, :-1, 7].sum().backward()
    assert set(ours) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)
    assert ours["model.embed_tokens.weight"][V:].count_nonzero() == 0
    if not tied:
        assert ours["lm_head.weight"][7].count_nonzero() > 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_taps_match_their_names(model_type: str) -> None:
    model = tiny_model(ROWS, model_type=model_type, **(GEMMA if model_type == "gemma2" else {}))
    assert tap_names(model) == ["embed", "layer_0", "layer_1", "final_prenorm", "final_postnorm"]
    batch = windows([[4, 5], [9]])
    rows = every_row(batch)
    output = forward_rows(model, batch, rows, vocab_size=V, taps=tap_names(model))
    features = output.features
    for name, state in features.items():
        assert state.shape == (18, tap_width(model, name))
    torch.testing.assert_close(features["final_postnorm"], output.hidden)
    torch.testing.assert_close(features["final_prenorm"], features["layer_1"])
    embedding = model.get_input_embeddings()(batch.input_ids).flatten(0, 1)
    torch.testing.assert_close(features["embed"], embedding)
    norm = next(
        module
        for name, module in model.base_model.named_children()
        if name in ("norm", "ln_f", "final_layer_norm")
    )
    torch.testing.assert_close(norm(features["final_prenorm"]), output.hidden)
    assert not torch.allclose(features["layer_0"], features["layer_1"])


def test_hooks_are_removed() -> None:
    model = tiny_model(ROWS)
    batch = windows([[9]])
    with refused(ModelError, "llama"):
        forward_rows(model, batch, batch.rows(), vocab_size=V, taps=["layer_0", "layer_2"])
    forward_rows(model, batch, batch.rows(), vocab_size=V, taps=["layer_0"])
    assert not any(module._forward_hooks for module in model.modules())


def test_taps_carry_gradient_under_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(ROWS).train()
        if checkpointing:
            enable_checkpointing(model)
        batch = windows([[4, 5], [9]])
        output = forward_rows(model, batch, batch.rows(), vocab_size=V, taps=["layer_0", "embed"])
        loss = output.logits(slice(None))[:, 3].sum()
        (loss + sum(state.square().sum() for state in output.features.values())).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_widths_of_taps_differ() -> None:
    model = tiny_model(ROWS, model_type="opt", ffn_dim=64, word_embed_proj_dim=16)
    widths = {tap: tap_width(model, tap) for tap in ("embed", "layer_0", "final_postnorm")}
    assert widths == {"embed": 16, "layer_0": 32, "final_postnorm": 16}


def test_ignored_labels_yield_no_rows() -> None:
    model, batch = tiny_model(ROWS), windows([[4, 5]])
    batch.labels[:, 4:] = IGNORE
    rows = batch.rows()
    selected = forward_rows(model, batch, rows, vocab_size=V)
    whole = forward_rows(model, batch, every_row(batch), vocab_size=V)
    assert rows.index.tolist() == [0, 1, 2]
    torch.testing.assert_close(selected.hidden, whole.hidden[:3])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("is_formula", [False, True])
def test_float64_tells_amplified_rounding_from_another_formula(
    packed: bool, is_formula: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of whole windows are off by more roundings than those of a plain model."""
    model, run = tiny_model(60), probe_module.forward_rows

    def shifted(student: Any, batch: Any, rows: Any, **options: Any) -> Any:
        states = run(student, batch, rows, **options)
        if batch.input_ids.shape[1] == 12 and (is_formula or states.hidden.dtype == torch.float32):
            size = 500 * torch.finfo(torch.float32).eps * states.hidden.abs().max()
            return dataclasses.replace(states, hidden=states.hidden + size)
        return states

    probe(model, vocab_size=60, where="student", packed=packed)
    monkeypatch.setattr(probe_module, "forward_rows", shifted)
    # The comparisons of logits, and of windows whose first document changes.
    monkeypatch.setattr(probe_module, "is_close", lambda *_, **__: True)
    check = functools.partial(probe, model, vocab_size=60, where="student", packed=packed)
    if is_formula:
        with refused(ModelError, "student: "):
            check()
    else:
        check()
