"""The study's baselines and peers, on random tensors and a tiny network, against slow and independent forms."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.evidence.answers import word_gradients
from benchmarks.evidence.baselines.last_layer import fitted_last_layer, last_layer_influence, representer_points
from benchmarks.evidence.baselines.words import bm25, tf_idf_cosine, word_counts
from benchmarks.evidence.examples import Examples
from benchmarks.evidence.peers.captum_peer import tracin_cp
from benchmarks.evidence.peers.dattri_peer import projected_tracin, trak
from benchmarks.evidence.peers.kronfluence_peer import ek_fac
from benchmarks.evidence.peers.network import Positional, as_tensors, example_gradients, linear_weights
from benchmarks.evidence.peers.synonyms import merged_words, paired_products, word_pairs
from benchmarks.evidence.peers.trackstar import track_star, whitened_cosine
from benchmarks.evidence.peers.unlearning import untrac_inv
from benchmarks.evidence.shortlist import shortlist_recall
from benchmarks.evidence.word_kfac import factors, shared_products, whitened

VOCABULARY, N_TRAIN, N_TEST, WORDS = 12, 10, 4, 5


class Tiny(nn.Module):
    """A network of the study, as far as peers use it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.convolution = nn.Conv1d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, batch):
        states = self.convolution(self.embedding(batch["input_ids"]).transpose(1, 2)).tanh()
        return self.head(states.masked_fill(batch["attention_mask"][:, None] == 0, -1).amax(2))

    def influence_loss(self, batch):
        return functional.cross_entropy(self(batch), batch["labels"], reduction="none")


def examples(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n, WORDS), generator=generator)
    mask = torch.arange(WORDS) < torch.randint(2, WORDS + 1, (n, 1), generator=generator)
    labels = torch.randint(3, (n,), generator=generator)
    return Examples(ids * mask, mask.long(), torch.zeros_like(ids), labels, ("",) * n)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def test():
    return examples(N_TEST, seed=1)


@pytest.fixture
def train():
    return examples(N_TRAIN, seed=2)


def words_of(one):
    return [[int(word) for word in ids if word] for ids in one.ids]


def test_kfac_of_words_is_that_of_one_hot_vectors(network, test, train):
    """Against the Kronecker product itself, of what a linear layer over one-hot vectors would have."""
    gradients = [word_gradients(network, "embedding", each) for each in (test, train)]
    one_hot = functional.one_hot(train.ids, VOCABULARY).double()
    held = train.ids != 0
    inputs, outputs = one_hot[held], gradients[1][held].double()
    covariances = [rows.T @ rows / len(rows) for rows in (inputs, outputs)]
    damped = [each + 0.1 * each.trace() / len(each) * torch.eye(len(each)) for each in covariances]
    inverse = torch.linalg.inv(torch.kron(*damped))
    dense = [
        (functional.one_hot(each.ids, VOCABULARY).double().transpose(1, 2) @ at.double()).masked_fill(
            torch.arange(VOCABULARY)[:, None] == 0, 0
        )
        for each, at in zip((test, train), gradients, strict=True)
    ]
    tests, trains = (each.flatten(1) for each in dense)
    norms = [(each @ inverse * each).sum(1).sqrt() for each in (tests, trains)]
    expected = tests @ inverse @ trains.T / norms[0][:, None] / norms[1]
    by_word, by_hidden = factors(train.ids, gradients[1], VOCABULARY)
    sides = [whitened(each.ids, at, by_word, by_hidden) for each, at in zip((test, train), gradients, strict=True)]
    torch.testing.assert_close(shared_products(*sides), expected.float(), rtol=1e-4, atol=1e-5)


def test_tf_idf_cosines_are_those_of_dictionaries(test, train):
    texts = words_of(train)
    idf = {word: 1 + math.log(11 / (1 + sum(word in text for text in texts))) for word in range(VOCABULARY)}

    def vector(text):
        return {word: (1 + math.log(count)) * idf[word] for word, count in Counter(text).items()}

    def cosine(one, two):
        norms = [math.sqrt(sum(value**2 for value in each.values())) for each in (one, two)]
        return sum(value * two.get(word, 0) for word, value in one.items()) / norms[0] / norms[1]

    expected = [[cosine(vector(a), vector(b)) for b in texts] for a in words_of(test)]
    counts = word_counts((test.ids, test.mask == 1), (train.ids, train.mask == 1))
    torch.testing.assert_close(tf_idf_cosine(*counts), torch.tensor(expected))


