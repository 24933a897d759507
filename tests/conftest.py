from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from lightning_fabric.utilities import registry
from toy import fitted

torch.set_num_threads(1)  # the models are tiny: threads cost more than they give
# Each Trainer looks through all installed packages for callbacks, which takes nearly all of the 12 ms to make one.
registry.entry_points = functools.cache(registry.entry_points)
# Each file of a trace waits some ms for the disk: tests that are about that put something of their own in its place.
os.fsync = lambda descriptor: None

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


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A trainer whose fit left a float32 trace; tests only ask it."""
    return fitted(tmp_path_factory.mktemp("toy") / "trace")


@pytest.fixture
def trace(toy):
    """The folder of that trace; never written to by a test that keeps to it."""
    return toy.callbacks[0].trace.path
