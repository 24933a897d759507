"""What saves space: int8, and a random projection of word gradients."""

from __future__ import annotations

import pytest
import torch
from random_gradients import random_words
from stored_files import encoded_bytes
from toy import N_TEST, N_TRAIN, Toy, fitted, loader, quiet, test_texts

from lightning_tracin import TracInCallback, TracInWE
from lightning_tracin.gradients.sites import Site
from lightning_tracin.storage.encoding import StorageOptions, size_of_captured


def recall_at_10(found, exact):
    best = (scores.topk(10, dim=1).indices for scores in (found, exact))
    return (
        sum(len(set(a) & set(b)) for a, b in zip(*(each.tolist() for each in best), strict=True))
        / found.numel()
        * (found.shape[1] / 10)
    )


@pytest.mark.parametrize(
    ("kept", "error", "recall", "share"),
    [
        (StorageOptions("float16"), 1e-3, 0.99, 0.51),
        (StorageOptions("int8"), 2e-2, 0.97, 0.28),
        (StorageOptions("float16", projection=128), 0.1, 0.25, 0.27),
        (StorageOptions("int8", projection=64), 0.2, 0.15, 0.1),
    ],
    ids=str,
)
def test_errors_are_within_what_is_expected(kept, error, recall, share):
    """On directions without any structure, where a projection has the hardest time."""
    torch.manual_seed(0)
    test, train = (random_words(n, vocabulary=40, length=20, hidden=256)[0] for n in (8, 200))
    method = TracInWE()

    def scores(of):
        prepared = [method.prepare(of(block).sorted(), None, "test") for block in (test, train)]
        return method.dot(*prepared, None)

    site = kept.applied(Site("words", "tracin-we", "embedding", "words"), size_of_captured(train))
    exact, found = scores(lambda block: block), scores(lambda block: site.stored(block).as_dtype(kept.dtype))
    norms = test.example_norms()[:, None] * train.example_norms()
    assert ((found - exact) / norms).square().mean().sqrt() < error
    assert recall_at_10(found, exact) > recall
    assert encoded_bytes(site.stored(train), kept.dtype) < share * encoded_bytes(train, "float32")


def test_a_projected_trace_serves_like_another(tmp_path, toy):
    fit = fitted(tmp_path / "trace", projection=5)
    result = fit.influence(loader(test_texts()))
    exact = toy.influence(loader(test_texts())).scores
    assert 0.7 < torch.corrcoef(torch.stack([result.scores.flatten(), exact.flatten()]))[0, 1] < 0.999
    for test_index in range(N_TEST):
        for train_index in range(0, N_TRAIN, 3):
            terms = sum(term for _, term in result.words(test_index, train_index))
            assert terms == pytest.approx(float(result.scores[test_index, train_index]), rel=1e-4, abs=1e-10)
    torch.testing.assert_close(fit.self_influence(), toy.self_influence(), rtol=1e-4, atol=1e-10)
    last = fit.influence(loader(test_texts()), method="tracin-last").scores
    torch.testing.assert_close(last, toy.influence(loader(test_texts()), method="tracin-last").scores)


def test_a_projected_trace_cannot_be_preconditioned(tmp_path):
    fit = fitted(tmp_path / "trace", projection=5)
    with pytest.raises(ValueError, match=r"projected to 5 numbers.*Fit without projection"):
        fit.influence(loader(test_texts()), method=TracInWE(precondition="adam"))


def test_a_projection_that_saves_nothing_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="projection=8 saves nothing: word gradients have 8 numbers"):
        fitted(tmp_path / "trace", projection=8)
    assert not (tmp_path / "trace").exists()


def test_a_fit_is_not_resumed_with_another_projection(tmp_path):
    first = fitted(tmp_path / "trace", projection=5)
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = quiet(callbacks=[TracInCallback(tmp_path / "trace", dtype="float32")], max_epochs=3)
    with pytest.raises(ValueError, match=r"begun with float32 gradients at embedding \(projection=\(5,\)\), head"):
        second.fit(Toy(), loader(), ckpt_path=tmp_path / "last.ckpt")
