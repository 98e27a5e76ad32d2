"""Targets, stop tokens and bytes per token of encoded documents."""

import copy
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import tiny
from collegium.data.documents import Document
from collegium.data.encode import Encoder, EncodingReport
from collegium.data.order import seeded_hash, split_of
from collegium.data.tokens import TextTokenizer, bytes_of_tokens, token_bytes, tokenize
from collegium.errors import DataError
from refusals import refused

EOS, USER, ASSISTANT = 0, 2, 3
TURNS = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo all"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
)
BLOCKS = tiny.CHAT_TEMPLATE
PLAIN = BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def document(**content):
    return Document(id="17", domain="d", **content)


def encode(document, tokenizer, **options):
    (encoded,), report = encode_all([document], tokenizer, **options)
    report.check()
    return encoded


def encode_all(documents, tokenizer, **options):
    encoder = Encoder(tokenizer, where="data", **options)
    outcomes = list(encoder.encode(documents))
    reported = {"truncate": "right", "special_tokens": "auto", **options}
    report = EncodingReport(where="data", **reported)
    for item, outcome in zip(documents, outcomes, strict=True):
        report.add(
            lambda name=item.id: name,
            outcome.notes,
            outcome.length,
            lambda error=outcome.error: error,
        )
    return [outcome.encoded for outcome in outcomes], report


def with_template(template):
    # A copy, since `tiny_tokenizer` is cached.
    tokenizer = copy.copy(tiny.tiny_tokenizer(400, chat=True))
    tokenizer.chat_template = template
    return tokenizer


def targets(encoded, tokenizer):
    return tokenizer.decode(encoded.ids[encoded.is_target])


def test_targets_of_a_text_are_all_tokens_but_the_first_and_the_stop_token():
    tokenizer = tiny.tiny_tokenizer()
    encoded = encode(document(text=tiny.TEXT[0]), tokenizer, max_length=4)
    assert encoded.ids.tolist() == [*tokenizer(tiny.TEXT[0])["input_ids"], EOS]
    assert encoded.ids.dtype == encoded.num_bytes.dtype == np.int64
    assert encoded.is_target.tolist() == [False] + [True] * (len(encoded) - 1)
    assert encoded.num_bytes[-1] == 0
    assert encoded.can_split


def test_bos_only_if_the_tokenizer_adds_it():
    plain = tiny.tiny_tokenizer()
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", USER), ("<|end|>", EOS)]
    )
    adds = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|user|>", eos_token="<|end|>"
    )
    silent = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(plain.backend_tokenizer.to_str()),
        bos_token="<|user|>",
        eos_token="<|end|>",
    )
    body = plain("to be")["input_ids"]
    assert encode(document(text="to be"), adds, max_length=9).ids.tolist() == [USER, *body, EOS]
    assert encode(document(text="to be"), silent, max_length=9).ids.tolist() == [*body, EOS]
    pair = encode(document(prompt="to be", completion="or"), adds, max_length=99)
    assert pair.ids[0] == USER
    assert not pair.is_target[: 1 + len(body)].any()


def test_a_prompt_is_not_a_target_and_no_token_spans_the_boundary():
    tokenizer = tiny.tiny_tokenizer()
    encoded = encode(document(prompt="the que", completion="stion"), tokenizer, max_length=99)
    size = len(tokenizer("the que")["input_ids"])
    assert tokenizer.decode(encoded.ids[:size]) == "the que"
    assert encoded.is_target.tolist() == [False] * size + [True] * (len(encoded) - size)
    assert encoded.ids[-1] == EOS
    assert not encoded.can_split
    assert encoded.num_bytes.sum() == len("the question")


@pytest.mark.parametrize("template", [BLOCKS, PLAIN, CHATML], ids=["blocks", "plain", "chatml"])
def test_targets_of_a_chat_are_assistant_turns_with_their_stop_token(template):
    tokenizer = with_template(template)
    encoded = encode(document(messages=TURNS), tokenizer, max_length=99)
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert targets(encoded, tokenizer) == "yo all<|end|>no<|end|>"
    target_bytes = encoded.num_bytes[encoded.is_target]
    assert target_bytes.sum() == len("yo all" + "no")
    assert (encoded.num_bytes[encoded.ids == EOS] == 0).all()


def test_an_end_of_turn_token_other_than_eos_counts_as_stop():
    tokenizer = copy.copy(with_template(PLAIN.replace("<|end|>", "<|pad|>")))
    encoded = encode(document(messages=TURNS), tokenizer, max_length=99)
    assert targets(encoded, tokenizer) == "yo all<|pad|>no<|pad|>"


