"""Training untouched, bit for bit: a small part of the matrix in ``untouched.py``; ``make torture`` draws more."""

from __future__ import annotations

import pytest
from untouched import CALLBACKS, DATA, GENERATORS, HOLDERS, Combination, touched, untouched_comparisons

CACHES = ("checkpoint", "training", "on demand")

COMBINATIONS = [
    *(Combination(generator=name, callback=cache) for name in GENERATORS for cache in CACHES),
    *(Combination(data=data, holder=name) for name in HOLDERS for data in ("a data set", "a collate function")),
    *(Combination(data=data, callback=name) for data in DATA for name in CALLBACKS),
    *(Combination(module="a module that counts", callback=name) for name in CALLBACKS),
    *(
        Combination(module="a module that counts", callback=name, logged=True)
        for name in ("checkpoint", "every 3 steps")
    ),
    *(Combination(callback="training", logged=True, data=data) for data in ("a data set", "a collate function")),
    *(Combination(data=data, workers=2) for data in ("a file opened lazily", "a stream", "a collate function")),
    *(Combination(data="a file opened lazily", workers=2, callback=name) for name in ("training", "on demand")),
]


@pytest.mark.parametrize("of", dict.fromkeys(each for each in COMBINATIONS if each.is_possible), ids=str)
def test_training_is_untouched(tmp_path, of):
    assert touched(of, tmp_path / "fits") == []


def test_combinations_at_random(tmp_path):
    found = untouched_comparisons(4, 0, tmp_path)
    assert found["different"] == 0, found
    assert found["alike"] + found["refused"] == 4
    assert found["alike"] > 0
