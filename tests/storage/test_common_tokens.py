"""Common tokens are those of the training examples that count in a question, whatever was asked before."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from toy import N_TRAIN, fitted, loader, test_texts, texts

from lightning_tracin import TracInWE
from lightning_tracin.storage.checkpoint import drawn_at
from lightning_tracin.storage.common_tokens import common_tokens

COMMON = TracInWE(exclude_tokens=["common"])


def counted(examples=range(N_TRAIN)):
    """What more than a tenth of some training examples hold."""
    held = [set(texts()[index][0].tolist()) - {0} for index in examples]
    counts = Counter(token for tokens in held for token in tokens)
    return sorted(each for each, n in counts.items() if n > len(held) / 10)


def test_they_are_counted_again_when_texts_come(tmp_path):
    fit = fitted(tmp_path / "trace", cache="on_demand")
    trace = fit.callbacks[0].trace
    assert not len(common_tokens(trace, trace.checkpoints))
    fit.influence(loader(test_texts()))
    assert common_tokens(trace, trace.checkpoints).tolist() == counted()


@pytest.mark.parametrize("order", [("last", None), (None, "last")], ids=["last first", "all first"])
def test_they_do_not_depend_on_what_was_asked_before(tmp_path, order):
    """Texts are stored for the examples of one checkpoint after the other, as questions come."""
    fit = fitted(tmp_path / "trace", cache="on_demand", every_n_train_steps=2)
    found = {which: fit.influence(loader(test_texts()), method=COMMON, checkpoints=which) for which in order}
    last = drawn_at(fit.callbacks[0].trace.checkpoints[-1]).tolist()
    assert len(last) < N_TRAIN
    assert found["last"].common_tokens.tolist() == list(found["last"].method.excluded.ids) == counted(last)
    assert found[None].common_tokens.tolist() == list(found[None].method.excluded.ids) == counted()
    whole = fitted(tmp_path / "whole", every_n_train_steps=2)
    for which, result in found.items():
        again = whole.influence(loader(test_texts()), method=COMMON, checkpoints=which)
        torch.testing.assert_close(result.scores, again.scores, rtol=1e-5, atol=1e-9)
