"""Text generation by a model, or by the fused target of several teachers, for a batch of prompts.

Every token costs one forward pass per model over that token, with key-value caches. Greedy
decoding takes the most likely token. Sampling draws from softmax(logits / temperature) with random
numbers that depend on the seed and the prompt only, so the order and the size of the batches have
no effect beyond the rounding of the logits.

Shapes: B prompts, T tokens so far with padding on the left, K teachers, V vocabulary, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from collegium.console import OnProgress
from collegium.distributions import Answer, DenseRows, Teacher
from collegium.errors import ModelError
from collegium.evaluate.scoring import FUSED, blocks_of
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.pools import TeacherReader
from collegium.fusion.rules import Entropy
from collegium.fusion.weighting import RowStats, Weighting
from collegium.models.loading import choose_device
from collegium.models.saving import stop_ids
from collegium.options import option, plain
from collegium.storage.files import fingerprint
from collegium.teachers.local import LocalTeacher
from collegium.teachers.readers import TokenReader, reader_of
from collegium.types import Batch, Rows, domain_number, teacher_number


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to continue."""

    ids: tuple[int, ...]
    max_new_tokens: int
    domain: str | None = None
    """Domain of its document, for weights by domain."""
    teacher: str | None = None
    """Teacher that its document names, for `route`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Settings of a generation."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of the most likely tokens with at least this probability."""
    seed: int = 0
    stops: frozenset[int] = frozenset()
    """Ids that end a text, besides those of the model."""
    batch_size: int = 16
    """Prompts per forward pass."""


ReadNext = Callable[[Tensor, Tensor], Tensor]
"""Appends (B, t) ids and bool, False for padding, and returns the logits (B, V) after the last."""


