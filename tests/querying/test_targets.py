"""What of a test example is explained: every target of every task against brute force."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from asked_targets import AskedFamily
from brute_force import relative_error
from families import FAMILIES, HuggingFace
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_tracin import TracInWE

METHODS = ("tracin-we", "tracin-last")
CLASSIFIERS = ("bert-classes", "bert-choices", "lstm", "embedding-called-twice", "without-mixin")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Each family is fitted once, by the first test that asks for it."""
    return functools.cache(lambda name: AskedFamily(FAMILIES[name], tmp_path_factory.mktemp(name) / "trace"))


def logits_of(module, batch):
    """(C,) or (T, C) what the module says of a batch of one."""
    if isinstance(module, HuggingFace):
        return module.model(**batch).logits[0]
    return module.network(batch[0])[0]


def minus_log(number):
    """The loss of a class."""
    return lambda module, batch, _: -logits_of(module, batch).log_softmax(-1)[number]


def pair(first, second):
    return lambda module, batch, number: first(module, batch, number) - second(module, batch, number)


def said_by(family, of_logits):
    """What the module says of each test example at the last checkpoint."""
    module = family.last_module()
    with torch.no_grad():
        return [of_logits(logits_of(module, batch)) for batch in family.singles]


def require_same(family, loss, **asked):
    for method in METHODS:
        expected = family.scores(method, loss)
        assert relative_error(family.influence(method=method, **asked).scores, expected) < 1e-5


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classes_pairs_and_predictions(family, name):
    asked = family(name)
    said = said_by(asked, lambda logits: int(logits.argmax()))
    require_same(asked, minus_log(1), target=1)
    require_same(asked, pair(minus_log(2), minus_log(0)), target=(2, 0))
    require_same(asked, lambda *batch: minus_log(said[batch[2]])(*batch), target="prediction")


@pytest.mark.parametrize("options", [{"normalize": "cosine", "exclude_tokens": (6,)}, {"top_words": 2}], ids=str)
def test_options_act_on_the_gradient_of_the_target(family, options):
    asked = family("bert-classes")
    expected = asked.scores("tracin-we", pair(minus_log(2), minus_log(0)), **options)
    scores = asked.influence(method=TracInWE(**options), target=(2, 0)).scores
    assert relative_error(scores, expected) < 1e-5


def of_set(number):
    """The loss of one class of a set."""
    return lambda module, batch, _: -functional.logsigmoid(logits_of(module, batch)[number])


def test_one_class_of_a_set_is_its_own_output_and_the_prediction_the_set(family):
    asked = family("bert-multi-label")
    said = said_by(asked, lambda logits: (logits > 0).float())
    require_same(asked, of_set(1), target=1)
    require_same(asked, pair(of_set(2), of_set(0)), target=(2, 0))

    def of_said(module, batch, number):
        return functional.binary_cross_entropy_with_logits(logits_of(module, batch), said[number])

    require_same(asked, of_said, target="prediction")


def test_the_prediction_of_a_regression_is_its_value(family):
    require_same(family("bert-regression"), lambda module, batch, _: -logits_of(module, batch)[0], target="prediction")


def of_tokens(labels_of, *, shift=0):
    """The mean loss of the tokens that have other labels than -100."""

    def loss(module, batch, number):
        logits, labels = logits_of(module, batch), labels_of(batch, number)
        return functional.cross_entropy(logits[: len(logits) - shift], labels[shift:])

    return loss


def said_where_labelled(said):
    return lambda batch, number: torch.where(batch["labels"][0] == -100, -100, said[number])


def test_tags(family):
    asked = family("bert-tokens")
    said = said_by(asked, lambda logits: logits.argmax(-1))

    def only(number, place):
        return lambda batch, _: torch.full_like(batch["labels"][0], -100).index_fill_(0, torch.tensor(place), number)

    require_same(asked, of_tokens(said_where_labelled(said)), target="prediction")
    require_same(asked, of_tokens(only(1, [0, 2])), target=1, positions=[0, 2])
    first, second = of_tokens(only(2, [1])), of_tokens(only(0, [1]))
    require_same(asked, pair(first, second), target=(2, 0), positions=[1])

    def of_each(batch, number):
        places = torch.tensor([number % 3])
        return torch.full_like(batch["labels"][0], -100).index_copy_(0, places, batch["labels"][0][places])

    require_same(asked, of_tokens(of_each), positions=[[np.int64(number % 3)] for number in range(5)])


@pytest.mark.parametrize(("name", "shift"), [("gpt2-causal", 1), ("bert-masked", 0), ("t5", 0), ("bart", 0)])
def test_tokens_that_a_language_model_says(family, name, shift):
    asked = family(name)
    said = said_by(asked, lambda logits: logits.argmax(-1).roll(shift))
    if name not in ("t5", "bart"):
        require_same(asked, of_tokens(said_where_labelled(said), shift=shift), target="prediction")
        return

    def loss(module, batch, number):
        logits = logits_of(module, batch)  # the decoder reads the labels, not what is said
        return functional.cross_entropy(logits, said_where_labelled(said)(batch, number))

    require_same(asked, loss, target="prediction")

    def of_one(module, batch, _):
        return -logits_of(module, batch)[1].log_softmax(0)[batch["labels"][0, 1]]

    require_same(asked, of_one, positions=[1])


