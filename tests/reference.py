"""The naive truth about fusion: plain loops over Python floats, written from the formulas alone.

Distributions are lists over V, teachers are lists over K, rows are lists over N: logits[k][t][v].
"""

from __future__ import annotations

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
    """Each row's value replaced by the mean over the rows it is averaged with."""
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


def pool(logps: list[list[float]], weights: list[float], kind: str) -> list[float]:
    """Log-probabilities of the pool of K distributions at one row."""
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
) -> tuple[list[list[float]], list[list[float]]]:
    """(logp[t][v], weights[t][k]) of a fusion given as the `fusion:` section of a recipe."""
    temperatures = [recipe["temperatures"].get(n, 1.0) for n in names]
    logps = [
        [log_softmax(row, temperature) for row in rows]
        for rows, temperature in zip(logits, temperatures, strict=True)
    ]
    options = dict(recipe["weighting"])
    weights = row_weights(options.pop("name"), options, logps, labels, documents, names)
    target = []
    for t in range(len(labels)):
        pooled = pool([rows[t] for rows in logps], weights[t], recipe["pool"])
        target.append(log_softmax(pooled, recipe["pooled_temperature"]))
    return target, weights


def expected_calibration_error(confidence: list[float], is_correct: list[bool], bins: int) -> float:
    """Equal-mass bins of distinct confidences."""
    pairs = sorted(zip(confidence, is_correct, strict=True))
    error = 0.0
    for m in range(bins):
        inside = pairs[round(m * len(pairs) / bins) : round((m + 1) * len(pairs) / bins)]
        if inside:
            gap = math.fsum(hit - conf for conf, hit in inside) / len(inside)
            error += len(inside) / len(pairs) * abs(gap)
    return error
