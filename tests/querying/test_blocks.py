"""Test examples are worked through in blocks, so that with ``k`` memory does not grow with their number."""

from __future__ import annotations

import pytest
import torch
from toy import N_TEST, Toy, loader, quiet, test_texts

from lightning_tracin import InfluenceResult, Trace, TracInLast, TracInSum, TracInWE
from lightning_tracin.querying import influence as influence_module

METHODS = [TracInWE(), TracInWE(normalize="cosine"), TracInLast()]
METHODS.append(TracInSum((TracInWE(), TracInLast()), scales=(1, 2)))  # without, those of the first block count


def asked(trace, monkeypatch, n_bytes, **options):
    monkeypatch.setattr(influence_module, "_BLOCK_BYTES", n_bytes)
    loaded = loader(test_texts(), batch_size=4, shuffle=options.pop("shuffle", False))
    return quiet().influence(loaded, Toy(), trace=trace, **options)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_blocks_do_not_matter(trace, monkeypatch, method, k, shuffle):
    whole = asked(trace, monkeypatch, 2**40, method=method, k=k)
    blocks = asked(trace, monkeypatch, 1, method=method, k=k, shuffle=shuffle)  # one example each
    assert len(whole.test_gradients) == (not isinstance(method, TracInLast))
    assert len(blocks.test_gradients) == N_TEST * (not isinstance(method, TracInLast))
    assert blocks.test_indices.tolist() == list(range(N_TEST))
    torch.testing.assert_close(blocks.totals, whole.totals, rtol=1e-5, atol=0)
    torch.testing.assert_close(blocks.predictions, whole.predictions)
    assert blocks.test_texts.equals(whole.test_texts)
    for side in ("proponents", "opponents"):
        found, expected = getattr(blocks, side)(3), getattr(whole, side)(3)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-9)
    if k is None:
        torch.testing.assert_close(blocks.scores, whole.scores, rtol=1e-5, atol=1e-9)
    if not isinstance(method, TracInLast):
        for row in range(N_TEST):
            assert dict(blocks.words(row, 5)) == pytest.approx(dict(whole.words(row, 5)), rel=1e-4, abs=1e-9)
        tables = [result.word_table(n=None) for result in (blocks, whole)]
        values = [dict(zip(table.words, table.values.sum((1, 2)).tolist(), strict=True)) for table in tables]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-9)


def test_a_result_of_blocks_travels(trace, monkeypatch, tmp_path):
    """Its gradients lie in files that vanish with it; what is saved holds them all."""
    blocks = asked(trace, monkeypatch, 1)
    words = blocks.words(4, 7)
    files = list(blocks.scratch._folder.iterdir())
    assert len(files) == N_TEST * 2  # at each of two checkpoints
    blocks.save(tmp_path / "result.safetensors")
    del blocks
    assert not files[0].exists()
    assert InfluenceResult.load(tmp_path / "result.safetensors").words(4, 7) == words


def test_blocks_hold_as_many_examples_as_their_size_allows(trace, monkeypatch):
    """All gradients of the training set, at both checkpoints, are what twenty test examples take in float32."""
    stored = sum(
        each.gradients(site).nbytes for each in Trace(trace).checkpoints for site in each.sites if site.has_words
    )
    blocks = asked(trace, monkeypatch, stored * 2 // 20)
    assert [of_block[0].n_examples for of_block in blocks.test_gradients] == [2, 2, 2]
