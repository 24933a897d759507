from __future__ import annotations

import planted
import pytest


@pytest.fixture(scope="session")
def planted_fit(tmp_path_factory):
    """A trainer that has fitted the task with planted causes; tests only ask it."""
    folder = tmp_path_factory.mktemp("planted") / "trace"
    return planted.fitted(folder, methods=("tracin-we", "tracin-last", "hidden"))


@pytest.fixture(scope="session")
def planted_result(planted_fit):
    from lightning_tracin import TracInWE

    return planted_fit.influence(planted.test_loader(), method=TracInWE(normalize="cosine"))
