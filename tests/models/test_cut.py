"""Students cut out of a larger model: exact against naive references, or refused before loading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from collegium.errors import ModelError
from collegium.models.cut import INDEXED_TYPES, PER_LAYER, WIDTH_TYPES, Cut, check_cut, cut_model
from collegium.models.cut_student import BoundCut, CutStudent, LayerCut
from collegium.models.families import UNSUPPORTED_TYPES
from collegium.models.forward import block_list
from collegium.models.importance import largest, measure
from collegium.models.options import ModelOptions
from collegium.models.saving import check_saving
from collegium.types import Batch
from families import TYPES, V, tiny_family
from refusals import refused
from tiny import save_tiny, tiny_tokenizer

POPULAR = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "phi", "gpt2"),
    *("gpt_neox", "olmo2", "smollm3", "mixtral", "qwen3_moe", "cohere2", "granite", "falcon"),
]
IDS = torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def without_layers(model: PreTrainedModel, kept: Sequence[int]) -> Tensor:
    """Logits of a model whose other layers hand on their input, patched in place."""
    config = model.config.get_text_config()
    for number in set(range(config.num_hidden_layers)) - set(kept):
        block: Any = block_list(model)[number]

        def forward(*args: Any, _forward: Any = block.forward, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            output = _forward(*args, **kwargs)
            return hidden if isinstance(output, Tensor) else [hidden, *output[1:]]

        block.forward = forward
    return logits(model)


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in UNSUPPORTED_TYPES])
@pytest.mark.parametrize("kept", [[0, 3], [1, 2, 3]], ids=str)
def test_a_type_is_cut_exactly_or_refused(model_type: str, kept: list[int], tmp_path: Path) -> None:
    larger = tiny_family(model_type, tmp_path)
    count = larger.config.get_text_config().num_hidden_layers
    cut = Cut([layer for layer in kept if layer < count])
    try:
        empty = check_cut(AutoConfig.from_pretrained(tmp_path), cut, where="student")
        check_saving(empty, where="student")
    except ModelError:
        assert model_type not in POPULAR
        return
    smaller = cut_model(larger, cut, where="student")
    saved_as(smaller, tmp_path / "saved")
    tolerance = 1e-5 * max(1.0, float(logits(smaller).abs().max()))
    expected = without_layers(larger, cut.layers)
    torch.testing.assert_close(logits(smaller), expected, rtol=0, atol=tolerance)
    if model_type in POPULAR:
        assert smaller.config.get_text_config().num_hidden_layers == len(cut.layers)


def saved_as(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save and reload with transformers, and compare the logits."""
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    tolerance = 1e-5 * max(1.0, float(logits(model).abs().max()))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=tolerance)
    return again


def test_the_lists_name_types_and_keys() -> None:
    assert {*TYPES} >= INDEXED_TYPES
    assert {*POPULAR} <= {*TYPES} - INDEXED_TYPES - UNSUPPORTED_TYPES.keys()
    for model_type in [*POPULAR, "gpt_oss", "olmo3", "deepseek_v3", "laguna"]:
        config = AutoConfig.for_model(model_type).get_text_config()
        for key, value in vars(config).items():
            is_list = isinstance(value, list) and len(value) == config.num_hidden_layers
            assert not is_list or key in PER_LAYER, (model_type, key)


@pytest.mark.parametrize("model_type", POPULAR)
def test_keeping_all_layers_is_the_identity(model_type: str, tmp_path: Path) -> None:
    larger = tiny_family(model_type, tmp_path)
    same = cut_model(larger, Cut(range(4)), where="student")
    assert_identical(same, larger)


