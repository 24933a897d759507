"""Which labels are shown beside the examples, by the form of their batch and by a module that tells them itself."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from still_fits import Still, build
from torch.nn import functional
from torch.utils.data import default_collate
from toy import N_TEST, N_TRAIN, fitted, loader, quiet, test_texts, texts
from training_examples import examples_of_training
from transformers import BatchEncoding

from lightning_tracin import TracInCallback, TracInMixin
from lightning_tracin.bridge.mixin import labels_of_module, words_of_batch
from lightning_tracin.gradients.batches import labels_of
from lightning_tracin.gradients.relabelled import with_labels

Pair = namedtuple("Pair", ["ids", "labels"])
Triple = namedtuple("Triple", ["ids", "labels", "lengths"])

# How a batch of ids and labels is written, and where it has a loss from again; and whether its form tells the labels.
FORMS = {
    "a mapping": (lambda i, y: {"input_ids": i, "labels": y}, lambda b: (b["input_ids"], b["labels"]), True),
    "label": (lambda i, y: UserDict(ids=i, label=y), lambda b: (b["ids"], b["label"]), True),
    "no labels": (lambda i, y: {"labels": None, "ids": i, "target": y}, lambda b: (b["ids"], b["target"]), False),
    "a tuple": (lambda i, y: (i, y), lambda b: b, True),
    "a list": (lambda i, y: [i, y], lambda b: b, True),
    "a named tuple": (Pair, lambda b: b, True),
    "the second a mapping": (lambda i, y: (i, {"labels": y}), lambda b: (b[0], b[1]["labels"]), True),
    "the second a mapping, label": (lambda i, y: (i, {"label": y}), lambda b: (b[0], b[1]["label"]), True),
    "the second a mapping without": (lambda i, y: (i, {"y": y}), lambda b: (b[0], b[1]["y"]), False),
    "both mappings": (lambda i, y: ({"ids": i}, {"labels": y}), lambda b: (b[0]["ids"], b[1]["labels"]), True),
    "the first a mapping": (
        lambda i, y: ({"ids": i, "labels": y}, ["a"] * len(y)),
        lambda b: (b[0]["ids"], b[0]["labels"]),
        True,
    ),
    "the first a mapping, beside another": (
        lambda i, y: ({"ids": i, "labels": y}, {"lengths": i.count_nonzero(1)}),
        lambda b: (b[0]["ids"], b[0]["labels"]),
        True,
    ),
    "lengths last": (lambda i, y: (i, y, i.count_nonzero(1)), lambda b: b[:2], False),
    "lengths last, named": (lambda i, y: Triple(i, y, i.count_nonzero(1)), lambda b: b[:2], False),
    "labels last": (lambda i, y: (i, i.count_nonzero(1), y), lambda b: b[::2], False),
    "one entry": (lambda i, y: [torch.cat([i, y[:, None]], 1)], lambda b: (b[0][:, :-1], b[0][:, -1]), False),
}


class Formed(Still):
    """Takes batches of one form."""

    unpack = staticmethod(FORMS["a tuple"][1])

    def influence_loss(self, batch):
        ids, labels = self.unpack(batch)
        return functional.cross_entropy(self(ids), labels, reduction="none")


class Told(Formed):
    """Says where its labels are; they are counted from 10."""

    def influence_labels(self, batch):
        return self.unpack(batch)[1] + 10


class PlainTold(Told):
    """Without the mixin's losses."""

    influence_loss = None

    def training_step(self, batch, batch_idx):
        ids, labels = self.unpack(batch)
        return functional.cross_entropy(self(ids), labels)


def asked(path, form, kind=Formed, cache="checkpoint"):
    """The labels that the trace holds of training examples, and what a result shows of test and training examples."""
    form, unpack, _ = FORMS[form]
    module = build(kind)
    module.unpack = unpack

    def collate(items):
        return form(*default_collate(items))

    fit = fitted(path, module, loader(collate_fn=collate), cache=cache, trainer={"max_epochs": 1})
    result = fit.influence(loader(test_texts(), collate_fn=collate))
    explained = list(result.explanations(k=N_TRAIN))
    trained = {index: each.label for index, each in examples_of_training(result, range(N_TRAIN)).items()}
    for each in explained:
        assert all(one.example.label == trained[one.example.index] for one in each.proponents)
    return [each.test.label for each in explained], [trained[index] for index in range(N_TRAIN)]


def expected(start=0):
    return tuple([str(int(label) + start) for _, label in data] for data in (test_texts(), texts()))


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_those_that_the_form_of_a_batch_tells(tmp_path, form):
    told = FORMS[form][2]
    assert asked(tmp_path, form) == (expected() if told else ([None] * N_TEST, [None] * N_TRAIN))