def test_bm25_is_that_of_its_formula(test, train):
    texts = words_of(train)
    mean_length = sum(map(len, texts)) / len(texts)

    def score(query, text):
        total = 0.0
        for word in set(query):
            holding = sum(word in each for each in texts)
            frequency = text.count(word)
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            total += idf * frequency * 2.5 / (frequency + 1.5 * (0.25 + 0.75 * len(text) / mean_length))
        return total

    expected = [[score(query, text) for text in texts] for query in words_of(test)]
    counts = word_counts((test.ids, test.mask == 1), (train.ids, train.mask == 1))
    torch.testing.assert_close(bm25(*counts), torch.tensor(expected))


def test_representer_points_add_up_to_logits_of_a_stationary_last_layer():
    torch.manual_seed(0)
    train, test, labels = torch.randn(40, 4), torch.randn(3, 4), torch.randint(3, (40,))
    ones = functional.pad(train.double(), (0, 1), value=1.0)
    weight = fitted_last_layer(ones, labels, 3, 0.01).requires_grad_()
    loss = functional.cross_entropy(ones @ weight.T, labels) + 0.01 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-6
    asked = torch.tensor([0, 2, 1])
    logits = (functional.pad(test.double(), (0, 1), value=1.0) @ weight.T)[torch.arange(3), asked]
    points = representer_points(test, train, asked, labels, 3, l2=0.01)
    torch.testing.assert_close(points.sum(1), logits.detach().float(), atol=1e-4, rtol=1e-4)


def test_influence_at_the_last_layer_is_that_of_the_dense_hessian():
    torch.manual_seed(0)
    train, test = torch.randn(30, 3).double(), torch.randn(4, 3).double()
    train_labels, test_labels = torch.randint(3, (30,)), torch.randint(3, (4,))
    weight = torch.randn(3 * 4).double()

    def logits(weight, inputs):
        return functional.pad(inputs, (0, 1), value=1.0) @ weight.view(3, 4).T

    def loss(weight, inputs, labels):
        return functional.cross_entropy(logits(weight, inputs), labels)

    hessian = torch.autograd.functional.hessian(lambda w: loss(w, train, train_labels), weight)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(12)
    each = [
        torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, *pair)
        for pair in ((test[:, None], test_labels[:, None]), (train[:, None], train_labels[:, None]))
    ]
    expected = each[0] @ torch.linalg.inv(damped) @ each[1].T
    said = [logits(weight, inputs).softmax(1) for inputs in (test, train)]
    found = last_layer_influence(test, train, *said, (test_labels, train_labels))
    torch.testing.assert_close(found, expected.float())


def test_unlearning_moves_weights_by_the_signs_of_the_gradient(network, test, train):
    batches = [
        dict(zip(("input_ids", "attention_mask", "token_type_ids", "labels"), as_tensors(each).tensors, strict=True))
        for each in (test, train)
    ]

    def of_test(module, number):
        return module.influence_loss(batches[0])[number]

    rate = 1e-5
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = untrac_inv(
        network.double(), of_test, lambda module: module.influence_loss(batches[1]), N_TEST, steps=1, learning_rate=rate
    )
    assert all(torch.equal(value.float(), before[name]) for name, value in network.state_dict().items())
    for number in range(N_TEST):
        weights = list(network.parameters())
        signs = [each.sign() for each in torch.autograd.grad(of_test(network, number), weights)]
        for place in range(N_TRAIN):
            gradient = torch.autograd.grad(network.influence_loss(batches[1])[place], weights)
            first_order = rate * sum(float((a * b).sum()) for a, b in zip(signs, gradient, strict=True))
            assert found[number, place] == pytest.approx(first_order, rel=0.02, abs=1e-8)


def dense_gradients(network, one, name):
    """Each example's gradient at a weight, by a loop."""
    rows = []
    for number in range(len(one)):
        batch = {"input_ids": one.ids, "attention_mask": one.mask, "labels": one.labels}
        loss = network.influence_loss({key: each[number : number + 1] for key, each in batch.items()}).sum()
        rows.append(torch.autograd.grad(loss, network.get_parameter(name))[0])
    return torch.stack(rows)


def test_gradients_of_all_examples_at_once_are_those_of_a_loop(network, test):
    names = linear_weights(network)
    assert names == ["convolution.weight", "head.weight"]
    found = example_gradients(Positional(network), [f"network.{name}" for name in names])(
        list(as_tensors(test).tensors)
    )
    for name in names:
        torch.testing.assert_close(found[f"network.{name}"], dense_gradients(network, test, name))


def test_flat_convolutions_say_the_same(network, test):
    inputs = as_tensors(test).tensors[:3]
    torch.testing.assert_close(Positional(network, flat_convolutions=True)(*inputs), Positional(network)(*inputs))


