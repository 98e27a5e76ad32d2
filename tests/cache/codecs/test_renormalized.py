"""Top-k without its tail: the target of other tools, kept as a baseline."""

from __future__ import annotations

import numpy as np
import torch

from collegium.cache.codecs.targets import SCALARS, TargetCodec
from collegium.cache.options import TopK


def test_the_kept_tokens_take_all_the_mass_and_keep_their_proportions() -> None:
    logp_nV = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    scalars = {name: torch.zeros(5) for name in SCALARS}
    keys = np.zeros(5, np.uint64)
    rows = {}
    for renormalized in (False, True):
        codec = TargetCodec("fused", TopK(k=4, renormalized=renormalized), 30)
        rows[renormalized] = codec.decode(codec.encode(logp_nV, keys, scalars))
    assert rows[True].log_tail is None
    assert rows[False].log_tail is not None
    kept = rows[True].logp.view(5, 4)
    torch.testing.assert_close(kept.exp().sum(1), torch.ones(5))
    bucket = rows[False].logp.view(5, 4)
    torch.testing.assert_close(kept - kept[:, :1], bucket - bucket[:, :1])