class TokenSource(Protocol):
    """A distribution over the next token that texts are generated from."""

    @property
    def name(self) -> str: ...

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end a text."""
        ...

    def reader(self, prompts: Sequence[Prompt]) -> ReadNext:
        """Return a reader for a batch of prompts that has read nothing."""
        ...


class TextSource(TokenSource, Protocol):
    """A source that scores given texts as well."""

    def label_logp(self, batch: Batch, rows: Rows) -> Tensor:
        """Return the log-probability of the label of each row, (N,)."""
        ...


class SingleSource:
    """A single model."""

    def __init__(self, teacher: Teacher) -> None:
        self.name = teacher.name
        self.stops = _stops_of(teacher)
        self._teacher = teacher
        self._make_reader = reader_of(teacher)

    def reader(self, prompts: Sequence[Prompt]) -> ReadNext:
        read = self._make_reader().read
        return lambda ids_Bt, is_token_Bt: read(ids_Bt, is_token_Bt, 1)[:, -1]

    def label_logp(self, batch: Batch, rows: Rows) -> Tensor:
        scores = self._teacher.score(batch, rows).distribution
        parts = [
            _label_logp(scores.logits(block), rows.labels[block])
            for block in blocks_of(rows, scores)
        ]
        return torch.cat(parts)


class FusedSource:
    """The fused target of several teachers, all in memory."""

    name = FUSED

    def __init__(self, fusion: Fusion, teachers: Sequence[Teacher]) -> None:
        self.stops = frozenset[int]().union(*map(_stops_of, teachers))
        self._fusion = fusion
        self._teachers = teachers
        self._make_readers = {teacher.name: reader_of(teacher) for teacher in teachers}

    def reader(self, prompts: Sequence[Prompt]) -> ReadNext:
        readers = {name: make() for name, make in self._make_readers.items()}
        return FusedReader(self._fusion, readers, prompts)

    def label_logp(self, batch: Batch, rows: Rows) -> Tensor:
        answers = [teacher.score(batch, rows) for teacher in self._teachers]
        target = fuse(self._fusion, answers, rows)
        parts = [
            target.block(block).logp().gather(1, rows.labels[block][:, None])[:, 0]
            for block in blocks_of(rows, answers[0].distribution)
        ]
        return torch.cat(parts)


def unsampled_reason(fusion: Fusion) -> str | None:
    """Return the reason why no text can be sampled from a fused target, None if it can."""
    weighting, conflict = fusion.weighting, fusion.conflict
    for key, rule in (("weighting", weighting), ("conflict", conflict)):
        if rule.uses_label:
            name = plain(fusion)[key]["name"]
            return f"{key} `{name}` reads the next token, which sampling has yet to choose"
    if isinstance(weighting, Entropy) and weighting.granularity != "token":
        kind = weighting.granularity
        return f"weighting `entropy` averages over the {kind}, which is not finished"
    return None


class FusedReader:
    """Reads with every teacher and fuses the last row of each prompt.

    A rule that reads the prefix needs the logits of all teachers at every token of the prompts,
    K (B, T, V) tensors for a moment.
    """

    def __init__(
        self, fusion: Fusion, readers: dict[str, TokenReader], prompts: Sequence[Prompt]
    ) -> None:
        self._fusion = fusion
        self._readers = readers
        self._prompts = prompts
        self._is_token: list[Tensor] = []
        self._last: list[Tensor] = []
        self._evidence: list[Tensor] = []

    def __call__(self, ids_Bt: Tensor, is_token_Bt: Tensor) -> Tensor:
        """Append tokens, and return the fused log-probabilities after the last, (B, V)."""
        needed = ids_Bt.shape[1] if self._fusion.weighting.reads_prefix else 1
        logits = [one.read(ids_Bt, is_token_Bt, needed) for one in self._readers.values()]
        last = [logits_BkV[:, -1] for logits_BkV in logits]
        names, size = list(self._readers), len(self._prompts)
        answers = [Answer(n, DenseRows(x)) for n, x in zip(names, last, strict=True)]
        rows = self._rows(torch.arange(size, device=ids_Bt.device))
        fusion = self._fusion
        if fusion.weighting.reads_prefix:
            self._add_evidence(ids_Bt, logits)
            self._is_token.append(is_token_Bt)
            reader = TeacherReader(answers, rows, fusion.temperatures)
            consensus = fusion.weighting.needs_consensus
            stats = reader.stats(slice(0, size), consensus=consensus)
            fusion = replace(fusion, weighting=_GivenScores(scores_KB=self._scores(stats)))
            self._last = last
        return fuse(fusion, answers, rows).block(slice(0, size)).logp()

    def _rows(self, document_N: Tensor) -> Rows:
        """One row per entry of `document_N`, numbers of prompts. Labels are not known yet."""
        device, size = document_N.device, len(self._prompts)

        def numbers(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), device=device)[document_N % size]

        return Rows(
            index=torch.arange(len(document_N), device=device),
            labels=torch.zeros_like(document_N),
            documents=document_N,
            samples=document_N,
            domains=numbers(
                domain_number(one.domain) if one.domain else 0 for one in self._prompts
            ),
            teachers=numbers(
                teacher_number(one.teacher) if one.teacher else 0 for one in self._prompts
            ),
        )

    def _add_evidence(self, ids_Bt: Tensor, logits: Sequence[Tensor]) -> None:
        """Append the teachers' log-probabilities of the new tokens that follow another token."""
        columns = []
        temperatures = self._fusion.temperatures
        lasts = self._last or [None] * len(logits)
        for name, logits_BtV, last_BV in zip(self._readers, logits, lasts, strict=True):
            rows_BtV, labels_Bt = logits_BtV[:, :-1], ids_Bt[:, 1:]
            if last_BV is not None:
                rows_BtV = torch.cat([last_BV[:, None], rows_BtV], dim=1)
                labels_Bt = ids_Bt
            logp_BtV = (rows_BtV / temperatures.get(name, 1.0)).log_softmax(-1)
            columns.append(logp_BtV.gather(2, labels_Bt[..., None])[..., 0])
        self._evidence.append(torch.stack(columns))

    def _scores(self, stats: RowStats) -> Tensor:
        """(K, B) log-weights at the current row, after the rows of all earlier tokens."""
        evidence_KBT = torch.cat(self._evidence, dim=2)
        is_token_BT = torch.cat(self._is_token, dim=1)

        def column(now_KB: Tensor, earlier_KBT: Tensor) -> Tensor:
            return torch.cat([earlier_KBT, now_KB[..., None]], dim=2).flatten(1)

        # Of earlier rows, a rule reads only the log-probabilities of their labels.
        unread_KBT = torch.zeros_like(evidence_KBT)
        consensus_KB = stats.consensus_kl_KN
        whole = RowStats(
            column(stats.entropy_KN, unread_KBT),
            column(torch.zeros_like(stats.entropy_KN), evidence_KBT),
            column(stats.max_logp_KN, unread_KBT),
            None if consensus_KB is None else column(consensus_KB, unread_KBT),
        )
        size = len(self._prompts)
        prompt_B1 = torch.arange(size, device=is_token_BT.device)[:, None]
        # The padding of a prompt is a document that precedes it.
        document_N = torch.where(is_token_BT, prompt_B1, prompt_B1 + size).flatten()
        rows, names = self._rows(document_N), list(self._readers)
        score_KN = self._fusion.weighting.log_scores(whole, rows, names)
        return score_KN.unflatten(1, (size, -1))[..., -1]


@option
class _GivenScores(Weighting):
    """Log-weights that are computed already."""

    scores_KB: Tensor

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        return self.scores_KB


