from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest

from lightning_tracin import TracInLast, TracInSum, TracInWE
from lightning_tracin.scoring.excluded_tokens import ExcludedTokens
from lightning_tracin.scoring.naming import method_from_json, method_to_json


def test_a_method_prints_what_was_asked_for_and_never_many_ids():
    assert "exclude_tokens=('special', 'the', 7)" in repr(TracInWE(exclude_tokens=["special", "the", 7]))
    assert "exclude_tokens=(<300 token ids>)" in repr(TracInWE(exclude_tokens=range(300)))
    assert "exclude_tokens=('common', <300 token ids>)" in repr(TracInWE(exclude_tokens=["common", *range(300)]))
    assert "<300 token ids>" in repr(TracInSum((TracInWE(exclude_tokens=range(300)), TracInLast())))
    assert TracInWE(exclude_tokens="common").exclude_tokens == ("common",)
    assert "(<100 words>, <5 token ids>)" in repr(TracInWE(exclude_tokens=[*map(str, range(100)), *range(5)]))


def test_ids_are_known_at_once_and_names_only_in_a_trace():
    assert TracInWE(exclude_tokens=[7, 3, 7]).excluded.ids == (3, 7)
    method = TracInWE(exclude_tokens=["the", 7])
    assert method.excluded.ids is None
    with pytest.raises(ValueError, match="yet to be looked up in a trace"):
        method.prepare(None, None, "train")


@pytest.mark.parametrize(
    "again",
    [
        lambda method: replace(method, normalize="cosine"),
        copy.deepcopy,
        lambda method: pickle.loads(pickle.dumps(method)),
        lambda method: method_from_json(method_to_json(method)),
    ],
    ids=["replaced", "copied", "pickled", "saved"],
)
def test_ids_that_were_looked_up_stay(again):
    asked = ["special", "the", 7]
    method = again(TracInWE(exclude_tokens=ExcludedTokens(asked, [1, 2])))
    assert method.excluded.ids == (1, 2, 7)
    assert list(method.exclude_tokens) == asked


@pytest.mark.parametrize("asked", [3, None, [1.5], [2**64], [""], [b"the"]])
def test_what_is_neither_ids_nor_words_is_refused(asked):
    with pytest.raises(ValueError, match=r"exclude_tokens must be token ids.*words, \"special\" or \"common\""):
        TracInWE(exclude_tokens=asked)


@pytest.mark.parametrize(
    "content", ["abc", {"asked": ["a"]}, {"asked": ["a"], "ids": None}, {"asked": ["a"], "ids": [2**70]}, [None]]
)
def test_a_file_must_have_the_ids(content):
    with pytest.raises(ValueError, match="is no method"):
        method_from_json({"method": "TracInWE", "exclude_tokens": content})
