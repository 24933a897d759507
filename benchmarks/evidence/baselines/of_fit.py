"""The baselines by name, each a function of a fit."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.evidence.answers import Answers, answers, network_with
from benchmarks.evidence.baselines.last_layer import last_layer_influence, representation_cosine, representer_points
from benchmarks.evidence.baselines.words import agreement, bm25, chance, tf_idf_cosine, word_counts
from benchmarks.evidence.fitting import Fitted
from benchmarks.evidence.networks import Network
from benchmarks.evidence.ours import Scorer


def same_label(fitted: Fitted) -> Tensor:
    """1 where the labels agree, else 0."""
    return _agreement(fitted, 0.0)


def random_scores(fitted: Fitted) -> Tensor:
    """Chance."""
    return chance(len(fitted.task.test), len(fitted.task.train))


def tf_idf(fitted: Fitted, otherwise: float | None) -> Tensor:
    """The cosine of TF-IDF vectors of tokens, times the labels' agreement (1 or ``otherwise``; None: alone)."""
    return tf_idf_cosine(*_counts(fitted)) * _agreement(fitted, otherwise)


def okapi(fitted: Fitted, otherwise: float | None) -> Tensor:
    """BM25 of tokens, times the labels' agreement as in :func:`tf_idf`."""
    return bm25(*_counts(fitted)) * _agreement(fitted, otherwise)


def representation(fitted: Fitted, otherwise: float | None) -> Tensor:
    """The cosine of the inputs of the last layer, times the labels' agreement as in :func:`tf_idf`."""
    test, train = _answers(fitted)
    return representation_cosine(test.features, train.features) * _agreement(fitted, otherwise)


def representers(fitted: Fitted) -> Tensor:
    """Representer points of a last layer that is fitted again, with an L2 penalty of 3e-3, on frozen features."""
    test, train = _answers(fitted)
    n_classes = train.probabilities.shape[1]
    return representer_points(test.features, train.features, test.labels, train.labels, n_classes)


def influence_last(fitted: Fitted) -> Tensor:
    """Influence functions at the last layer, with its Hessian and a tenth of the mean eigenvalue as damping."""
    test, train = _answers(fitted)
    return last_layer_influence(
        test.features, train.features, test.probabilities, train.probabilities, (test.labels, train.labels)
    )


def last_network(fitted: Fitted) -> Network:
    """The network at the end of training."""
    return network_with(fitted.module, fitted.trace.checkpoints[-1].weights())


BASELINES: dict[str, Scorer] = {
    "random": random_scores,
    "same label": same_label,
    "TF-IDF": partial(tf_idf, otherwise=None),
    "TF-IDF x label (1, 0)": partial(tf_idf, otherwise=0.0),
    "TF-IDF x label (1, -1)": partial(tf_idf, otherwise=-1.0),
    "BM25": partial(okapi, otherwise=None),
    "BM25 x label (1, 0)": partial(okapi, otherwise=0.0),
    "BM25 x label (1, -1)": partial(okapi, otherwise=-1.0),
    "representation cosine": partial(representation, otherwise=None),
    "representation cosine x label (1, 0)": partial(representation, otherwise=0.0),
    "representation cosine x label (1, -1)": partial(representation, otherwise=-1.0),
    "representer points": representers,
    "Inf-Last": influence_last,
}


def _agreement(fitted: Fitted, otherwise: float | None) -> Tensor:
    return agreement(fitted.task.test.labels, fitted.task.train.labels, 1.0 if otherwise is None else otherwise)


def _counts(fitted: Fitted) -> tuple[Tensor, Tensor]:
    """How often each token that is not special occurs in each test and training example."""
    special = fitted.task.vocabulary.all_special_ids
    ids_and_masks = []
    for examples in (fitted.task.test, fitted.task.train):
        is_special = (examples.ids[:, :, None] == examples.ids.new_tensor(special)).any(2)
        ids_and_masks.append((examples.ids, (examples.mask == 1) & ~is_special))
    test, train = word_counts(*ids_and_masks)
    return test, train


def _answers(fitted: Fitted) -> tuple[Answers, Answers]:
    """What the network says at the end of training of test and of training examples."""
    network = last_network(fitted)
    return answers(network, fitted.task.test), answers(network, fitted.task.train)