@pytest.mark.parametrize("kind", [Told, PlainTold])
def test_labels_in_a_column_are_one_of_each(tmp_path, kind):
    class InColumn(kind):
        def influence_labels(self, batch):
            return super().influence_labels(batch)[:, None] / 4

    test, train = asked(tmp_path, "a tuple", InColumn)
    assert (test, train) == tuple(
        [f"{(int(label) + 10) / 4:.3g}".removesuffix(".0") for _, label in data] for data in (test_texts(), texts())
    )


@pytest.mark.parametrize("form", FORMS)
def test_other_labels_come_where_those_of_a_batch_are_found(form):
    make, unpack, told = FORMS[form]
    ids, labels = torch.arange(12).view(4, 3), torch.arange(4)
    batch = make(ids, labels)
    if not told and isinstance(batch, tuple) and len(batch) > 2:
        with pytest.raises(ValueError, match=r"cannot be told from a batch of this form: .* of 3 entries\. Override"):
            with_labels(batch, labels + 7)
        return
    changed = with_labels(batch, labels + 7)
    assert torch.equal(labels_of(changed), labels + 7)
    if told:
        assert type(changed) is type(batch)
        assert torch.equal(unpack(changed)[0], ids)
        assert torch.equal(unpack(changed)[1], labels + 7)
        assert torch.equal(unpack(batch)[1], labels)


def test_labels_come_beside_inputs_that_have_none():
    ids, labels = torch.ones(2, 3), torch.ones(2)
    for batch in (ids, (ids,), [ids], (ids, None), {"ids": ids}, (ids, {}), ({"ids": ids}, ["a", "b"])):
        assert labels_of(with_labels(batch, labels)) is labels
    assert labels_of(with_labels(BatchEncoding({"input_ids": ids}), labels)) is labels
    with pytest.raises(ValueError, match="cannot be told from a batch of this form: list of 2 entries"):
        with_labels([ids, "text"], labels)


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand", "training"])
@pytest.mark.parametrize("kind", [Told, PlainTold])
def test_a_module_says_where_its_labels_are(tmp_path, kind, cache):
    assert asked(tmp_path, "lengths last", kind, cache) == expected(10)


def test_a_module_says_that_there_are_none(tmp_path):
    class Untold(Formed):
        def influence_labels(self, batch):
            return None

    assert asked(tmp_path, "a tuple", Untold) == ([None] * N_TEST, [None] * N_TRAIN)


def test_the_labels_that_the_log_of_a_validation_shows_are_the_modules(tmp_path):
    class Validating(Told):
        def validation_step(self, batch, batch_idx):
            pass

    form, unpack, _ = FORMS["lengths last"]
    module = build(Validating)
    module.unpack = unpack
    data = [loader(each, collate_fn=lambda items: form(*default_collate(items))) for each in (texts(), test_texts())]
    callback = TracInCallback(tmp_path / "trace", log_examples=N_TEST, log_k=1, on_error="raise")
    quiet(callbacks=[callback], logger=CSVLogger(tmp_path), max_epochs=1).fit(module, *data)
    (table,) = tmp_path.rglob("*.jsonl")
    assert {f'"{label}"' for label in expected(10)[0]} <= set(table.read_text().replace(",", " ").split())


@pytest.mark.parametrize(
    ("labels", "got"), [(torch.tensor(1), r"shape \(\)"), (torch.ones(3), r"shape \(3,\)"), ([1, 2], "list")]
)
def test_labels_that_do_not_count_the_examples_are_an_error(labels, got):
    class Wrong(TracInMixin, torch.nn.Module):
        def influence_labels(self, batch):
            return labels

    with pytest.raises(ValueError, match=rf"influence_labels must return None, or .* 2 examples, but returned {got}"):
        labels_of_module(Wrong(), {"labels": torch.ones(2)}, 2)


def test_an_override_that_takes_the_batch_apart_leaves_it_whole():
    class Taking(torch.nn.Module):
        def influence_labels(self, batch):
            return batch.pop("labels")

    batch = {"labels": torch.ones(2, 5)}
    assert torch.equal(labels_of_module(Taking(), batch, 2), batch["labels"])


def test_the_words_of_several_texts_are_told_in_a_row():
    class Choosing(Still):
        def influence_words(self, batch):
            return [[f"<{token}>" for token in ids.flatten().tolist()] for ids in batch["input_ids"]]

    ids = torch.tensor([[[3, 4], [5, 6]], [[3, 7], [8, 6]]])
    for module in (build(Choosing), build(Still)):
        words = words_of_batch(module, {"input_ids": ids}, [3, 6, 8])
        assert words == {token: f"<{token}>" if isinstance(module, Choosing) else str(token) for token in (3, 6, 8)}
    assert build(Still).influence_words({"input_ids": ids}) == [["3", "4", "5", "6"], ["3", "7", "8", "6"]]
