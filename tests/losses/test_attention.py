"""Attention and relation terms against naive references, and against the models themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import reference_losses
from collegium.distributions import Answer, DenseRows, HiddenRows
from collegium.errors import ModelError, RecipeError, TrainingError
from collegium.losses.attention import AttentionLoss, RelationLoss, _log_softmax, _scores
from collegium.losses.pairing import AttentionOptions, RelationOptions
from collegium.models.forward import forward_rows
from collegium.models.loading import enable_checkpointing
from collegium.types import IGNORE, AttentionStates, Batch, Head, Rows, map_tensors
from refusals import refused
from tiny import tiny_model

LENGTHS = [[4, 1, 3], [2, 6]]
"""Documents of two windows of eight tokens."""
V = 40
LAYERS = {"layer_0": 8, "layer_1": 8}


def batch_of(lengths: list[list[int]] = LENGTHS, *, prompt: int = 0, seed: int = 0) -> Batch:
    """Windows of documents, the first tokens of which are no targets."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.tensor([[t for n in row for t in range(n)] for row in lengths])
    ids = torch.randint(V, place.shape, generator=generator)
    sample = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    return Batch(ids, place, ids.masked_fill(place < prompt, IGNORE), sample)


def starts(batch: Batch) -> torch.Tensor:
    """(M,) start of the document of each position."""
    place = torch.arange(batch.input_ids.numel()).view_as(batch.input_ids)
    return (place - batch.position_ids).flatten()


def states(
    batch: Batch, heads: int, shared: int, width: int, *, seed: int, softcap: float | None = None
) -> AttentionStates:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        shape = batch.input_ids.numel(), count, width
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = draw(heads), draw(shared), draw(shared)
    return AttentionStates(query, key, value, starts(batch), 0.4, softcap)


def student_of(attention: AttentionStates) -> HiddenRows:
    head = Head(torch.zeros(2, 1))
    return HiddenRows(torch.zeros(1, 1), head, attention={"attention_1": attention})


def answer_of(attention: AttentionStates, name: str = "t") -> Answer:
    return Answer(name, DenseRows(torch.zeros(1, 2)), attention={"attention_1": attention})


def value_of(loss: Any, ours: AttentionStates, theirs: AttentionStates, rows: Rows) -> Any:
    (value,) = loss(student_of(ours), [answer_of(theirs)], rows).values()
    return value


def tensors(attention: AttentionStates) -> list[torch.Tensor]:
    return [attention.query, attention.key, attention.value]


SHAPES = [((4, 2, 3), (4, 4, 5)), ((4, 2, 3), (2, 1, 6)), ((3, 3, 4), (3, 1, 4))]


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_attention_equals_the_formula(ours, theirs, loss, softcap, prompt):
    batch = batch_of(prompt=prompt)
    rows = batch.rows()
    left = states(batch, *ours, seed=1, softcap=softcap)
    right = states(batch, *theirs, seed=2)
    term = AttentionLoss(AttentionOptions(layers="last", loss=loss), LAYERS, {"t": LAYERS})
    value_N = value_of(term, left, right, rows)
    begins = starts(batch)
    truth_N = torch.stack(
        [reference_losses.attention(left, right, int(begins[t]), int(t), loss) for t in rows.index]
    )
    torch.testing.assert_close(value_N, truth_N, rtol=1e-10, atol=1e-12)
    grads, expected = (
        torch.autograd.grad(x.square().sum(), tensors(left)[:2]) for x in (value_N, truth_N)
    )
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert all(x.grad is None for x in tensors(right))


