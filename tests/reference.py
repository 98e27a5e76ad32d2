"""Naive reference for fusion: plain loops over Python floats, written from the formulas only.

Distributions are lists over V, teachers are lists over K, rows are lists over N: logits[k][t][v].
"""

from __future__ import annotations

import itertools
import math


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    scaled = [z / temperature for z in logits]
    top = max(scaled)
    total = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - total for z in scaled]


def entropy(logp: list[float]) -> float:
    return -math.fsum(math.exp(lp) * lp for lp in logp)


def softmax(scores: list[float]) -> list[float]:
    return [math.exp(lp) for lp in log_softmax(scores)]


def normalized(values: list[float]) -> list[float]:
    total = math.fsum(values)
    return [value / total for value in values]


def entropy_weights(entropies: list[float], form: str, tau: float) -> list[float]:
    """Weights of K teachers from their K entropies."""
    if len(entropies) == 1:
        return [1.0]
    if form == "softmax":
        return softmax([-h / tau for h in entropies])
    if form == "inverse":
        return normalized([1.0 / h for h in entropies])
    total = math.fsum(entropies)
    return [(1.0 - h / total) / (len(entropies) - 1) for h in entropies]


def interpolated(x: float, knots: list[list[float]]) -> float:
    """Interpolate linearly between the knots, constant beyond them."""
    if x <= knots[0][0]:
        return knots[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(knots):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return knots[-1][1]


def mean_distribution(logps: list[list[float]]) -> list[float]:
    return [math.fsum(math.exp(lp[v]) for lp in logps) / len(logps) for v in range(len(logps[0]))]


def consensus_kl(logps: list[list[float]]) -> list[float]:
    """KL of each of K distributions to their mean, at one row."""
    mean = mean_distribution(logps)
    return [
        math.fsum(math.exp(x) * (x - math.log(m)) for x, m in zip(lp, mean, strict=True))
        for lp in logps
    ]


def label_aware_weights(name: str, tau: float | None, ce: list[float]) -> list[float]:
    """Weights of K teachers from their (averaged) cross-entropies at one row."""
    if name == "ca_mkd":
        return [(1 - share) / (len(ce) - 1) for share in softmax(ce)] if len(ce) > 1 else [1.0]
    if name == "min_ce":
        return normalized([float(value == min(ce)) for value in ce])
    return softmax([math.exp(-value) if tau is None else -value / tau for value in ce])


def disagreement(logps: list[list[float]], weights: list[float]) -> float:
    """sum_k w_k KL(P_k || P) / H(w) at one row: disagreement as a fraction of its maximum."""
    weight_entropy = max(1e-3, -math.fsum(w * math.log(w) for w in weights if w > 0))
    mixture = [
        math.fsum(w * math.exp(lp[v]) for w, lp in zip(weights, logps, strict=True))
        for v in range(len(logps[0]))
    ]
    kl = [
        math.fsum(math.exp(x) * (x - math.log(m)) for x, m in zip(lp, mixture, strict=True))
        for lp in logps
    ]
    return math.fsum(w * x for w, x in zip(weights, kl, strict=True)) / weight_entropy


def pool(
    logps: list[list[float]], weights: list[float], kind: str, exponent: float = 0.5
) -> list[float]:
    """Log-probabilities of the pool of K distributions at one row."""
    if kind == "power_mean":
        powers = [
            math.fsum(w * math.exp(lp[v]) ** exponent for w, lp in zip(weights, logps, strict=True))
            for v in range(len(logps[0]))
        ]
        return [math.log(p) for p in normalized([power ** (1 / exponent) for power in powers])]
    if kind == "linear":
        probs = [
            math.fsum(w * math.exp(lp[v]) for w, lp in zip(weights, logps, strict=True))
            for v in range(len(logps[0]))
        ]
        return [math.log(p) if p > 0 else -math.inf for p in probs]
    mean = [
        math.fsum(w * lp[v] for w, lp in zip(weights, logps, strict=True))
        for v in range(len(logps[0]))
    ]
    return log_softmax(mean)


def constant_weight(weighting: dict, teacher: str, domain: str | None) -> float:
    """The weight of a teacher under a rule that reads no distribution, not normalized."""
    name, table = weighting["name"], weighting.get("weights", {})
    if name == "uniform":
        return 1.0
    if name == "best_single":
        return float(teacher == weighting["teacher"])
    if name == "route":
        return float(teacher == weighting["domains"].get(domain, weighting["default"]))
    return (table.get(domain, weighting["default"]) if name == "domain_weights" else table)[teacher]


Stats = tuple[float, float, float]
"""Entropy, log-probability of the label and of the most likely token."""


def row_weights(
    weighting: dict,
    stats: list[list[Stats | None]],
    logps: list[list[list[float]]],
    documents: list[int],
    names: list[str],
    domains: list[str] | None,
) -> list[dict[int, float]]:
    """Weight of each teacher k that answers row t; `stats[k][t]` is None where it does not.

    `logps[k][t]` is its distribution as it is pooled, which may be coarser than the one that the
    statistics describe.
    """
    name, num_rows = weighting["name"], len(documents)
    granularity = weighting.get("granularity", "sequence")

    def document(t: int) -> list[int]:
        return [s for s in range(num_rows) if documents[s] == documents[t]]

    def mean(k: int, t: int, column: int) -> float:
        group = {"token": [t], "sequence": document(t), "batch": list(range(num_rows))}
        known = [row for s in group[granularity] if (row := stats[k][s]) is not None]
        return math.fsum(row[column] for row in known) / len(known)

    def evidence(k: int, t: int) -> float:
        """Decayed label log-probabilities at earlier rows answered by all of the document."""
        present = [rows for rows in stats if any(rows[s] for s in document(t))]
        shared = [s for s in document(t) if s < t and all(rows[s] for rows in present)]
        decay = weighting["decay"]
        return math.fsum(decay ** (t - s) * (stats[k][s] or (0, 0, 0))[1] for s in shared)

    def gate_score(k: int, t: int, kl: float) -> float:
        entropy_k, _, max_k = stats[k][t] or (0, 0, 0)
        score = weighting["offsets"][names[k]] + weighting["consensus"] * kl
        score += weighting["entropy"] * entropy_k + weighting["max_logp"] * max_k
        return score - weighting["prefix_nll"] * evidence(k, t)

    def weights(here: list[int], t: int) -> list[float]:
        if name == "prefix_likelihood":
            return softmax([weighting["eta"] * evidence(k, t) for k in here])
        if name == "entropy":
            means = [mean(k, t, 0) for k in here]
            return entropy_weights(means, weighting["form"], weighting["tau"])
        if name == "calibrated_entropy":
            expected = [
                interpolated((stats[k][t] or (0,))[0], weighting["maps"][names[k]]) for k in here
            ]
            return softmax([-nll / weighting["tau"] for nll in expected])
        if name in ("ca_mkd", "min_ce", "avg_ce"):
            return label_aware_weights(name, weighting.get("tau"), [-mean(k, t, 1) for k in here])
        if name == "consensus":
            return softmax(
                [-kl / weighting["tau"] for kl in consensus_kl([logps[k][t] for k in here])]
            )
        if name == "gate":
            has_kl = weighting["consensus"] != 0
            kls = consensus_kl([logps[k][t] for k in here]) if has_kl else [0.0] * len(here)
            return softmax([gate_score(k, t, kl) for k, kl in zip(here, kls, strict=True)])
        domain = domains[t] if domains else None
        return normalized([constant_weight(weighting, names[k], domain) for k in here])

    answering = [[k for k, rows in enumerate(stats) if rows[t]] for t in range(num_rows)]
    return [dict(zip(here, weights(here, t), strict=True)) for t, here in enumerate(answering)]


def resolved_conflict(
    conflict: dict, weights: dict[int, float], logps: dict[int, list[float]], label_logp: dict
) -> tuple[float, dict[int, float]]:
    """Disagreement c of the teachers at one row, and their weights under the policy."""
    c = disagreement([logps[k] for k in weights], list(weights.values()))
    kept = weights
    if len(weights) == 1 or c <= conflict.get("threshold", math.inf):
        return (c if len(weights) > 1 else 0.0), weights
    if conflict["name"] == "follow_highest":
        kept = {k: w for k, w in weights.items() if w == max(weights.values())}
    else:
        least = max(label_logp[k] for k in weights) + math.log(conflict["share"])
        kept = {k: w for k, w in weights.items() if label_logp[k] >= least}
    return c, dict(zip(kept, normalized(list(kept.values())), strict=True))


def corrected(logp: list[float], label: int, margin: float) -> list[float]:
    """Mix in the label until it leads by the margin, where it is not the most likely token."""
    prob = [math.exp(lp) for lp in logp]
    gap = max(prob) - prob[label]
    share = (gap + margin) / (1 + gap) if gap > 0 else 0.0
    return [math.log((1 - share) * p + share * (v == label)) for v, p in enumerate(prob)]


def fuse_answers(
    recipe: dict,
    logps: list[list[list[float]]],
    stats: list[list[Stats | None]],
    labels: list[int],
    documents: list[int],
    names: list[str],
    domains: list[str] | None = None,
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Fuse distributions by the `fusion:` section of a recipe.

    Returns logp[t][v], weights[t][k], and the disagreement of each row, 0 without a policy.
    """
    conflict, disagreements, target = recipe.get("conflict"), [0.0] * len(labels), []
    all_weights = row_weights(recipe["weighting"], stats, logps, documents, names, domains)
    for t, weights in enumerate(all_weights):
        here = {k: logps[k][t] for k in weights}
        if conflict is not None:
            label_logp = {k: (stats[k][t] or (0, 0, 0))[1] for k in weights}
            resolved = resolved_conflict(conflict, weights, here, label_logp)
            disagreements[t], weights = resolved
            all_weights[t] = weights
        kind, exponent = recipe["pool"], recipe.get("exponent", 0.5)
        pooled = pool([here[k] for k in weights], list(weights.values()), kind, exponent)
        if recipe["pooled_temperature"] != 1.0:
            pooled = log_softmax(pooled, recipe["pooled_temperature"])
        if conflict is not None and conflict["name"] == "target_correction":
            pooled = corrected(pooled, labels[t], conflict["margin"])
        target.append(pooled)
    table = [[weights.get(k, 0.0) for k in range(len(names))] for weights in all_weights]
    return target, table, disagreements


def stats_of(logp: list[float], label: int) -> Stats:
    return entropy(logp), logp[label], max(logp)


def fuse(
    recipe: dict,
    logits: list[list[list[float]]],
    labels: list[int],
    documents: list[int],
    names: list[str],
    domains: list[str] | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Fuse complete answers: logp[t][v] and weights[t][k]."""
    temperatures = [recipe["temperatures"].get(n, 1.0) for n in names]
    logps = [
        [log_softmax(row, temperature) for row in rows]
        for rows, temperature in zip(logits, temperatures, strict=True)
    ]
    stats: list[list[Stats | None]] = [
        [stats_of(row, label) for row, label in zip(rows, labels, strict=True)] for rows in logps
    ]
    return fuse_answers(recipe, logps, stats, labels, documents, names, domains)[:2]


def em_weights(label_logp: list[list[float]], num_iterations: int) -> list[float]:
    """Weights of K teachers after EM steps from uniform weights, from label_logp[k][t]."""
    weights = [1.0 / len(label_logp)] * len(label_logp)
    num_rows = len(label_logp[0])
    for _ in range(num_iterations):
        explained = [0.0] * len(weights)
        for t in range(num_rows):
            joint = [w * math.exp(lp[t]) for w, lp in zip(weights, label_logp, strict=True)]
            explained = [e + j for e, j in zip(explained, normalized(joint), strict=True)]
        weights = [e / num_rows for e in explained]
    return weights


def gate_value(
    columns: dict[str, list[list[float]]],
    documents: list[int],
    offsets: list[float],
    coefficients: dict[str, float],
    *,
    decay: float,
    ridge: float,
) -> float:
    """Mean log sum_k w_k P_k(y) minus ridge / 2 |(a, s b)|^2.

    s_f is the root mean square of the centered feature f.
    """
    num_teachers, num_rows = len(offsets), len(documents)
    label_logp = columns["label_logp"]
    features = {name: columns[name] for name in ("entropy", "max_logp", "consensus")}
    features["prefix_nll"] = [
        [
            -math.fsum(decay ** (t - s) * lp[s] for s in range(t) if documents[s] == documents[t])
            for t in range(num_rows)
        ]
        for lp in label_logp
    ]
    spread = dict.fromkeys(features, 0.0)
    total = 0.0
    for t in range(num_rows):
        scores = list(offsets)
        for name, values in features.items():
            mean = math.fsum(value[t] for value in values) / num_teachers
            for k in range(num_teachers):
                scores[k] += coefficients[name] * (values[k][t] - mean)
                spread[name] += (values[k][t] - mean) ** 2 / (num_rows * num_teachers)
        weights = softmax(scores)
        total += math.log(
            math.fsum(w * math.exp(lp[t]) for w, lp in zip(weights, label_logp, strict=True))
        )
    penalty = math.fsum(a**2 for a in offsets)
    penalty += math.fsum(spread[name] * b**2 for name, b in coefficients.items())
    return total / num_rows - 0.5 * ridge * penalty


def expected_calibration_error(confidence: list[float], is_correct: list[bool], bins: int) -> float:
    """ECE over equal-mass bins of distinct confidences."""
    pairs = sorted(zip(confidence, is_correct, strict=True))
    error = 0.0
    for m in range(bins):
        inside = pairs[round(m * len(pairs) / bins) : round((m + 1) * len(pairs) / bins)]
        if inside:
            gap = math.fsum(hit - conf for conf, hit in inside) / len(inside)
            error += len(inside) / len(pairs) * abs(gap)
    return error