def test_one_token_of_a_causal_model_also_where_texts_are_padded_on_the_left(family):
    def only(place):
        def labels_of(batch, _):
            start = int(batch["attention_mask"][0].argmax())
            labels = torch.full_like(batch["labels"][0], -100)
            labels[start + place] = batch["labels"][0][start + place]
            return labels

        return labels_of

    for name in ("gpt2-causal", "gpt2-padded-on-the-left"):
        expected = family(name).scores("tracin-last", of_tokens(only(2), shift=1))
        scores = family(name).influence(method="tracin-last", positions=[2]).scores
        assert relative_error(scores, expected) < 1e-5


def test_a_token_instead_of_another_at_one_place(family):
    def of(token):
        return lambda module, batch, _: -logits_of(module, batch).log_softmax(-1)[1, token]  # at 1 is said what is at 2

    require_same(family("gpt2-causal"), pair(of(7), of(9)), target=(7, 9), positions=[2])


def test_the_answer_that_is_given(family):
    asked = family("bert-answers")

    def logits(module, batch):
        output = module.model(**batch)
        return output.start_logits[0].log_softmax(0), output.end_logits[0].log_softmax(0)

    said = []
    with torch.no_grad():
        for batch in asked.singles:
            start, end = logits(asked.last_module(), batch)
            together = (start[:, None] + end).where(torch.ones(len(end), len(start)).triu() > 0, -torch.inf)
            said.append(divmod(int(together.argmax()), len(end)))

    def loss(module, batch, number):
        start, end = logits(module, batch)
        return -(start[said[number][0]] + end[said[number][1]]) / 2

    require_same(asked, loss, target="prediction")


@pytest.mark.parametrize(
    ("name", "target", "positions"),
    [
        ("bert-classes", "prediction", None),
        ("bert-choices", (0, 2), None),
        ("bert-multi-label", "prediction", None),
        ("bert-multi-label", 1, None),
        ("bert-regression", "prediction", None),
        ("bert-tokens", "prediction", [1]),
        ("bert-tokens", 2, None),
        ("gpt2-causal", "prediction", None),
        ("bert-answers", "prediction", None),
    ],
)
def test_examples_without_labels(family, name, target, positions):
    asked = family(name)
    examples = [
        {entry: value for entry, value in example.items() if entry in ("input_ids", "attention_mask")}
        for example in asked.family.test_loader().dataset
    ]
    options = {"target": target, "positions": positions, "method": "tracin-last"}
    own, without = asked.influence(**options), asked.influence(DataLoader(examples, batch_size=3), **options)
    torch.testing.assert_close(without.scores, own.scores, rtol=1e-4, atol=1e-8)
    assert without.target_names == own.target_names
    torch.testing.assert_close(without.predictions, own.predictions, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_model_that_reads_its_labels_needs_some(family, name):
    asked = family(name)
    examples = [{"input_ids": example["input_ids"]} for example in asked.family.test_loader().dataset]
    with pytest.raises(ValueError, match=r"reads and writes, .* Give the test examples labels, .* model\.generate"):
        asked.influence(DataLoader(examples, batch_size=3), target="prediction")

    class Narrow(HuggingFace):
        def forward(self, input_ids, attention_mask, labels):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    model = asked.family.build()
    narrow = Narrow(model.model, embedding="x", last="y")
    with pytest.raises(ValueError, match="says depends on the labels in its batch, which its forward reads"):
        asked.influence(model=narrow, trace=asked.path, target="prediction")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bert-regression", {"target": 0}, 'does regression: "prediction" is the value'),
        ("bert-answers", {"target": 0}, 'does question answering: "prediction" is the answer'),
        ("bert-tokens", {"positions": [7]}, r"positions \[7\] name no token of test example \d that counts"),
        ("bert-tokens", {"positions": [[1], [0]]}, "has the places of 2 test examples, but there is a test example 2"),
        ("gpt2-causal", {"target": 3}, "target='3' is a token: say by positions"),
        ("gpt2-causal", {"target": "Paris", "positions": [2]}, "There is no class 'Paris'. No names are known"),
        ("bert-multi-label", {"target": 3}, "there is no class 3. The model has 3"),
    ],
)
def test_targets_that_do_not_fit_the_task(family, name, options, message):
    with pytest.raises(ValueError, match=message):
        family(name).influence(**options)


def test_positions_of_several_loaders_stand_by_their_names(family):
    asked = family("bert-tokens")
    loaders = {name: asked.family.test_loader() for name in ("news", "sport")}
    own = {"news": [[number % 3] for number in range(5)], "sport": [1]}
    together = asked.influence(loaders, target=(2, 0), positions=own)
    apart = torch.cat([asked.influence(target=(2, 0), positions=positions).scores for positions in own.values()])
    torch.testing.assert_close(together.scores, apart, rtol=1e-5, atol=1e-9)
    assert together.target == "2, not 0 at positions of each"
    with pytest.raises(ValueError, match="of which there are several: pass a mapping of the loaders' names, 'news'"):
        asked.influence(loaders, target=(2, 0), positions=own["news"])
    with pytest.raises(ValueError, match="positions are of the loaders news, but there are news, sport"):
        asked.influence(loaders, target=(2, 0), positions={"news": [1]})
    with pytest.raises(ValueError, match="positions are of the loaders news, but there is one"):
        asked.influence(target=(2, 0), positions={"news": [1]})