@pytest.mark.parametrize("prompt", [0, 3])
@pytest.mark.parametrize("kinds", [["query", "key", "value"], ["value"], ["key", "query"]])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_relations_equal_the_formula(kinds, num_heads, prompt):
    batch = batch_of(prompt=prompt)
    rows, begins = batch.rows(), starts(batch)
    left, right = states(batch, 4, 2, 3, seed=1), states(batch, 3, 1, 6, seed=2)
    options = RelationOptions(relations=kinds, num_heads=num_heads)
    value_N = value_of(RelationLoss(options, LAYERS, {"t": LAYERS}), left, right, rows)
    truth_N = torch.stack(
        [
            reference_losses.relations(left, right, int(begins[t]), int(t), kinds, num_heads)
            for t in rows.index
        ]
    )
    torch.testing.assert_close(value_N, truth_N, rtol=1e-10, atol=1e-12)
    read = [getattr(left, kind) for kind in kinds]
    grads, expected = (torch.autograd.grad(x.square().sum(), read) for x in (value_N, truth_N))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_relation_heads_split_no_attention_head_by_default():
    batch = batch_of()
    left, right = states(batch, 4, 2, 3, seed=1), states(batch, 6, 2, 5, seed=2)
    for kinds, num_heads in ((["query"], 2), (["key"], 2)):
        values = [
            value_of(
                RelationLoss(
                    RelationOptions(relations=kinds, num_heads=number), LAYERS, {"t": LAYERS}
                ),
                left,
                right,
                batch.rows(),
            )
            for number in (None, num_heads)
        ]
        torch.testing.assert_close(*values)


def test_relation_heads_must_divide_the_width():
    batch = batch_of()
    left, right = states(batch, 4, 2, 3, seed=1), states(batch, 4, 2, 3, seed=2)
    term = RelationLoss(RelationOptions(num_heads=5), LAYERS, {"t": LAYERS})
    with refused(RecipeError, "relations.num_heads: "):
        value_of(term, left, right, batch.rows())


@pytest.mark.parametrize("term", ["attention", "relations"])
def test_a_student_equal_to_its_teacher_is_at_rest(term):
    batch = batch_of()
    left = states(batch, 4, 2, 3, seed=1)
    for loss in losses(term):
        value_N = value_of(loss, left, left, batch.rows())
        assert value_N.abs().max() < 1e-12
        (grad,) = torch.autograd.grad(value_N.sum(), left.key)
        assert grad.abs().max() < 1e-12


def losses(term: str) -> list[Any]:
    if term == "relations":
        return [RelationLoss(RelationOptions(), LAYERS, {"t": LAYERS})]
    return [
        AttentionLoss(AttentionOptions(layers="last", loss=loss), LAYERS, {"t": LAYERS})
        for loss in ("mse", "kl")
    ]


def test_no_rows_keep_a_graph():
    batch = batch_of()
    left, right = states(batch, 4, 2, 3, seed=1), states(batch, 2, 2, 3, seed=2)
    for loss in (*losses("attention"), *losses("relations")):
        value_N = value_of(loss, left, right, batch.rows().part(slice(0, 0)))
        assert value_N.shape == (0,)
        assert value_N.sum().requires_grad


def test_layers_are_blocks():
    with refused(RecipeError, "attention.layers: "):
        AttentionLoss(
            AttentionOptions(layers={"embed": "layer_0"}), {"embed": 4, **LAYERS}, {"t": LAYERS}
        )
    term = AttentionLoss(AttentionOptions(num_layers=2), LAYERS, {"t": LAYERS})
    assert term.student_taps == ["attention_0", "attention_1"]
    assert term.teacher_taps("t") == ["attention_0", "attention_1"]


def test_a_teacher_without_attention_is_named():
    batch = batch_of()
    left = states(batch, 4, 2, 3, seed=1)
    answer = dataclasses.replace(answer_of(left), attention={})
    with refused(TrainingError, "attention/t: "):
        losses("attention")[0](student_of(left), [answer], batch.rows())


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {},
    "gpt_neox": {},
    "gemma2": {"head_dim": 8, "sliding_window": 64, "attn_logit_softcapping": 0.05},
    "phi3": {},
}