def test_words_are_paired_with_their_like(network, test, train):
    """With embeddings at right angles only equal words are paired, as in TracIn-WE."""
    expected = dense_gradients(network, test, "embedding.weight").flatten(1) @ (
        dense_gradients(network, train, "embedding.weight").flatten(1).T
    )
    merged = [merged_words(each.ids, word_gradients(network, "embedding", each)) for each in (test, train)]
    found = [
        paired_products(word_pairs(ids, merged[1][0], torch.eye(VOCABULARY)), gradients, merged[1][1])
        for ids, gradients in zip(*merged[0], strict=True)
    ]
    torch.testing.assert_close(torch.stack(found), expected)


def test_words_are_paired_one_to_one_with_the_nearest(test, train):
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY, 3)
    merged = [merged_words(each.ids, torch.randn(*each.ids.shape, 6)) for each in (test, train)]
    for ids, gradients in zip(*merged[0], strict=True):
        found = paired_products(word_pairs(ids, merged[1][0], table, least=0.3), gradients, merged[1][1])
        for place, (others, of_others) in enumerate(zip(*merged[1], strict=True)):
            total, here, there = 0.0, ids.nonzero()[:, 0].tolist(), others.nonzero()[:, 0].tolist()
            near = {
                (a, b): float(torch.cosine_similarity(table[ids[a]], table[others[b]], dim=0))
                for a in here
                for b in there
            }
            for (a, b), value in near.items():
                best = max(*(near[a, other] for other in there), *(near[other, b] for other in here))
                if value >= 0.3 and value >= best - 1e-6:
                    total += float(gradients[a] @ of_others[b])
            assert found[place] == pytest.approx(total, abs=1e-5)


def test_whitened_training_examples_have_the_identity_for_a_covariance():
    torch.manual_seed(0)
    train = torch.randn(50, 4) @ torch.randn(4, 4)
    test = torch.randn(3, 4)
    inverse = torch.linalg.inv(train.T @ train / 50)
    products = test @ inverse @ train.T
    norms = [(each @ inverse * each).sum(1).sqrt() for each in (test, train)]
    torch.testing.assert_close(
        whitened_cosine(test, train, 0.0), products / norms[0][:, None] / norms[1], atol=1e-4, rtol=1e-3
    )


def test_a_shortlist_finds_what_is_on_it():
    torch.manual_seed(0)
    scores, nearness = torch.randn(6, 30), torch.randn(6, 30)
    for length in (3, 10, 30):
        shares = []
        for of_test, near in zip(scores, nearness, strict=True):
            best = sorted(range(30), key=lambda place: -of_test[place])[:5]
            listed = sorted(range(30), key=lambda place: -near[place])[:length]
            shares.append(len(set(best) & set(listed)) / 5)
        assert shortlist_recall(scores, nearness, [length], top=5) == [pytest.approx(sum(shares) / 6)]


def own_moments(network):
    return {name: torch.rand_like(network.get_parameter(name)) for name in linear_weights(network)}


PEERS = {
    "captum": lambda network, one, two: tracin_cp(network, [network.state_dict()], [1.0], one, two, ["head"]),
    "dattri": lambda network, one, two: projected_tracin(
        network, [network.state_dict()], [1.0], one, two, linear_weights(network)
    ),
    "kronfluence": ek_fac,
    "own": lambda network, one, two: track_star(network, linear_weights(network), own_moments(network), one, two),
}


@pytest.mark.parametrize("library", list(PEERS))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_peer_finds_the_test_example_among_the_training_examples(network, train, library):
    """With the same examples on both sides, g M g' is symmetric with a positive diagonal for any M > 0."""
    if library != "own" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    scores = PEERS[library](network, train, train)
    assert scores.shape == (N_TRAIN, N_TRAIN)
    assert scores.dtype == torch.float32
    assert (scores.diagonal() > 0).all()
    torch.testing.assert_close(scores, scores.T, rtol=0.05, atol=0.02 * float(scores.abs().max()))


def test_trak_is_its_formula_at_gradients_that_are_not_projected(network, train, test, monkeypatch):
    trak_module = pytest.importorskip("dattri.algorithm.trak")
    monkeypatch.setattr(trak_module, "random_project", lambda *_, **__: lambda gradients, ensemble_id: gradients)
    scores = trak(network, [network.state_dict()], test, train, ["convolution.bias"])
    said = {}
    for name, one in (("test", test), ("train", train)):
        logits = Positional(network)(*as_tensors(one).tensors[:3])
        said[name] = logits.softmax(1).gather(1, one.labels[:, None])[:, 0].detach()
    n = sum(each.numel() for each in network.parameters()) ** 0.5
    # d margin = d log(p / (1 - p)) = -d loss / (1 - p)
    features = {
        name: -dense_gradients(network, one, "convolution.bias") / (1 - said[name][:, None]) / n
        for name, one in (("test", test), ("train", train))
    }
    kernel = features["train"].T @ features["train"]
    expected = features["test"] @ torch.linalg.solve(kernel, features["train"].T) * (1 - said["train"])
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)