@pytest.mark.parametrize(
    "template",
    [
        BLOCKS.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"),
        PLAIN.replace("<|end|>", "\n"),
    ],
    ids=["outside the block", "newline"],
)
def test_stop_token_outside_the_targets_is_refused(template):
    with refused(DataError, "data: 17"):
        encode(document(messages=TURNS), with_template(template), max_length=99)


def test_template_that_rewrites_earlier_turns_is_refused():
    rewrites = (
        "{% for m in messages %}{% if loop.last %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    )
    with refused(DataError, "data: 17"):
        encode(document(messages=TURNS), with_template(rewrites), max_length=99)


def test_missing_and_broken_templates():
    with refused(DataError, "data: 17"):
        encode(document(messages=TURNS), tiny.tiny_tokenizer(), max_length=99)
    broken = with_template("{{ raise_exception('roles must alternate') }}")
    with refused(DataError, "data: 17"):
        encode(document(messages=TURNS), broken, max_length=99)


def test_a_template_cannot_reach_into_python():
    escape = with_template("{{ messages.__class__.__mro__ }}")
    with refused(DataError, "data: 17"):
        encode(document(messages=TURNS), escape, max_length=99)


def test_no_eos_token_names_candidates():
    backend = tiny.tiny_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with refused(DataError, "data: tokenizer"):
        encode(document(text="a"), tokenizer, max_length=9)


def test_targets_are_decided_before_truncation():
    tokenizer = tiny.tiny_tokenizer()
    pair = document(prompt="abc", completion="xyz")
    whole = encode(pair, tokenizer, max_length=99)
    right = encode(pair, tokenizer, max_length=5, truncate="right")
    left = encode(pair, tokenizer, max_length=5, truncate="left")
    assert right.ids.tolist() == whole.ids[:5].tolist()
    assert right.is_target.tolist() == [False, False, False, True, True]
    assert left.ids.tolist() == whole.ids[2:].tolist()
    assert left.is_target.tolist() == [False, True, True, True, True]
    assert encode(pair, tokenizer, max_length=6, truncate="drop") is None
    with refused(DataError, "data: samples"):
        encode(pair, tokenizer, max_length=6, truncate="error")
    assert len(encode(pair, tokenizer, max_length=7, truncate="error")) == 7


def test_samples_without_targets():
    tokenizer = with_template(PLAIN)
    silent = document(messages=TURNS[:2])
    with refused(DataError, "data: samples"):
        encode(silent, tokenizer, max_length=99)
    with refused(DataError, "data: samples"):
        encode(document(prompt="abc", completion="x"), tokenizer, max_length=3)
    both = [silent, document(text="ab")]
    (first, second), report = encode_all(both, tokenizer, max_length=99)
    assert report.check() == [
        "data: samples without a target token: 1 of 2 (first: id 17); skipped"
    ]
    assert first is None
    assert second is not None


def test_batches_equal_single_documents():
    tokenizer = with_template(BLOCKS)
    documents = [
        document(text=tiny.TEXT[3]),
        document(messages=TURNS),
        document(prompt="a", completion="b"),
        document(text="x"),
    ]
    together, _ = encode_all(documents, tokenizer, max_length=64)
    for item, encoded in zip(documents, together, strict=True):
        single = encode(item, tokenizer, max_length=64)
        for name in ("ids", "is_target", "num_bytes"):
            assert getattr(single, name).tolist() == getattr(encoded, name).tolist()


@lru_cache
def sentencepiece():
    # Byte fallback as in Llama 2: a character outside the vocabulary becomes one token per byte.
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    vocabulary |= {piece: 300 + i for i, piece in enumerate(["▁", "a", "b", "▁a", "é"])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS, st.booleans())
def test_bytes_sum_to_the_text(text, other, is_piece):
    tokenizer = sentencepiece() if is_piece else tiny.tiny_tokenizer()
    encoded = encode(document(text=text), tokenizer, max_length=999)
    assert encoded.num_bytes.sum() == len(text.encode())
    assert (encoded.num_bytes >= 0).all()
    encoded = encode(document(prompt=text, completion=other), tokenizer, max_length=999)
    assert encoded.num_bytes[encoded.is_target].sum() == len(other.encode())


@lru_cache
def llama():
    tokenizer = sentencepiece()
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@settings(max_examples=150, deadline=None)
# The mark of a space in its vocabulary, U+2581, is decoded as one.
@given(
    TEXTS.filter(lambda text: not text.startswith(" ") and "▁" not in text),
    TEXTS.filter(lambda text: "▁" not in text),
)
def test_a_completion_gets_no_space_before_it(prompt, completion):
    pair = document(prompt=prompt, completion=completion)
    encoded = encode(pair, llama(), max_length=999, special_tokens="text")
    # The decoder strips the space before the prompt.
    assert llama().decode(encoded.ids[:-1]) == prompt + completion


def test_text_that_was_rendered_before_is_framed_once():
    backend = Tokenizer.from_str(tiny.tiny_tokenizer().backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", USER)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|user|>", eos_token="<|end|>"
    )
    plain = encode(document(text="to be"), tokenizer, max_length=99)
    framed = encode(document(text="<|user|>to be<|end|>"), tokenizer, max_length=99)
    assert framed.ids.tolist() == plain.ids.tolist()
    pair = encode(document(prompt="to be", completion="or"), tokenizer, max_length=99)
    framed = document(prompt="<|user|>to be", completion="or<|end|>")
    assert encode(framed, tokenizer, max_length=99).ids.tolist() == pair.ids.tolist()


def test_special_tokens_in_a_text_are_counted_or_plain():
    tokenizer = tiny.tiny_tokenizer(400, chat=True)
    quoting = document(text="say <|end|> to stop")
    (encoded,), report = encode_all([quoting], tokenizer, max_length=99)
    assert (encoded.ids == EOS).sum() == 2
    (warning,) = report.check()
    assert "texts with special tokens inside: 1 of 1 (first: id 17)" in warning
    plain = encode(quoting, tokenizer, max_length=99, special_tokens="text")
    assert (plain.ids == EOS).sum() == 1
    assert tokenizer.decode(plain.ids) == "say <|end|> to stop<|end|>"


def test_bytes_of_shared_skipped_and_trailing_characters():
    # a | é shared by two tokens | a space in no token | 数 | trailing space | empty tokens (0)
    ends = np.array([1, 2, 2, 0, 4, 0])
    assert bytes_of_tokens("aé 数 ", ends).tolist() == [1, 2, 0, 0, 4, 1]
    assert bytes_of_tokens("", np.zeros(0, np.int64)).tolist() == []


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.integers(0, 2**31))
def test_split_is_a_function_of_content_and_seed(text, seed):
    def part(name, domain):
        copy_of_text = Document(id=name, domain=domain, text=text)
        return split_of(copy_of_text.content_hash(), seed=seed, calibration=0.3, validation=0.3)

    assert part("a", "d") == part("b", "e")


