from __future__ import annotations

import gc

import pytest
from hypothesis import HealthCheck, Phase, settings

# An example fits and asks, which takes some tenths of a second: making a small one of one that fails takes minutes.
settings.register_profile(
    "quick",
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[*HealthCheck],
)
settings.load_profile("quick")


def pytest_collectstart():
    """Not in the process that hands out tests to others: they start the sooner, as it does not import torch."""
    import prepared  # noqa: F401


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A trainer whose fit left a float32 trace; tests only ask it."""
    from toy import fitted

    return fitted(tmp_path_factory.mktemp("toy") / "trace")


@pytest.fixture(scope="session")
def forks():
    """Runs scripts in processes that need not import torch and Lightning first."""
    from launched import Forks

    with Forks() as running:
        yield running


@pytest.fixture
def trace(toy):
    """The folder of that trace; never written to by a test that keeps to it."""
    return toy.callbacks[0].trace.path
