"""Setup of all tests: no network, one thread per worker, one seed, sampled sweeps."""

import os
from collections import defaultdict
from zlib import crc32

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when Triton is first imported. With a GPU its kernels are compiled.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

# The same examples on every machine, and no deadline: CI must not depend on speed or luck.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


SAMPLE = 10
"""Cases of one parametrized test that run without `--all`."""


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-messages",
        action="store_true",
        help="write the messages of errors to tests/messages.txt instead of comparing them",
    )
    parser.addoption(
        "--all",
        action="store_true",
        help=f"run all cases of a test, not a fixed sample of {SAMPLE}",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a fixed sample of the cases of each test with many of them."""
    if config.getoption("--all"):
        return
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    dropped: set[pytest.Item] = set()
    for group in cases.values():
        # By a hash, so that no parameter is in step with the sample.
        group.sort(key=lambda item: crc32(item.nodeid.encode()))
        dropped.update(group[SAMPLE:])
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def pytest_configure(config: pytest.Config) -> None:
    from refusals import UPDATE

    if config.getoption("--update-messages"):
        os.environ[UPDATE] = "1"


@pytest.fixture(autouse=True)
def _reset_message_count() -> None:
    from refusals import _asked

    _asked.clear()