def test_split_fractions_hold_and_follow_the_seed():
    documents = [document(text=f"text {i}") for i in range(2000)]
    parts = [split_of(d.content_hash(), seed=3, calibration=0.1, validation=0.2) for d in documents]
    # Tolerances of about 3.4 standard deviations of the binomial.
    assert parts.count("calibration") == pytest.approx(200, abs=45)
    assert parts.count("validation") == pytest.approx(400, abs=60)
    assert parts != [
        split_of(d.content_hash(), seed=4, calibration=0.1, validation=0.2) for d in documents
    ]
    # The validation split does not depend on the calibration fraction.
    wider = [split_of(d.content_hash(), seed=3, calibration=0.0, validation=0.2) for d in documents]
    assert [p == "validation" for p in wider] == [p == "validation" for p in parts]


def test_split_and_order_of_documents_are_independent():
    documents = [document(text=f"text {number}") for number in range(400)]
    order = sorted(documents, key=lambda d: seeded_hash(d.content_hash(), 3, "order"))
    first = [
        split_of(d.content_hash(), seed=3, calibration=0.0, validation=0.5) for d in order[:200]
    ]
    assert 70 < first.count("validation") < 130


def byte_level(normalizer=None, **options):
    backend = Tokenizer.from_str(tiny.tiny_tokenizer(400, chat=True).backend_tokenizer.to_str())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False, **options)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "  \n", "é", "e\u0301", "数字", "🎈", "<|end|>", "the the", "\u0301"])
    ),
    st.booleans(),
    st.booleans(),
)
def test_bytes_by_lengths_of_tokens_equal_those_by_offsets(words, is_nfc, quote):
    tokenizer = byte_level(normalizers.NFC() if is_nfc else None)
    text = "".join(words)
    ((ids, offsets),) = tokenize([text], tokenizer, quote=quote)
    counter = TextTokenizer(tokenizer)
    assert token_bytes(tokenizer) is not None
    ((counted_ids, num_bytes),) = counter([text], quote=quote)
    assert counted_ids.tolist() == ids.tolist()
    assert num_bytes.tolist() == bytes_of_tokens(text, offsets[:, 1]).tolist()


def test_lengths_of_tokens_are_not_used_where_they_differ_from_offsets():
    trimming = byte_level()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    spacing = byte_level()
    spacing.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lowering = byte_level(normalizers.Lowercase())
    for tokenizer in (trimming, spacing, lowering, sentencepiece()):
        assert token_bytes(tokenizer) is None
