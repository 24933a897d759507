"""What a process makes ready, once, before it looks for tests."""

from __future__ import annotations

import functools
import gc
import os

import torch
import toy  # noqa: F401 (imports all that most tests need)
from lightning_fabric.utilities import registry

torch.set_num_threads(1)  # the models are tiny: threads cost more than they give
# Each Trainer looks through all installed packages for callbacks, which takes nearly all of the 12 ms to make one.
registry.entry_points = functools.cache(registry.entry_points)
# Each file of a trace waits some ms for the disk: tests that are about that put something of their own in its place.
os.fsync = lambda descriptor: None
# What is imported stays: else the garbage collector looks through all of it again and again.
gc.freeze()