@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        (family, kernel)
        for family in FAMILIES
        # The cap of Gemma 2 exists in its eager kernel only.
        for kernel in ("eager", "sdpa")[: 1 if family == "gemma2" else 2]
    ],
)
def test_scores_are_those_of_the_model(family, kernel):
    """A softmax of the recorded scores gives the attention that the model reports."""
    model = tiny_model(V, model_type=family, **FAMILIES[family]).double()
    batch = batch_of([[8], [8]])
    model.set_attn_implementation("eager")
    truth = model(input_ids=batch.input_ids, output_attentions=True).attentions
    model.set_attn_implementation(kernel)
    taps = ["attention_0", "attention_1"]
    rows = batch.rows()
    found = forward_rows(model, batch, rows, vocab_size=V, taps=taps).attention
    for layer, tap in enumerate(taps):
        for window in range(2):
            at_n, keys = torch.arange(8) + 8 * window, slice(8 * window, 8 * window + 8)
            is_past = torch.ones(8, 8, dtype=torch.bool).tril()
            logp = _log_softmax(_scores(found[tap], at_n, keys), is_past)
            # float32 inside of the model's softmax
            torch.testing.assert_close(
                (logp.exp() * is_past), truth[layer][window], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_packed_documents_have_the_values_of_single_ones(family):
    """Also with prompts, which are no rows, and for each value and gradient of the student."""
    models = [tiny_model(V, seed=seed, model_type=family).double() for seed in (1, 2)]
    packed = batch_of([[5, 4, 3]], prompt=2)
    flat = map_tensors(packed, lambda x: x.flatten())
    parts = [(0, 5), (5, 9), (9, 12)]
    single = [map_tensors(flat, lambda x, a=a, b=b: x[None, a:b]) for a, b in parts]
    for loss in (*losses("attention"), *losses("relations")):
        values, grads = [], []
        for batches in ([packed], single):
            values.append(torch.cat([run(loss, *models, batch) for batch in batches]))
            weights = [p for n, p in models[0].named_parameters() if "layers.0" in n]
            grads.append(torch.autograd.grad(values[-1].sum(), weights, allow_unused=True))
        torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-12)
        assert any(grad is not None and grad.abs().max() > 0 for grad in grads[0])
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def run(loss: Any, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
    rows = batch.rows()
    ours = forward_rows(student, batch, rows, vocab_size=V, taps=loss.student_taps)
    with torch.no_grad():
        theirs = forward_rows(teacher, batch, rows, vocab_size=V, taps=loss.teacher_taps("t"))
    answer = Answer("t", theirs, attention=theirs.attention)
    (value,) = loss(ours, [answer], rows).values()
    return value


def test_checkpointed_blocks_have_the_same_gradient():
    teacher, loss = tiny_model(V, seed=2).double(), losses("attention")[0]
    grads = []
    for is_checkpointed in (False, True):
        student = tiny_model(V, seed=1).double().train()
        if is_checkpointed:
            enable_checkpointing(student)
        run(loss, student, teacher, batch_of()).sum().backward()
        grads.append([p.grad for n, p in student.named_parameters() if "q_proj" in n])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)


def test_recording_leaves_no_trace():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    model, batch = tiny_model(V), batch_of()
    plain = forward_rows(model, batch, batch.rows(), vocab_size=V)
    tapped = forward_rows(model, batch, batch.rows(), vocab_size=V, taps=["attention_1"])
    assert torch.equal(plain.hidden, tapped.hidden)
    assert list(tapped.attention) == ["attention_1"]
    assert before == ALL_ATTENTION_FUNCTIONS._local_mapping


def test_attention_that_cannot_be_read_is_refused():
    batch = batch_of([[8]])
    bloom = tiny_model(V, model_type="bloom", n_head=4)
    with refused(ModelError, "bloom: "):
        forward_rows(bloom, batch, batch.rows(), vocab_size=V, taps=["attention_0"])
    gemma = tiny_model(V, model_type="gemma2", head_dim=8, sliding_window=4)
    with refused(ModelError, "attention: "):
        forward_rows(gemma, batch, batch.rows(), vocab_size=V, taps=["attention_0"])
    with refused(ModelError, "llama: "):
        forward_rows(tiny_model(V), batch, batch.rows(), vocab_size=V, taps=["attention_9"])
