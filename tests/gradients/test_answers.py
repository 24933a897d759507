"""Question answering: losses, labels and predictions of answers that start and end somewhere in their texts."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from families import BATCH_SIZE, FAMILIES, N_TRAIN, questions
from torch.utils.data import default_collate
from toy import loader, quiet

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.gradients.losses import hugging_face_losses
from lightning_tracin.gradients.predictions import PredictionProbe

OUTSIDE = 99


def some_outside():
    """Of two questions the answer is not in the text, as where a long text was cut."""
    examples = questions()
    for place in (1, 6):
        examples[place] |= {name: torch.tensor(OUTSIDE) for name in ("start_positions", "end_positions")}
    return examples


@pytest.fixture
def module():
    return FAMILIES["bert-answers"].build().eval()


@pytest.mark.parametrize("shape", [(), (1,)], ids=["(B,)", "(B, 1)"])
def test_each_loss_is_what_the_model_returns_for_a_batch_of_one(module, shape):
    examples = [
        {name: each.reshape(shape) if each.dim() == 0 else each for name, each in example.items()}
        for example in questions()
    ]
    losses = hugging_face_losses(module, default_collate(examples))
    alone = [module.loss(default_collate([example])) for example in examples]
    torch.testing.assert_close(losses, torch.stack(alone))


def test_an_answer_outside_of_the_text_has_no_loss(module):
    batch = default_collate(some_outside())
    losses = hugging_face_losses(module, batch)
    assert losses[1] == losses[6] == 0
    torch.testing.assert_close(losses.sum() / (len(losses) - 2), module.loss(batch))


def test_another_loss_is_refused(module):
    module.model.forward = lambda forward=module.model.forward, **batch: doubled(forward(**batch))
    with pytest.raises(ValueError, match="computes its loss in another way"):
        hugging_face_losses(module, default_collate(questions()))


def doubled(output):
    output.loss = output.loss * 2
    return output


def test_an_output_without_places_is_refused():
    module = FAMILIES["bert-tokens"].build()
    batch = default_collate(questions())
    module.model.forward = lambda forward=module.model.forward, **batch: forward(batch["input_ids"])
    with pytest.raises(ValueError, match="start_logits and end_logits"):
        hugging_face_losses(module, batch)


def test_the_prediction_is_the_likeliest_answer_that_does_not_end_before_it_starts(module):
    batch = default_collate(questions())
    probe = PredictionProbe(module, "model.qa_outputs")
    with probe.watched(), torch.no_grad():
        output = module(**batch)
    predictions = probe.predictions(len(batch["input_ids"]), None, is_binary=False)
    for start, end, (place, probability) in zip(
        output.start_logits.softmax(1), output.end_logits.softmax(1), predictions.tolist(), strict=True
    ):
        spans = {(i, j): float(start[i] * end[j]) for i in range(len(start)) for j in range(i, len(end))}
        best = max(spans, key=spans.get)
        assert place == best[0]
        assert probability == pytest.approx(spans[best], rel=1e-5)


@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_a_fit_with_answers_outside_of_their_texts(tmp_path, monkeypatch, cache):
    """Their own scores are zero; those of the others are by brute force, and their starts are shown as labels."""
    monkeypatch.setattr("families.EMBEDDING_RATE", 2e-10)
    monkeypatch.setattr("families.OTHER_RATE", 1e-10)
    family, examples = FAMILIES["bert-answers"], some_outside()
    module, train, test = family.build(), examples[:N_TRAIN], examples[N_TRAIN:]
    trainer = quiet(callbacks=[TracInCallback(tmp_path, cache=cache, dtype="float32", on_error="raise")], max_epochs=1)
    pl.seed_everything(0, verbose=False)
    trainer.fit(module, loader(train, batch_size=BATCH_SIZE))
    result = trainer.influence(loader(test), method="tracin-last")
    assert not result.scores[:, [1, 6]].any()
    layer = module.get_submodule(module.last)
    sides = [
        dense_gradients(
            module, layer, (default_collate([each]) for each in side if each["end_positions"] < OUTSIDE), module.loss
        )
        for side in (test, train)
    ]
    rates = [Trace(tmp_path).checkpoints[0].learning_rate_of(Trace(tmp_path).sites[1])]
    expected = BruteForce(rates, [sides[0]], [sides[1]]).scores()
    inside = [place for place in range(N_TRAIN) if place not in (1, 6)]
    assert relative_error(result.scores[:, inside], expected) < 1e-5
    assert result.test_texts.labels.tolist() == [float(each["start_positions"]) for each in test]
    assert torch.isfinite(result.predictions).all()
