"""The tasks of the study: six pairs of texts and network, by name."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.evidence import texts
from benchmarks.evidence.examples import encoded
from benchmarks.evidence.networks import Convolutional, MiniLM, PooledMiniLM, UnrecordedConvolutional
from benchmarks.evidence.task import Recipe, Task
from benchmarks.evidence.texts import Text

CNN = Recipe(
    Convolutional,
    epochs=4,
    batch_size=64,
    layers=("convolutions.0", "convolutions.1", "hidden"),
    unrecorded=UnrecordedConvolutional,
)
# All linear layers but the last. A CPU that has bfloat16 fits twice as fast with it.
_MINILM = Recipe(
    MiniLM,
    epochs=3,
    batch_size=32,
    precision="bf16-mixed",
    layers=("bert.encoder.layer.*",),
)
_POOLED_MINILM = replace(_MINILM, network=PooledMiniLM, layers=(*_MINILM.layers, "pooler.dense"))


def bbc_cnn() -> Task:
    """BBC News: 1,600 articles, 120 tested; the convolutional network."""
    articles, topics = texts.bbc()
    train, test = _divided(articles, 1600, 120)
    return _task("bbc-cnn", "BBC News, CNN", (train, test), topics, 48, CNN)


def sms_cnn() -> Task:
    """SMS spam: 1,600 messages, 60 ham and 60 spam tested; the convolutional network."""
    messages, classes = texts.sms()
    train, rest = _divided(messages, 1600, len(messages) - 1600)
    return _task("sms-cnn", "SMS spam, CNN", (train, _of_each_class(rest, 60)), classes, 32, CNN)


def r8_cnn() -> Task:
    """Reuters R8: up to 300 training texts of each topic, 15 tested; the convolutional network.

    Of all texts three in four would be of two topics, and networks fitted to a half of 1,600 know nothing but these.
    """
    train, topics = texts.reuters("train")
    seen = {each.text for each in train}
    test = [each for each in texts.reuters("test")[0] if each.text not in seen]
    parts = (_of_each_class(_shuffled(train), 300), _of_each_class(_shuffled(test), 15))
    return _task("r8-cnn", "Reuters R8, CNN", parts, topics, 48, CNN)


def movies_minilm() -> Task:
    """Movie reviews: 1,000 sentences, 50 of each sentiment tested; MiniLM's first two layers."""
    reviews, classes = texts.movies()
    train, rest = _divided(reviews, 1000, 2000)
    return _task("movies-minilm", "Movie reviews, MiniLM", (train, _of_each_class(rest, 50)), classes, 24, _MINILM)


def privacy_minilm() -> Task:
    """PrivacyQA: 1,000 pairs of question and clause, 100 of other questions tested; MiniLM's first two layers."""
    pairs, classes = texts.privacy()
    train, rest = _divided(pairs, 1000, 2000)
    return _task("privacy-minilm", "PrivacyQA pairs, MiniLM", (train, _of_each_class(rest, 50)), classes, 48, _MINILM)


def bbc_minilm() -> Task:
    """BBC News: 1,200 articles, 100 tested; MiniLM's first two layers."""
    articles, topics = texts.bbc()
    train, test = _divided(articles, 1200, 100)
    return _task("bbc-minilm", "BBC News, MiniLM", (train, test), topics, 48, _POOLED_MINILM)


TASKS: dict[str, Callable[[], Task]] = {
    "bbc-cnn": bbc_cnn,
    "sms-cnn": sms_cnn,
    "r8-cnn": r8_cnn,
    "movies-minilm": movies_minilm,
    "privacy-minilm": privacy_minilm,
    "bbc-minilm": bbc_minilm,
}


def in_float32(task: Task) -> Task:
    """The same task fitted without autocast, for CPUs that do not multiply bfloat16; under a name of its own."""
    if task.recipe.precision == "32-true":
        return task
    recipe = replace(task.recipe, precision="32-true")
    return replace(task, name=f"{task.name}-float32", title=f"{task.title} in float32", recipe=recipe)


def _task(
    name: str, title: str, parts: tuple[list[Text], list[Text]], names: Sequence[str], n_tokens: int, recipe: Recipe
) -> Task:
    (train, test), vocabulary = encoded(parts, n_tokens)
    return Task(name, title, train, test, tuple(names), vocabulary, recipe)


def _shuffled(examples: Sequence[Text]) -> list[Text]:
    return random.Random(0).sample(examples, len(examples))


def _divided(examples: Sequence[Text], n_train: int, n_test: int) -> tuple[list[Text], list[Text]]:
    """Random training and test examples, no group of which stands on both sides."""
    shuffled = _shuffled(examples)
    groups = sorted({each.group for each in shuffled if each.group})
    for_testing = set(random.Random(1).sample(groups, len(groups) // 4))
    train = [each for each in shuffled if each.group not in for_testing][:n_train]
    taken = set(train)
    rest = [each for each in shuffled if each not in taken and (not groups or each.group in for_testing)]
    return train, rest[:n_test]


def _of_each_class(examples: Sequence[Text], n: int) -> list[Text]:
    """The first n of each class, in the order in which they come."""
    seen: Counter[float] = Counter()
    chosen = []
    for each in examples:
        seen[each.label] += 1
        if seen[each.label] <= n:
            chosen.append(each)
    return chosen
