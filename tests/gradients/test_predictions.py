from __future__ import annotations

import pytest
import torch
import transformers
from families import FAMILIES, VOCABULARY, HuggingFace
from torch import nn

from lightning_tracin.bridge.observing import Observer
from lightning_tracin.gradients.batches import labels_of
from lightning_tracin.gradients.predictions import PredictionProbe


def predicted(module, batch, last=None, training=()):
    """What is seen in the pass that gives the losses; training's labels are not known by default."""
    module.eval()
    observer = Observer(module, PredictionProbe(module, last), lambda: torch.tensor(training).double())
    with observer.probe.watched(), torch.no_grad():
        losses = module.influence_loss(batch)
    return observer.predictions(labels_of(batch), losses)


def batch_of(name):
    family = FAMILIES[name]
    return family.build(), next(iter(family.test_loader()))


@pytest.mark.parametrize("name", ["bert-binary", "bert-classes", "lora", "lstm", "cnn"])
@pytest.mark.parametrize("knows_last", [True, False])
def test_classes_and_their_probabilities(name, knows_last):
    module, batch = batch_of(name)
    found = predicted(module, batch, module.last if knows_last else None)
    with torch.no_grad():
        if isinstance(module, HuggingFace):
            logits = module(**batch).logits
        else:
            logits = module.network(batch[0])
            if not knows_last:  # nothing says which of its tensors are logits
                assert bool(found.isnan().all())
                return
    best = logits.softmax(-1).max(-1)
    assert torch.equal(found[:, 0].long(), best.indices)
    torch.testing.assert_close(found[:, 1].float(), best.values)


def test_a_head_that_scores_every_position():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=8,
        n_layer=1,
        n_head=2,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        n_positions=16,
    )
    model = transformers.GPT2ForSequenceClassification(config).eval()
    module = HuggingFace(model, embedding="transformer.wte", last="score")
    batch = {"input_ids": torch.randint(1, VOCABULARY, (4, 6)), "labels": torch.tensor([0, 1, 2, 0])}
    with torch.no_grad():
        best = model(input_ids=batch["input_ids"]).logits.softmax(-1).max(-1)
    found = predicted(module, batch, "model.score")
    assert torch.equal(found[:, 0].long(), best.indices)
    torch.testing.assert_close(found[:, 1].float(), best.values)


def test_a_regression_has_values_and_no_probability():
    module, batch = batch_of("bert-regression")
    found = predicted(module, batch, module.last)
    with torch.no_grad():
        torch.testing.assert_close(found[:, 0].float(), module(**batch).logits[:, 0])
    assert bool(found[:, 1].isnan().all())


@pytest.mark.parametrize("name", ["bert-multi-label", "bert-tokens", "gpt2-causal", "t5"])
def test_examples_with_many_outputs_have_no_one_prediction(name):
    module, batch = batch_of(name)
    assert bool(predicted(module, batch, module.last).isnan().all())


class Scorer(nn.Module):
    """One logit for each example, or probabilities."""

    def __init__(self, output) -> None:
        super().__init__()
        self.last = nn.Identity()
        self.output = output

    def influence_loss(self, batch):
        return self.last(self.output).sum(1)


@pytest.mark.parametrize("training", [(), (0, 1), (1,)])
@pytest.mark.parametrize(
    "labels", [[1, 1], [True, False], [1.0, 0.0], [[1], [1]], [[1.0], [0.0]], [1, -1], [1, torch.nan]]
)
def test_one_logit_is_that_of_the_second_class(labels, training):
    batch = (torch.zeros(2, 3), torch.tensor(labels))
    found = predicted(Scorer(torch.tensor([[2.0], [-1.0]])), batch, "last", training)
    sure = torch.tensor([2.0, 1.0]).sigmoid().double()
    torch.testing.assert_close(found, torch.stack([torch.tensor([1.0, 0.0]).double(), sure], 1))


@pytest.mark.parametrize(
    ("labels", "training"),
    [([1, 4], ()), ([0.25, 1.0], (0, 1)), ([[0.5], [1.0]], ()), ([0.0, 1.0], (0, 0.5)), ([1, 0], (0, 1, 2))],
)
def test_one_number_for_a_rating_on_a_scale_is_a_value(labels, training):
    found = predicted(Scorer(torch.tensor([[2.0], [3.5]])), (torch.zeros(2, 3), torch.tensor(labels)), "last", training)
    assert found[:, 0].tolist() == [2.0, 3.5]
    assert bool(found[:, 1].isnan().all())


def test_probabilities_are_taken_as_they_are():
    module = Scorer(torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
    found = predicted(module, (torch.zeros(2, 3), torch.tensor([1, 1])), "last")
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.9], [1.0, 0.7]]).double())


def test_a_layer_that_is_called_twice_says_nothing():
    module = Scorer(torch.tensor([[0.9, 0.1]]))
    module.influence_loss = lambda batch: (module.last(module.output) + module.last(module.output)).sum(1)
    assert bool(predicted(module, (torch.zeros(1, 3), torch.tensor([1])), "last").isnan().all())
