"""A process that is killed loses the retraining that it was at, and no more; another one goes on."""

from __future__ import annotations

import json

import pytest
from launched import HERE


def after_kills(forks, kind: str, folder):
    """What was found after each kill, and after going on."""
    done = forks.run(HERE / "killed_retrainings.py", kind, folder, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found
    for each in found:
        assert each["killed"]
        assert each["same"]  # as without the kill
    return found


def test_a_kill_in_the_midst_of_a_fit_loses_that_fit(forks, tmp_path):
    (found,) = after_kills(forks, "fit", tmp_path)
    assert found["left"] == {".json": 1, ".safetensors": 1, ".lock": 1}
    assert found["fits"] == 2
    assert found["finally"] == {".json": 1, ".safetensors": 3}


@pytest.mark.slow
def test_a_kill_at_any_operation_on_files_leaves_nothing_wrong(forks, tmp_path):
    found = after_kills(forks, "files", tmp_path)
    assert len(found) > 8
    for each in found:
        was_there = each["left"].get(".safetensors", 0)
        assert each["fits"] == (0 if was_there else 1)
        assert each["finally"][".safetensors"] == each["finally"][".json"] == 1
    assert [each["left"].get(".safetensors", 0) for each in found][-1] == 1
