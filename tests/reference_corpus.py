"""Naive datasets: all documents in memory, sorted, encoded one by one, and laid out with loops.

The columns and the fingerprint are those of version 0.1, which stored caches depend on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from itertools import chain

import numpy as np

from collegium.data.encode import Encoder
from collegium.data.sources import read_documents
from collegium.types import IGNORE, domain_number, teacher_number


def seeded(document, seed, purpose):
    text = f"{purpose}:{seed}:{document.content_hash()}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def reference_windows(options, tokenizer, part):
    """Return (windows, fingerprint, names, stops) of a part. A window is a dict of lists."""
    documents = [d for source in options.sources[part] for d in read(source)]
    if not documents:
        documents = [d for source in options.train for d in read(source)]
    if part == "train" or not options.sources[part]:
        documents = [d for d in documents if split(d, options) == part]
    seed = options.split_seed
    documents.sort(key=lambda d: (seeded(d, seed, "order"), d.id, d.domain))
    encoder = Encoder(
        tokenizer,
        max_length=options.max_length,
        truncate=options.truncate,
        special_tokens=options.special_tokens,
        date=options.date,
        where="data",
    )
    encoded = {}
    for number, document in enumerate(documents):
        (outcome,) = encoder.encode([document])
        if outcome.encoded is not None:
            encoded[number] = outcome.encoded
    limit = getattr(options, f"max_{part}_tokens")
    if limit is not None:
        encoded = balanced(encoded, documents, limit)
    chosen = [documents[number] for number in encoded]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    windows = laid_out([*encoded.values()], options, pad)
    stops = {tokenizer.eos_token_id, *chain.from_iterable(e.stops for e in encoded.values())}
    return labeled(windows, chosen), digest(windows, chosen), [d.id for d in chosen], sorted(stops)


def read(source):
    return list(read_documents(source, where="data"))


def split(document, options):
    share = seeded(document, options.split_seed, "split") / 2**64
    validation = 0.0 if options.validation else options.validation_fraction
    calibration = 0.0 if options.calibration else options.calibration_fraction
    if share < validation:
        return "validation"
    return "calibration" if share < validation + calibration else "train"


def balanced(encoded, documents, limit):
    queues = defaultdict(list)
    for number in encoded:
        queues[documents[number].domain].append(number)
    used, room, taken = dict.fromkeys(queues, 0), limit, {}
    while queues and room >= 2:
        name = min(queues, key=lambda domain: (used[domain], domain))
        if not queues[name]:
            del queues[name]
            continue
        number = queues[name].pop(0)
        one = encoded[number]
        level = (room + sum(used[domain] for domain in queues)) // len(queues)
        share = min(room, max(2, level - used[name])) if one.can_split else room
        if len(one) > share and not one.can_split:
            del queues[name]
            continue
        taken[number] = one.part(slice(share))
        used[name] += len(taken[number])
        room -= len(taken[number])
    return dict(sorted(taken.items()))


def laid_out(encoded, options, pad):
    windows, room = [], 0
    for number, document in enumerate(encoded):
        start, stop = 0, 0
        while stop < len(document):
            size = len(document)
            if room < (min(2, size) if document.can_split else size):
                windows.append([])
                room = options.max_length
            stop = min(size, start + room)
            for at in range(start, stop):
                is_first, is_repeat = at == start, at == start and start > 0
                windows[-1].append(
                    {
                        "input_ids": int(document.ids[at]),
                        "position_ids": at - start,
                        "sample_ids": number,
                        "num_bytes": 0 if is_repeat else int(document.num_bytes[at]),
                        "is_target": bool(document.is_target[at]) and not is_first,
                        "is_repeat": is_repeat,
                    }
                )
            room = room - (stop - start) if options.packing else 0
            start = stop - 1
    for window in windows if options.packing else ():
        for position in range(options.max_length - len(window)):
            window.append(
                {
                    "input_ids": pad,
                    "position_ids": position,
                    "sample_ids": -1,
                    "num_bytes": 0,
                    "is_target": False,
                    "is_repeat": False,
                }
            )
    order = sorted(range(len(windows)), key=lambda i: splitmix(i, len(windows), options.split_seed))
    return [windows[i] for i in order]


def splitmix(index, count, seed):
    mask = 2**64 - 1
    z = (index + 1 + (seed % 2**64) * (count + 1)) & mask
    z = (z * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def labeled(windows, chosen):
    has_teachers = any(d.teacher is not None for d in chosen)
    items = []
    for window in windows:
        item = {
            name: [token[name] for token in window]
            for name in ("input_ids", "position_ids", "sample_ids", "num_bytes")
        }
        item["labels"] = [t["input_ids"] if t["is_target"] else IGNORE for t in window]
        documents = [None if t["sample_ids"] < 0 else chosen[t["sample_ids"]] for t in window]
        item["domain_ids"] = [0 if d is None else domain_number(d.domain) for d in documents]
        if has_teachers:
            item["teacher_ids"] = [
                0 if d is None or d.teacher is None else teacher_number(d.teacher)
                for d in documents
            ]
        items.append(item)
    return items


def digest(windows, chosen):
    types = {"is_repeat": bool, "is_target": bool}
    sha = hashlib.sha256()
    names = ("input_ids", "is_repeat", "is_target", "num_bytes", "position_ids", "sample_ids")
    for name in names:
        values = [token[name] for window in windows for token in window]
        sha.update(name.encode())
        sha.update(np.array(values, types.get(name, np.int32)).tobytes())
    sha.update(np.cumsum([0, *map(len, windows)]).astype(np.int64).tobytes())
    domains = sorted({d.domain for d in chosen})
    sha.update(np.array([domains.index(d.domain) for d in chosen], np.int64).tobytes())
    sha.update("\0".join(domains).encode())
    if any(d.teacher is not None for d in chosen):
        numbers = [0 if d.teacher is None else teacher_number(d.teacher) for d in chosen]
        sha.update(np.array([*numbers, 0], np.int64).tobytes())
    return sha.hexdigest()
