"""Files that a stranger made: an error that names the file, never another exception, a hang, or a wrong number."""

from __future__ import annotations

from mutations import mutated_readings


def test_mutated_files_are_read_or_refused(tmp_path):
    found = mutated_readings(60, 0, tmp_path)
    assert set(found) <= {"read", "refused"}, found
    assert min(found["read"], found["refused"]) > 20