@torch.no_grad()
def generate(
    source: TokenSource,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    progress: OnProgress | None = None,
) -> list[list[int]]:
    """Continue each prompt up to a stop token, which is left out, or its limit.

    Raises:
        ModelError: the source gives NaN.
    """
    # Prompts of similar length share a batch, so there is little padding.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    texts: dict[int, list[int]] = {}
    if progress is not None:
        progress(0, len(prompts))
    for start in range(0, len(order), decoding.batch_size):
        numbers = order[start : start + decoding.batch_size]
        batch = [prompts[number] for number in numbers]
        texts |= zip(numbers, _generate_batch(source, batch, decoding), strict=True)
        if progress is not None:
            progress(len(texts), len(prompts))
    return [texts[number] for number in range(len(prompts))]


def _generate_batch(
    source: TokenSource, prompts: Sequence[Prompt], decoding: Decoding
) -> list[list[int]]:
    stops = decoding.stops | source.stops
    limits = [prompt.max_new_tokens for prompt in prompts]
    choose = _chooser(prompts, decoding)
    read_next = source.reader(prompts)
    device = choose_device("auto")
    ids_Bt, is_token_Bt = (tensor_BT.to(device) for tensor_BT in _pad_left(prompts))
    texts: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for step in range(max(limits)):
        logits_BV = read_next(ids_Bt, is_token_Bt)
        if bool(torch.isnan(logits_BV).any()):
            raise ModelError(
                f"model `{source.name}`: got NaN log-probabilities; must be finite; "
                "load it in float32 or bfloat16 and check its weights"
            )
        next_B = choose(logits_BV, step)
        for number, token in enumerate(next_B.tolist()):
            is_open[number] &= token not in stops and step < limits[number]
            if is_open[number]:
                texts[number].append(token)
        if not any(is_open):
            break
        # Finished prompts go on with tokens that are dropped.
        ids_Bt, is_token_Bt = next_B[:, None], torch.ones_like(next_B, dtype=torch.bool)[:, None]
    return texts


def _chooser(prompts: Sequence[Prompt], decoding: Decoding) -> Callable[[Tensor, int], Tensor]:
    """Return the choice of the next tokens: (B, V) logits and the step -> (B,) ids."""
    if decoding.temperature == 0:
        return lambda logits_BV, _: logits_BV.argmax(-1)
    uniforms = [_uniform(prompt, decoding.seed) for prompt in prompts]
    uniform_BT = pad_sequence(uniforms, batch_first=True)

    def draw(logits_BV: Tensor, step: int) -> Tensor:
        # By the inverse of the distribution function, in float64 on the CPU: MPS has none.
        prob_BV = (logits_BV.cpu().double() / decoding.temperature).softmax(-1)
        if decoding.top_p < 1:
            prob_BV = _nucleus(prob_BV, decoding.top_p)
        total_BV = prob_BV.cumsum(-1)
        point_B1 = uniform_BT[:, step, None] * total_BV[:, -1:]
        token_B = torch.searchsorted(total_BV, point_B1, right=True)[:, 0]
        return token_B.clamp(max=logits_BV.shape[1] - 1).to(logits_BV.device)

    return draw


def _nucleus(prob_BV: Tensor, top_p: float) -> Tensor:
    """Set all but the smallest set of the most likely tokens that sums to `top_p` to 0.

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.
    """
    sorted_BV, token_BV = prob_BV.sort(descending=True, stable=True)
    is_kept_BV = sorted_BV.cumsum(-1) - sorted_BV < top_p
    return torch.zeros_like(prob_BV).scatter(1, token_BV, sorted_BV * is_kept_BV)


def _uniform(prompt: Prompt, seed: int) -> Tensor:
    """(max_new_tokens,) float64 random numbers in [0, 1) that depend on seed and prompt only."""
    number = int(fingerprint([seed, prompt.ids, prompt.domain])[:15], 16)
    generator = torch.Generator().manual_seed(number)
    return torch.rand(prompt.max_new_tokens, generator=generator, dtype=torch.float64)


def _pad_left(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """(B, T) ids, and bool that is False at padding."""
    length = max(len(prompt.ids) for prompt in prompts)
    rows = [[0] * (length - len(prompt.ids)) + list(prompt.ids) for prompt in prompts]
    masks = [[place >= length - len(prompt.ids) for place in range(length)] for prompt in prompts]
    return torch.tensor(rows), torch.tensor(masks)


def _label_logp(logits_nV: Tensor, labels_n: Tensor) -> Tensor:
    logits_nV = logits_nV.to(labels_n.device)
    return logits_nV.gather(1, labels_n[:, None])[:, 0] - logits_nV.logsumexp(1)


def _stops_of(teacher: Teacher) -> frozenset[int]:
    """Return the ids at which the model stops by its generation config."""
    return stop_ids(teacher.model.generation_config if isinstance(teacher, LocalTeacher) else None)
