"""Records of exports."""

from __future__ import annotations

from collegium.storage.records import Verification

EQUAL = Verification(
    num_tokens=9,
    max_logit_difference=0.0,
    mean_logit_difference=0.0,
    logit_spread=2.0,
    kl=0.0,
    top1_agreement=1.0,
    perplexity=8.0,
    student_perplexity=8.0,
    bits_per_byte=1.0,
    student_bits_per_byte=1.0,
    num_prompts=2,
    differing_texts=0.0,
    tie_gap=0.0,
    differing_tokenizations=0.0,
    same_chat_template=True,
    same_eos=True,
)
"""The verification of an export with the logits of the student."""
