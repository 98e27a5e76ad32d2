"""Generation: caches, padding, batches, stop tokens, seeds, and the fused target as a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from collegium.distributions import Answer, DenseRows
from collegium.evaluate import generation
from collegium.evaluate.generation import (
    Decoding,
    FusedSource,
    Prompt,
    SingleSource,
    generate,
    unsampled_reason,
)
from collegium.fusion import rules
from collegium.fusion.conflict import CONFLICTS
from collegium.fusion.fitted import WEIGHTINGS, DomainWeights, Fixed, Route
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.gate import Gate
from collegium.models.decode import has_exact_cache
from collegium.teachers.local import LocalTeacher
from collegium.teachers.readers import Rescorer, reader_of
from collegium.types import Rows, domain_number

V = 60
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_positions": 64},
    "gpt_neox": {},
    "qwen3": {"head_dim": 8},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
UNCACHED: dict[str, dict[str, Any]] = {"mamba": {"state_size": 4}}


def teacher(
    name: str = "a", seed: int = 0, model_type: str = "llama", **config: Any
) -> LocalTeacher:
    config = {"model_type": model_type, "seed": seed, **config}
    model = tiny.tiny_model(V, eos_token_id=7, **config)
    # Larger weights: a random model of this size is close to uniform and has near ties.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return LocalTeacher(name, model, vocab_size=V)


def some_prompts(number: int = 7, limit: int = 9, domain: str | None = None) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    prompts = []
    for i in range(number):
        ids = torch.randint(8, V, (2 + (5 * i) % 11,), generator=generator).tolist()
        prompts.append(Prompt(tuple(ids), limit - i % 3, domain))
    return prompts


def slow_greedy(one: LocalTeacher, prompt: Prompt, stops: Sequence[int]) -> list[int]:
    """One prompt, all tokens again at each step, without cache, mask or padding."""
    ids: list[int] = list(prompt.ids)
    while len(ids) - len(prompt.ids) < prompt.max_new_tokens:
        logits = one.model(torch.tensor([ids]), use_cache=False).logits[0, -1, :V]
        token = int((logits.double() * one.logit_scale).argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt.ids) :]


@pytest.mark.parametrize("family", [*FAMILIES, *UNCACHED])
def test_greedy_text_equals_full_forward_passes(family: str) -> None:
    one = teacher(model_type=family, **(FAMILIES | UNCACHED)[family])
    assert has_exact_cache(one.model, V) == (family in FAMILIES)
    assert isinstance(reader_of(one)(), Rescorer) == (family in UNCACHED)
    prompts = some_prompts()
    endless = [slow_greedy(one, prompt, [7]) for prompt in prompts]
    stop = endless[0][3]
    expected = [slow_greedy(one, prompt, [7, stop]) for prompt in prompts]
    decoding = Decoding(stops=frozenset([stop]), batch_size=3)
    assert generate(SingleSource(one), prompts, decoding) == expected
    assert expected != endless
    assert len({tuple(text) for text in expected}) > 3


def test_greedy_text_equals_that_of_transformers() -> None:
    one = teacher()
    prompt = some_prompts()[3]
    (text,) = generate(SingleSource(one), [prompt], Decoding())
    theirs = one.model.generate(
        torch.tensor([prompt.ids]), max_new_tokens=prompt.max_new_tokens, do_sample=False
    )[0, len(prompt.ids) :].tolist()
    assert text == [token for token in theirs if token != 7]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("is_fused", [False, True])
def test_batches_have_no_effect(temperature: float, is_fused: bool) -> None:
    teachers = [teacher("a"), teacher("b", seed=1, model_type="gpt2", n_positions=64)]
    source = FusedSource(Fusion(), teachers) if is_fused else SingleSource(teachers[0])
    prompts = some_prompts()
    whole = generate(source, prompts, Decoding(temperature=temperature, seed=5, batch_size=16))
    for size in (1, 3):
        decoding = Decoding(temperature=temperature, seed=5, batch_size=size)
        assert generate(source, prompts, decoding) == whole
        assert generate(source, prompts[::-1], decoding) == whole[::-1]
    other = generate(source, prompts, Decoding(temperature=temperature, seed=6))
    assert (other == whole) == (temperature == 0)


def test_draws_follow_the_distribution() -> None:
    """The frequencies of 4,000 seeds lie within 5 standard deviations of softmax(logits / T)."""
    one, size, temperature = teacher(), 4000, 0.3
    prompt = Prompt((9, 12, 30), 1)
    logits = one.model(torch.tensor([prompt.ids])).logits[0, -1].double()
    prob_V = (logits / temperature).softmax(-1)
    count_V = torch.zeros(V)
    for seed in range(size):
        choose = generation._chooser([prompt], Decoding(temperature=temperature, seed=seed))
        count_V[int(choose(logits[None], 0))] += 1
    sd_V = (size * prob_V * (1 - prob_V)).sqrt()
    assert bool(((count_V - size * prob_V).abs() <= 5 * sd_V + 1).all())


def test_a_scaled_teacher_with_stops_of_its_own() -> None:
    one = teacher()
    scaled = LocalTeacher("scaled", one.model, vocab_size=V, logit_scale=3.0)
    prompts = some_prompts(3)
    ids = torch.tensor([prompts[0].ids])
    is_token = torch.ones_like(ids, dtype=torch.bool)
    logits, scaled_logits = (reader_of(x)().read(ids, is_token) for x in (one, scaled))
    torch.testing.assert_close(scaled_logits, 3 * logits)
    one.model.generation_config.eos_token_id = [7, 20]
    assert SingleSource(one).stops == {7, 20}


GATE = Gate(offsets={"a": 0.3, "b": -0.2, "c": 0.0}, entropy=-0.4, consensus=-0.5, prefix_nll=-0.6)
RULES = {
    "uniform": rules.Uniform(),
    "best": rules.BestSingle(teacher="b"),
    "fixed": Fixed(weights={"a": 0.5, "b": 0.5, "c": 0.0}),
    "entropy": rules.Entropy(),
    "complement": rules.Entropy(form="complement"),
    "consensus": rules.Consensus(),
    "prefix": rules.PrefixLikelihood(eta=0.7, decay=0.8),
    "gate": GATE,
    "domains": DomainWeights(
        weights={"law": {"a": 0.1, "b": 0.2, "c": 0.7}}, default={"a": 1.0, "b": 0.0, "c": 0.0}
    ),
    "route": Route(default="a", domains={"law": "c"}),
}


def exact_fused(
    fusion: Fusion, teachers: list[LocalTeacher], ids: list[int], domain: str
) -> Tensor:
    """fuse() on the whole document, with its true labels, at the last row: (V,)."""
    size = len(ids)
    document = torch.zeros(size, dtype=torch.int64)
    rows = Rows(
        index=torch.arange(size),
        # The label of the last row is not known: any one must do.
        labels=torch.tensor([*ids[1:], 5]),
        documents=document,
        samples=document,
        domains=document + domain_number(domain),
    )
    answers = []
    for one in teachers:
        logits = one.model(torch.tensor([ids]), use_cache=False).logits[0, :, :V]
        answers.append(Answer(one.name, DenseRows(logits)))
    return fuse(fusion, answers, rows).block(slice(0, size)).logp()[-1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pool", ["linear", "log_linear"])
def test_the_fused_target_equals_fuse_on_the_whole_text(rule: str, pool: Any) -> None:
    fusion = Fusion(
        weighting=RULES[rule], pool=pool, temperatures={"a": 1.3}, pooled_temperature=0.9
    )
    teachers = [teacher(name, seed=i) for i, name in enumerate("abc")]
    prompts = [Prompt((9, 12, 30), 4, "law"), Prompt((8, 11, 50, 23, 14), 4, "law")]
    reader = FusedSource(fusion, teachers).reader(prompts)
    ids, is_token = generation._pad_left(prompts)
    texts = [list(prompt.ids) for prompt in prompts]
    for step in range(4):
        logp_BV = reader(ids, is_token)
        for text, logp_V in zip(texts, logp_BV, strict=True):
            torch.testing.assert_close(
                logp_V, exact_fused(fusion, teachers, text, "law"), rtol=1e-4, atol=1e-4
            )
        ids = torch.tensor([[17 + step], [9 + 3 * step]])
        is_token = torch.ones_like(ids, dtype=torch.bool)
        for text, token in zip(texts, ids[:, 0].tolist(), strict=True):
            text.append(token)


def test_rules_that_need_the_next_token_or_the_whole_text_are_named() -> None:
    one_each = {
        "ca_mkd": rules.ConfidenceAware(), "min_ce": rules.MinCE(), "avg_ce": rules.AvgCE(),
        "batch": rules.Entropy(granularity="batch"),
        "sequence": rules.Entropy(granularity="sequence"),
    }  # fmt: skip
    for rule in one_each.values():
        assert unsampled_reason(Fusion(weighting=rule))
    for rule in RULES.values():
        assert unsampled_reason(Fusion(weighting=rule)) is None
    assert {name for name, kind in WEIGHTINGS.items() if kind.uses_label} <= {*one_each}
    for name, policy in CONFLICTS.items():
        reason = unsampled_reason(Fusion(conflict=policy()))
        assert (reason is not None) == policy.uses_label, name


def test_a_text_costs_one_forward_pass_per_token_and_teacher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teachers = [teacher("a"), teacher("b", seed=1)]
    source = FusedSource(Fusion(), teachers)
    lengths: list[int] = []
    for one in teachers:
        body = one.model.model
        body.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
    (text,) = generate(source, [Prompt((9, 12, 30, 14), 6)], Decoding())
    assert lengths == [4, 4] + [1, 1] * (len(text) - (len(text) == 6))


def test_label_probabilities_of_the_fused_target() -> None:
    from collegium.data.collate import Collator
    from collegium.types import Batch

    teachers = [teacher("a"), teacher("b", seed=1)]
    ids = [9, 12, 30, 14]
    batch = Batch.from_inputs(Collator()([{"input_ids": ids, "labels": ids}]))
    logp_N = FusedSource(Fusion(weighting="uniform"), teachers).label_logp(batch, batch.rows())  # type: ignore[arg-type]
    probs = [one.model(torch.tensor([ids])).logits[0].double().softmax(-1) for one in teachers]
    for place, label in enumerate(ids[1:]):
        expected = math.log(float((probs[0][place, label] + probs[1][place, label]) / 2))
        assert float(logp_N[place]) == pytest.approx(expected, abs=1e-5)
    single = SingleSource(teachers[0]).label_logp(batch, batch.rows())
    assert float(single[1]) == pytest.approx(math.log(float(probs[0][1, 30])), abs=1e-5)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_a_nucleus_is_the_smallest_set_of_at_least_top_p(top_p: float) -> None:
    """Against every token in descending order until the sum is reached, in float64."""
    prob_BV = (3 * torch.randn(5, V, dtype=torch.float64)).softmax(-1)
    kept_BV = generation._nucleus(prob_BV, top_p)
    for prob_V, kept_V in zip(prob_BV.tolist(), kept_BV.tolist(), strict=True):
        total, expected = 0.0, [0.0] * V
        for token in sorted(range(V), key=lambda v: -prob_V[v]):
            expected[token] = prob_V[token]
            total += prob_V[token]
            if total >= top_p:
                break
        assert kept_V == expected


def test_draws_of_a_nucleus_are_inside_it() -> None:
    one, prompt = teacher(), Prompt((9, 12, 30), 1)
    logits = one.model(torch.tensor([prompt.ids])).logits[0, -1]
    inside = generation._nucleus(logits.double().softmax(-1)[None], 0.6)[0] > 0
    draws = set()
    for seed in range(300):
        choose = generation._chooser([prompt], Decoding(temperature=1.0, top_p=0.6, seed=seed))
        draws.add(int(choose(logits[None], 0)))
    assert 1 < int(inside.sum()) < V
    assert draws <= set(inside.nonzero().flatten().tolist())
