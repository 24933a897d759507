"""Common tokens are counted once for each state of a trace."""

from __future__ import annotations

from collections import Counter

from toy import N_TRAIN, fitted, loader, test_texts, texts

from lightning_tracin.storage.common_tokens import common_tokens


def test_they_are_counted_again_when_texts_come(tmp_path):
    fit = fitted(tmp_path / "trace", cache="on_demand")
    trace = fit.callbacks[0].trace
    assert not len(common_tokens(trace))
    fit.influence(loader(test_texts()))
    counts = Counter(token for ids, _ in texts() for token in set(ids.tolist()) - {0})
    assert common_tokens(trace).tolist() == sorted(each for each, n in counts.items() if n > N_TRAIN / 10)