def assert_identical(model: PreTrainedModel, other: PreTrainedModel) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert model.config.to_dict() == other.config.to_dict()
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_copied(dtype: torch.dtype, tmp_path: Path) -> None:
    larger = tiny_family("llama", tmp_path).to(dtype)
    smaller = cut_model(larger, Cut([0, 3]), where="student")
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    assert torch.equal(
        smaller.model.layers[1].mlp.up_proj.weight, larger.model.layers[3].mlp.up_proj.weight
    )


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_stay_tied(tied: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", num_hidden_layers=3, tie_word_embeddings=tied)
    student = bound(folder, from_layers={"keep": [0, 2]}).build(seed=0, where="student")
    for model in (student, AutoModelForCausalLM.from_pretrained(saved(student, tmp_path / "s"))):
        is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert is_tied == tied


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def bound(
    folder: Path, *, batches: Sequence[Batch] = (), trust: bool = False, **cuts: dict[str, Any]
) -> BoundCut:
    """A student cut out of the model of a folder, as teacher `big`."""
    options = CutStudent(
        **{key: {"teacher": "big", **values} for key, values in cuts.items()}, device="cpu"
    )
    # Beside the config of a qwen2, its tokenizer would be loaded with a token more.
    tokenizer = folder.with_name("tokenizer")
    tiny_tokenizer().save_pretrained(tokenizer)
    teacher = ModelOptions(model=str(folder), tokenizer=str(tokenizer), trust_remote_code=trust)
    student = options.bind({"big": teacher}, lambda: batches)
    assert isinstance(student, BoundCut)
    return student


@pytest.mark.parametrize(
    ("keep", "num_layers", "expected"),
    [
        (1, None, [0]),
        (2, None, [0, 6]),
        (3, None, [0, 3, 6]),
        (5, None, [0, 2, 3, 5, 6]),
        (7, None, [0, 1, 2, 3, 4, 5, 6]),
        ([1, 4], None, [1, 4]),
        ("first_and_last", 1, [0]),
        ("first_and_last", 2, [0, 6]),
        ("first_and_last", 5, [0, 1, 2, 5, 6]),
        ("first_and_last", 7, [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_kept_layers(keep: Any, num_layers: int | None, expected: list[int]) -> None:
    options = LayerCut(teacher="big", keep=keep, num_layers=num_layers)
    assert options.layers(7, None) == expected
    assert options.count() == len(expected)


def windows(*documents: list[int]) -> Batch:
    """One window of documents of given ids."""
    ids = torch.tensor([[token for document in documents for token in document]])
    position = torch.cat([torch.arange(len(document)) for document in documents])[None]
    number = torch.cat([torch.full((len(d),), i) for i, d in enumerate(documents)])[None]
    return Batch(ids, position, ids.clone(), number)


def llama_parts(model: Any, ids: Tensor) -> dict[str, Any]:
    """Activations of a llama by hand, of one document: (T, ...) per layer."""
    config, body = model.config, model.model
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    x = body.embed_tokens(ids)[None]
    cos, sin = body.rotary_emb(x, torch.arange(len(ids))[None])
    parts: dict[str, Any] = {"in": [], "out": [], "norms": [], "units": [], "heads": []}
    for layer in body.layers:
        parts["in"].append(x[0])
        h = layer.input_layernorm(x)
        parts["norms"].append(h[0])
        attention = layer.self_attn
        q, k, v = (
            proj(h).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            score = q[0, head] @ k[0, group].T / config.head_dim**0.5
            score = score.masked_fill(torch.ones_like(score).triu(1).bool(), -torch.inf)
            outputs.append(score.softmax(-1) @ v[0, group])
        parts["heads"].append(torch.stack(outputs, 1))
        x = x + attention.o_proj(torch.cat(outputs, -1))[None]
        h = layer.post_attention_layernorm(x)
        parts["norms"].append(h[0])
        mlp = layer.mlp
        units = nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h)
        parts["units"].append(units[0])
        x = x + mlp.down_proj(units)
        parts["out"].append(x[0])
    parts["norms"].append(body.norm(x)[0])
    return parts


def test_importances_equal_sums_over_rows_by_hand(tmp_path: Path) -> None:
    model = tiny_family("llama", tmp_path)
    documents = [IDS[0, :9].tolist(), IDS[1, :15].tolist()]
    measured = measure(model, [windows(*documents)], width=True)
    expected = {"layers": 0.0, "channels": 0.0, "units": 0.0, "groups": 0.0}
    groups = model.config.num_key_value_heads
    for ids in documents:
        with torch.no_grad():
            parts = llama_parts(model, torch.tensor(ids))
        # The last position of a document predicts nothing.
        for key in parts:
            parts[key] = [value[:-1].double() for value in parts[key]]
        for layer in range(4):
            x, y = parts["in"][layer], parts["out"][layer]
            cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            change = torch.zeros(4, dtype=torch.float64)
            change[layer] = (1 - cosine).sum()
            expected["layers"] = expected["layers"] + change
        expected["channels"] = expected["channels"] + sum(x.abs().sum(0) for x in parts["norms"])
        expected["units"] = expected["units"] + torch.stack(
            [x.abs().sum(0) for x in parts["units"]]
        )
        norms = torch.stack([x.norm(dim=-1).sum(0) for x in parts["heads"]])  # (L, H)
        by_group = torch.stack(
            [sum(norms[:, h] for h in range(4) if h // (4 // groups) == g) for g in range(groups)],
            1,
        )
        expected["groups"] = expected["groups"] + by_group
    for key, value in expected.items():
        torch.testing.assert_close(getattr(measured, key), value, rtol=1e-5, atol=1e-6)


def test_largest_takes_the_first_of_equals_in_order() -> None:
    assert largest(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 2.0]), 3).tolist() == [1, 2, 4]
    assert largest(torch.tensor([5.0, 1.0, 9.0]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("model_type", POPULAR)
def test_a_layer_that_does_nothing_is_cut_first(model_type: str, tmp_path: Path) -> None:
    model = tiny_family(model_type, tmp_path)
    with torch.no_grad():
        for parameter in block_list(model)[2].parameters():
            parameter.zero_()
    importance = measure(model, [windows(IDS[0].tolist())], width=False)
    assert importance.layers.argmin() == 2
    options = LayerCut(teacher="big", keep="by_importance", num_layers=3)
    assert options.layers(4, importance) == [0, 1, 3]


WIDE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def wide(model_type: str, folder: Path, **options: Any) -> Path:
    return save_tiny(folder, model_type=model_type, num_hidden_layers=3, **WIDE, **options)


def width_options(model_type: str) -> dict[str, Any]:
    biases = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"head_dim": 8}}
    return biases.get(model_type, {})


@pytest.mark.parametrize("model_type", WIDTH_TYPES)
@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2]], ids=str)
def test_a_narrow_model_equals_the_larger_one_with_zeros(
    model_type: str, layers: list[int], tmp_path: Path
) -> None:
    """Zero what is cut in the larger model, and scale its norms to the mean over fewer channels."""
    folder = wide(model_type, tmp_path / "m", rms_norm_eps=1e-30, **width_options(model_type))
    batches = [windows(IDS[0].tolist())]
    sizes = {"hidden_size": 20, "ffn": 40, "heads": 2}
    cuts = {"from_layers": {"keep": layers}, "from_width": sizes}
    student = bound(folder, batches=batches, **cuts)
    smaller = student.build(seed=0, where="student")
    text = smaller.config
    assert (text.hidden_size, text.intermediate_size) == (20, 40)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (2, 1, 8)
    larger: Any = AutoModelForCausalLM.from_pretrained(folder)
    importance = measure(larger, batches, width=True)
    for axis in (importance.channels, importance.units, importance.groups):
        assert axis is not None
    narrow(larger, importance)
    torch.testing.assert_close(
        logits(smaller), without_layers(larger, layers), rtol=1e-4, atol=1e-5
    )
    saved_as(smaller, tmp_path / "saved")


def narrow(model: Any, importance: Any) -> None:
    """Zero all but 20 channels, 40 units and 1 group by descending importance, in place."""

    def dropped(values: Tensor, count: int) -> list[int]:
        return sorted(range(len(values)), key=lambda i: -float(values[i]))[count:]

    channels = dropped(importance.channels, 20)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in ("norm", "input_layernorm", "post_attention_layernorm"):
                module.weight *= (20 / 32) ** 0.5
        model.model.embed_tokens.weight[:, channels] = 0
        for number, layer in enumerate(model.model.layers):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[channels] = 0
                if linear.bias is not None:
                    linear.bias[channels] = 0
            layer.mlp.down_proj.weight[:, dropped(importance.units[number], 40)] = 0
            for group in dropped(importance.groups[number], 1):
                layer.self_attn.o_proj.weight[:, group * 16 : group * 16 + 16] = 0


@pytest.mark.parametrize("model_type", WIDTH_TYPES)
def test_keeping_all_width_is_the_identity(model_type: str, tmp_path: Path) -> None:
    folder = wide(model_type, tmp_path / "m", **width_options(model_type))
    sizes = {"hidden_size": 32, "ffn": 64, "heads": 4}
    student = bound(folder, batches=[windows(IDS[0].tolist())], from_width=sizes)
    model = student.build(seed=0, where="student")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.config.head_dim = model.config.head_dim  # written out, by default it is derived
    plain.generation_config = model.generation_config
    assert_identical(model, plain)


@pytest.mark.parametrize(
    ("cuts", "where"),
    [
        ({"from_layers": {"keep": 4}}, "student.from_layers.keep: got 4; "),
        ({"from_layers": {"keep": [0, 3]}}, "student.from_layers.keep: got 3; "),
        (
            {"from_layers": {"keep": "by_importance", "num_layers": 5}},
            "student.from_layers.num_layers: got 5; ",
        ),
        ({"from_width": {"hidden_size": 33}}, "student.from_width.hidden_size: got 33; "),
        ({"from_width": {"hidden_size": 30}}, "student.from_width.hidden_size: got 30; "),
        ({"from_width": {"ffn": 65}}, "student.from_width.ffn: got 65; "),
        ({"from_width": {"heads": 6}}, "student.from_width.heads: got 6; "),
        ({"from_width": {"heads": 3}}, "student.from_width.heads: got 3; "),
    ],
    ids=str,
)
def test_sizes_are_refused_before_anything_is_loaded(
    cuts: dict[str, Any], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.models.loading.load_model", None)
    student = bound(wide("llama", tmp_path / "m"), **cuts)
    with refused(ModelError, where):
        student.check("student")


@pytest.mark.parametrize("model_type", sorted(INDEXED_TYPES)[:2])
def test_types_that_cannot_be_cut_are_refused(model_type: str, tmp_path: Path) -> None:
    tiny_family(model_type, tmp_path / "m")
    with refused(ModelError, f"student: {model_type} "):
        bound(tmp_path / "m", from_layers={"keep": 2}).check("student")


def test_a_family_without_one_list_of_layers_is_refused(tmp_path: Path) -> None:
    tiny_family("bart", tmp_path / "m")
    with refused(ModelError, "student: bart"):
        bound(tmp_path / "m", from_layers={"keep": 1}).check("student")


def test_a_teacher_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "mine"}')
    with refused(ModelError, "student: teacher `big` "):
        bound(tmp_path / "m", trust=True, from_layers={"keep": 1}).check("student")


def test_families_of_unknown_width_are_refused(tmp_path: Path) -> None:
    tiny_family("gpt2", tmp_path / "m")
    with refused(ModelError, "student.from_width: got a teacher of type gpt2; "):
        bound(tmp_path / "m", from_width={"ffn": 8}).check("student")


def test_layers_scaled_by_their_number_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt2", n_layer=3, n_embd=8, n_head=2, scale_attn_by_inverse_layer_idx=True
    )
    check_cut(config, Cut([0, 1]), where="student")
    with refused(ModelError, "student: gpt2 "):
        check_cut(config, Cut([0, 2]), where="student")


def test_a_mistake_in_the_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that no list names are compared with the larger model once it is loaded."""
    larger = tiny_family("diffllama", tmp_path)
    with refused(ModelError, "student: diffllama "):
        cut_model(larger, Cut([0, 3]), where="student")
    assert cut_model(larger, Cut([0, 1]), where="student")


def test_content_is_that_of_the_teacher(tmp_path: Path) -> None:
    one, other = (save_tiny(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    assert (
        bound(one, from_layers={"keep": 1}).content()
        != bound(other, from_layers={"keep": 1}).content()
    )


def test_sizes_are_known_without_weights(tmp_path: Path) -> None:
    folder = wide("qwen3", tmp_path / "m", head_dim=8)
    cuts = {"from_layers": {"keep": 2}, "from_width": {"hidden_size": 16, "ffn": 24, "heads": 2}}
    student = bound(folder, batches=[windows(IDS[0].tolist())], **cuts)
    student.check("student")
    facts = student.facts("student")
    model = student.build(seed=0, where="student")
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    assert dict(facts.tap_widths) == dict.fromkeys(
        ["embed", "layer_0", "layer_1", "final_prenorm", "final_postnorm"], 16
    )
    assert student.origins() == {"big": {"layer_0": "layer_0", "layer_1": "layer_2"}}
