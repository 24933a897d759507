"""What a model's outputs mean, and which tokens count and are named."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lightning_tracin.gradients.outputs import (
    Output,
    are_distances,
    best_answers,
    counted_tokens,
    named_tokens,
    output_of,
)

RIGHT = {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
LEFT = {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}


@pytest.mark.parametrize(
    ("logits", "labels", "may_be_binary", "kind"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 2]), True, "class"),
        (torch.zeros(2, 3), None, True, "class"),
        (torch.zeros(2, 3), torch.zeros(2, 3), True, "set"),
        (torch.zeros(2), torch.tensor([0, 1]), True, "binary"),
        (torch.zeros(2, 1), torch.tensor([0, 1]), True, "binary"),
        (torch.zeros(2, 1), torch.tensor([[0.0], [1.0]]), True, "binary"),
        (torch.zeros(2, 1), torch.tensor([True, False]), True, "binary"),
        (torch.zeros(2, 1), torch.tensor([0.0, 1.0]), False, "value"),
        (torch.zeros(2, 1), torch.tensor([3, 5]), True, "value"),
        (torch.zeros(2, 1), torch.tensor([0.5, 1.0]), True, "value"),
        (torch.zeros(2, 4, 3), None, True, "tokens"),
    ],
)
def test_what_logits_mean(logits, labels, may_be_binary, kind):
    output = output_of(logits, labels, None, own_loss=True, may_be_binary=may_be_binary)
    assert output.kind == kind
    assert output.n_classes == {"binary": 2, "value": 1}.get(kind, 3)
    assert output.without_examples.n_classes == output.n_classes


OUTPUTS, ZEROS_AND_ONES = torch.tensor([[0.1], [0.8], [-0.3], [1.2]]), torch.tensor([0.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("of", [slice(None), slice(2)], ids=["batch", "pair"])
@pytest.mark.parametrize("loss", [functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss])
def test_losses_of_a_regression(loss, of):
    outputs, labels = OUTPUTS[of], ZEROS_AND_ONES[of]
    losses = loss(outputs[:, 0], labels, reduction="none")
    for each in (losses, losses / 2, losses.mean().expand(len(losses))):
        assert are_distances(each, outputs, labels)
        assert are_distances(each, outputs[:, 0], labels[:, None])
    assert not are_distances(losses, OUTPUTS[: len(labels)] + 0.1, labels)
    assert not are_distances(torch.full_like(losses, torch.nan), outputs, labels)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_cross_entropies_are_none_of_a_regression(weight):
    losses = functional.binary_cross_entropy_with_logits(
        OUTPUTS[:, 0], ZEROS_AND_ONES, pos_weight=torch.tensor(weight), reduction="none"
    )
    assert not are_distances(losses, OUTPUTS, ZEROS_AND_ONES)
    assert not are_distances(losses.mean().expand(4), OUTPUTS, ZEROS_AND_ONES)


def test_nor_is_a_single_one_where_it_is_as_large_as_a_square():
    for output in torch.linspace(-4, 4, 1601):
        assert not are_distances(-functional.logsigmoid(output[None]), output[None], torch.tensor([1.0]))


def test_what_is_said():
    logits = torch.tensor([[1.0, -1.0, 3.0], [-1.0, -2.0, -3.0]])
    assert Output("class", logits).said().tolist() == [2, 0]
    assert Output("set", logits).said().tolist() == [[1, 0, 1], [0, 0, 0]]
    assert Output("binary", logits[:, :1]).said().tolist() == [1, 0]
    assert Output("tokens", logits[None]).said().tolist() == [[2, 0]]
    assert Output("tokens", logits[None], causal=True).said().tolist() == [[0, 2]]
    assert Output("answer", torch.stack([logits, logits], 1)).said().tolist() == [[2, 2], [0, 0]]
    with pytest.raises(ValueError, match="Values are no labels"):
        Output("value", logits).said()


def test_an_answer_does_not_end_before_it_starts():
    start, end, log_probability = best_answers(torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[5.0, 0.0, 1.0]]))
    together = torch.tensor([0.0, 5.0, 1.0]).log_softmax(0)[1] + torch.tensor([5.0, 0.0, 1.0]).log_softmax(0)[2]
    assert (start.tolist(), end.tolist()) == ([1], [2])
    torch.testing.assert_close(log_probability[0], together)


def test_tokens_count_that_have_a_label_or_are_no_padding():
    labels = torch.tensor([[5, -100, 7, -100], [1, 2, 3, 4]])
    assert counted_tokens(labels, RIGHT, (2, 4), causal=False).tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    assert counted_tokens(labels, RIGHT, (2, 4), causal=True).tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert counted_tokens(None, RIGHT, (2, 4), causal=False).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert counted_tokens(None, LEFT, (2, 4), causal=True).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert counted_tokens(None, {}, (1, 3), causal=False).tolist() == [[1, 1, 1]]


def test_positions_begin_at_the_first_token_of_a_text():
    assert named_tokens([[0, 2], None], RIGHT, (2, 4)).tolist() == [[1, 0, 1, 0], [1, 1, 1, 1]]
    assert named_tokens([[0, 2], [1]], LEFT, (2, 4)).tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert named_tokens([[3, 9], [1]], LEFT, (2, 4)).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert named_tokens([[0], [1]], None, (2, 4)).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
