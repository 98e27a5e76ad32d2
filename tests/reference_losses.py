"""Reference losses: textbook formulas on float64 probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q) over the last axis, 0 log 0 = 0."""
    return torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), torch.zeros_like(p)).sum(-1)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return kl(p, q)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return kl(q, p)


def jensen_shannon(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive_kl(p: Tensor, q: Tensor, head: float = 0.5) -> Tensor:
    """Row by row: take tokens by falling probability until their mass reaches `head`."""
    rows = []
    for p_row, q_row in zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]), strict=True):
        gap, mass = {"head": 0.0, "tail": 0.0}, 0.0
        pairs = zip(p_row.tolist(), q_row.detach().tolist(), strict=True)
        for target, student in sorted(pairs, reverse=True):
            gap["head" if mass < head else "tail"] += abs(target - student)
            mass += target
        total = gap["head"] + gap["tail"] or 1.0
        both = gap["head"] * kl(p_row, q_row) + gap["tail"] * kl(q_row, p_row)
        rows.append(both / total)
    return torch.stack(rows).reshape(p.shape[:-1])


def logit_mse(p: Tensor, q: Tensor) -> Tensor:
    """Mean square over all pairs of tokens of the difference of log-odds, over two."""
    a, b = p.clamp(min=1e-300).log(), q.log()
    odds = (a[..., :, None] - a[..., None, :]) - (b[..., :, None] - b[..., None, :])
    return odds.square().mean((-1, -2)) / 2


def skewed_forward_kl(p: Tensor, q: Tensor, skew: float = 0.1) -> Tensor:
    return kl(p, skew * p + (1 - skew) * q)


def skewed_reverse_kl(p: Tensor, q: Tensor, skew: float = 0.1) -> Tensor:
    return kl(q, (1 - skew) * p + skew * q)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    return torch.maximum(p, q).sum(-1) - 0.5 * (p.sum(-1) + q.sum(-1))


def alpha_beta(p: Tensor, q: Tensor, a: float = 0.2, b: float = 0.7) -> Tensor:
    """Mean of the two powers of a + b minus the product of powers, over a b."""
    mean = (a * p ** (a + b) + b * q ** (a + b)) / (a + b)
    return ((mean - p**a * q**b) / (a * b)).sum(-1)


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "adaptive_kl": adaptive_kl,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
    "logit_mse": logit_mse,
    "alpha_beta": alpha_beta,
}


def logits(hidden, weight, bias=None, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    z = scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def objective(z, p, labels, *, kd_ratio: float, temperature: float, divergence: str) -> Tensor:
    """sum_n kd_ratio T^2 D(p^(1/T) / Z, softmax(z / T)) + (1 - kd_ratio) CE for a target p."""
    tempered = p ** (1 / temperature)
    tempered = tempered / tempered.sum(-1, keepdim=True)
    kd = DIVERGENCES[divergence](tempered, (z / temperature).softmax(-1)).sum()
    ce = -z.softmax(-1).log()[torch.arange(len(labels)), labels].sum()
    return kd_ratio * temperature**2 * kd + (1 - kd_ratio) * ce


def feature_mse(ours, theirs, adapter) -> Tensor:
    """Mean over the width of the squared difference of RMS-normalized states, per row."""
    a = ours @ adapter.T
    a = a / a.square().mean(-1, keepdim=True).sqrt()
    b = theirs / theirs.square().mean(-1, keepdim=True).sqrt()
    return ((a - b) ** 2).mean(-1)


def feature_sum_of_squares(ours, theirs, adapter) -> Tensor:
    """|W f - g|^2 of each row, one entry after the other."""
    rows = []
    for f, g in zip(ours.double(), theirs.double(), strict=True):
        mapped = [sum(w * x for w, x in zip(row, f, strict=True)) for row in adapter.double()]
        rows.append(sum((a - b) ** 2 for a, b in zip(mapped, g, strict=True)))
    return torch.stack(rows)


def linear_cka(x, y) -> Tensor:
    """<K, L> / (|K| |L|) of the centered Gram matrices K = X X^T and L = Y Y^T."""
    size = len(x)
    center = torch.eye(size, dtype=x.dtype) - 1 / size
    gram_x, gram_y = (center @ (a @ a.T) @ center for a in (x, y))
    return (gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())


def feature_cosine(ours, theirs, adapter) -> Tensor:
    return 1 - torch.cosine_similarity(ours @ adapter.T, theirs, dim=-1)


def attention_scores(states, t: int, s: int) -> Tensor:
    """One score per head of queries: scale q_t k_s, capped."""
    heads, shared = states.query.shape[1], states.key.shape[1]
    scores = []
    for h in range(heads):
        key = states.key[s, h // (heads // shared)].double()
        score = states.scale * (states.query[t, h].double() * key).sum()
        cap = states.softcap
        scores.append(score if cap is None else cap * torch.tanh(score / cap))
    return torch.stack(scores)


def attention(ours, theirs, start: int, t: int, loss: str) -> Tensor:
    """Value at position t of a document that starts at `start`."""
    a, b = (
        torch.stack([attention_scores(x, t, s) for s in range(start, t + 1)], 1)
        for x in (ours, theirs)
    )
    is_mean = len(a) != len(b)
    if loss == "kl":
        a, b = a.softmax(1), b.softmax(1)
    if is_mean:
        a, b = a.mean(0, keepdim=True), b.mean(0, keepdim=True)
    return ((a - b) ** 2).mean() if loss == "mse" else kl(b, a).mean()


def relations(ours, theirs, start: int, t: int, kinds, num_heads: int) -> Tensor:
    """Mean over kinds and relation heads of the KL from teacher to student at position t."""
    values = []
    for kind in kinds:
        rows = []
        for states in (ours, theirs):
            vectors = getattr(states, kind).double().flatten(1)
            width = vectors.shape[1] // num_heads
            for r in range(num_heads):
                part = vectors[:, r * width : (r + 1) * width]
                products = [(part[t] * part[s]).sum() for s in range(start, t + 1)]
                rows.append((torch.stack(products) / width**0.5).softmax(0))
        values += [kl(rows[num_heads + r], rows[r]) for r in range(num_heads)]
    return torch.stack(values).mean()
