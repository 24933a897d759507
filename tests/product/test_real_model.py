"""MiniLM-L6 and BBC News: exactness on a real model, and the demo's own claims (``make test-slow``)."""

from __future__ import annotations

import pytest
import torch
from brute_force import relative_error
from torch.utils.data import DataLoader
from toy import site_of
from transformers import AutoTokenizer

from examples import topics
from examples.classifier import Classifier, Tokenized
from examples.data import bbc_news, packaged_minilm
from lightning_tracin import InfluenceResult, Trace, TracInCallback, TracInLast, TracInWE, Trainer

pytestmark = pytest.mark.slow


def dense_gradients(model, loader, layer):
    """Every example's dense gradient of a layer's weight and bias, one example at a time."""
    rows = []
    parameters = list(layer.parameters())
    for batch in loader:
        gradients = torch.autograd.grad(model(**batch).loss, parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("method", "layer"), [("tracin-we", "bert.embeddings.word_embeddings"), ("tracin-last", "classifier")]
)
def test_scores_of_minilm_are_those_of_dense_gradients(tmp_path, method, layer):
    articles, names = bbc_news()
    tokenizer = AutoTokenizer.from_pretrained(packaged_minilm())
    train, test = (Tokenized(part, tokenizer, 64) for part in (articles[::90], articles[45::300]))

    def loader(data, size, **options):
        return DataLoader(data, batch_size=size, collate_fn=lambda r: tokenizer.pad(r, return_tensors="pt"), **options)

    model = Classifier(packaged_minilm(), names, tokenizer, total_steps=6)
    trainer = Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[TracInCallback(tmp_path / "trace", dtype="float32")],
    )
    trainer.fit(model, loader(train, 8, shuffle=True))
    scores = trainer.influence(loader(test, 4), method=method).scores

    expected = torch.zeros(len(test), len(train), dtype=torch.float64)
    model.eval()
    for checkpoint in Trace(tmp_path / "trace").checkpoints:
        model.load_state_dict(checkpoint.weights())
        of_layer = model.model.get_submodule(layer)
        of_train = dense_gradients(model, loader(train, 1), of_layer)
        for row, of_test in enumerate(dense_gradients(model, loader(test, 1), of_layer)):
            expected[row] += checkpoint.learning_rate_of(site_of(checkpoint, method)) * (
                of_train.double() @ of_test.double()
            )
    assert relative_error(scores, expected) < 1e-5


def test_the_demo_finds_flipped_labels_and_leaves_its_trace_behind(tmp_path, capsys):
    figures = topics.main(["--output", str(tmp_path), "--train-size", "400", "--test-size", "100", "--epochs", "4"])
    assert figures["accuracy"] > 0.8
    assert max(figures["found_in_top_tenth"].values()) >= 0.6
    result = InfluenceResult.load(tmp_path / "result.safetensors")
    assert result.scores.shape == (len(figures["chosen"]), 400)
    index = int(result.proponents(1).indices[0, 0])
    assert sum(term for _, term in result.words(0, index)) == pytest.approx(float(result.scores[0, index]), rel=1e-3)
    assert "flipped labels" in capsys.readouterr().out
    assert isinstance(result.method, TracInWE)
    assert not isinstance(result.method, TracInLast)
