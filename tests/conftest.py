"""What every test needs: no network, one thread per worker, the same seed."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
