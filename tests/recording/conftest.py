"""What fits that learn nothing are compared with."""

from __future__ import annotations

import pytest
from still_fits import METHODS, build, scores_of
from toy import fitted


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """By method: the scores of one checkpoint's pass."""
    fit = fitted(tmp_path_factory.mktemp("pass") / "trace", build(), trainer={"max_epochs": 1})
    return {method: scores_of(fit, method) for method in METHODS}
