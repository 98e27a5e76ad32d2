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


def averaged(values: list[float], documents: list[int], granularity: str) -> list[float]:
    """Replace each row's value by the mean over its group of rows."""
    result = []
    for t in range(len(values)):
        if granularity == "token":
            group = [values[t]]
        elif granularity == "batch":
            group = values
        else:
            group = [v for v, d in zip(values, documents, strict=True) if d == documents[t]]
        result.append(math.fsum(group) / len(group))
    return result


def prefix_weights(
    label_logp: list[list[float]], documents: list[int], eta: float, decay: float
) -> list[list[float]]:
    """weights[t][k] from label_logp[k][t]."""
    result = []
    for t in range(len(documents)):
        scores = []
        for logp in label_logp:
            earlier = [s for s in range(t) if documents[s] == documents[t]]
            scores.append(eta * math.fsum(decay ** (t - s) * logp[s] for s in earlier))
        result.append(softmax(scores))
    return result


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


def gate_weights(
    logps: list[list[list[float]]],
    labels: list[int],
    documents: list[int],
    names: list[str],
    options: dict,
) -> list[list[float]]:
    """weights[t][k] of the learned gate."""
    result = []
    for t in range(len(labels)):
        kl = consensus_kl([rows[t] for rows in logps])
        scores = [options["offsets"][name] for name in names]
        columns = {
            "entropy": [entropy(rows[t]) for rows in logps],
            "max_logp": [max(rows[t]) for rows in logps],
            "consensus": kl,
            "prefix_nll": [
                -math.fsum(
                    options["decay"] ** (t - s) * rows[s][labels[s]]
                    for s in range(t)
                    if documents[s] == documents[t]
                )
                for rows in logps
            ],
        }
        for name, values in columns.items():
            mean = math.fsum(values) / len(values)
            for k, value in enumerate(values):
                scores[k] += options[name] * (value - mean)
        result.append(softmax(scores))
    return result


def label_aware_weights(name: str, options: dict, ce: list[list[float]]) -> list[list[float]]:
    """weights[t][k] from the (averaged) cross-entropies ce[k][t]."""
    result = []
    for t in range(len(ce[0])):
        here = [values[t] for values in ce]
        if name == "ca_mkd":
            shares = softmax(here)
            others = max(1, len(here) - 1)
            result.append([(1 - share) / others for share in shares] if len(here) > 1 else [1.0])
        elif name == "min_ce":
            result.append(normalized([float(value == min(here)) for value in here]))
        elif options["tau"] is None:
            result.append(softmax([math.exp(-value) for value in here]))
        else:
            result.append(softmax([-value / options["tau"] for value in here]))
    return result


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
        return [
            math.log(math.fsum(w * math.exp(lp[v]) for w, lp in zip(weights, logps, strict=True)))
            for v in range(len(logps[0]))
        ]
    mean = [
        math.fsum(w * lp[v] for w, lp in zip(weights, logps, strict=True))
        for v in range(len(logps[0]))
    ]
    return log_softmax(mean)


def row_weights(
    name: str,
    options: dict,
    logps: list[list[list[float]]],
    labels: list[int],
    documents: list[int],
    names: list[str],
    domains: list[str] | None = None,
) -> list[list[float]]:
    """weights[t][k] of the rule called `name`, from logps[k][t][v]."""
    num_teachers, num_rows = len(logps), len(labels)
    if name == "uniform":
        return [[1.0 / num_teachers] * num_teachers for _ in range(num_rows)]
    if name == "fixed":
        return [normalized([options["weights"][n] for n in names]) for _ in range(num_rows)]
    if name == "best_single":
        return [[float(n == options["teacher"]) for n in names] for _ in range(num_rows)]
    if name == "prefix_likelihood":
        label_logp = [[rows[t][labels[t]] for t in range(num_rows)] for rows in logps]
        return prefix_weights(label_logp, documents, options["eta"], options["decay"])
    if name == "domain_weights":
        tables = [options["weights"].get(d, options["default"]) for d in domains or []]
        return [normalized([table[n] for n in names]) for table in tables]
    if name == "route":
        chosen = [options["domains"].get(d, options["default"]) for d in domains or []]
        return [[float(n == teacher) for n in names] for teacher in chosen]
    if name == "calibrated_entropy":
        scores = [
            [-interpolated(entropy(row), options["maps"][n]) / options["tau"] for row in rows]
            for n, rows in zip(names, logps, strict=True)
        ]
        return [softmax([values[t] for values in scores]) for t in range(num_rows)]
    if name == "consensus":
        divergences = [consensus_kl([rows[t] for rows in logps]) for t in range(num_rows)]
        return [softmax([-kl / options["tau"] for kl in row]) for row in divergences]
    if name == "gate":
        return gate_weights(logps, labels, documents, names, options)
    if name in ("ca_mkd", "min_ce", "avg_ce"):
        granularity = options.get("granularity", "sequence")
        ce = [[-rows[t][labels[t]] for t in range(num_rows)] for rows in logps]
        means = [averaged(values, documents, granularity) for values in ce]
        return label_aware_weights(name, options, means)
    means = [
        averaged([entropy(row) for row in rows], documents, options["granularity"])
        for rows in logps
    ]
    return [
        entropy_weights([mean[t] for mean in means], options["form"], options["tau"])
        for t in range(num_rows)
    ]


def fuse(
    recipe: dict,
    logits: list[list[list[float]]],
    labels: list[int],
    documents: list[int],
    names: list[str],
    domains: list[str] | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Fuse by the `fusion:` section of a recipe, without its conflict policy.

    Returns logp[t][v] and weights[t][k].
    """
    temperatures = [recipe["temperatures"].get(n, 1.0) for n in names]
    logps = [
        [log_softmax(row, temperature) for row in rows]
        for rows, temperature in zip(logits, temperatures, strict=True)
    ]
    options = dict(recipe["weighting"])
    name = options.pop("name")
    weights = row_weights(name, options, logps, labels, documents, names, domains)
    exponent = recipe.get("exponent", 0.5)
    target = []
    for t in range(len(labels)):
        pooled = pool([rows[t] for rows in logps], weights[t], recipe["pool"], exponent)
        target.append(log_softmax(pooled, recipe["pooled_temperature"]))
    return target, weights


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
