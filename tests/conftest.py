"""What every test needs: no network, one thread per worker, the same seed."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton reads it when it is first imported, by whomever; with a GPU its kernels are compiled.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

# The same examples on every machine and no clock: a run of CI must not fail for being slow or lucky.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


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


def pytest_configure(config: pytest.Config) -> None:
    from refusals import UPDATE

    if config.getoption("--update-messages"):
        os.environ[UPDATE] = "1"


@pytest.fixture(autouse=True)
def _reset_message_count() -> None:
    from refusals import _asked

    _asked.clear()
