"""How targets are asked for: forms of batches, examples without labels, mistakes, and what a result says of them."""

from __future__ import annotations

import io

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from rich.console import Console
from torch import nn
from torch.nn import functional
from torch.utils.data import IterableDataset, TensorDataset, default_collate
from toy import CLASSES, N_TEST, RATE, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import InfluenceResult, Trace, TracInLast, TracInMixin, TracInSum, TracInWE
from lightning_tracin.querying import influence as querying

IDS, LABELS = test_texts().tensors
SUM = TracInSum((TracInWE(normalize="cosine"), TracInLast(normalize="train")), scales=(1, 2))
METHODS = ("tracin-we", "tracin-last", SUM)


class NamedToy(Toy):
    def influence_label_names(self):
        return {0: "art", 1: "tech", 2: "0"}


def relabelled(labels):
    return loader(TensorDataset(IDS, torch.as_tensor(labels)))


def unlabelled(batch_size=4):
    return loader(TensorDataset(IDS), batch_size=batch_size)


def asked(toy, trace, data=None, kind=Toy, **options):
    return quiet().influence(loader(test_texts()) if data is None else data, kind(), trace=trace, **options)


def said(toy):
    with torch.no_grad():
        return toy.lightning_module.eval()(IDS).argmax(1)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_class_is_the_label_that_an_example_would_have(toy, trace, method):
    own = asked(toy, trace, method=method)
    assert (own.target, own.target_names) == ("label", [])
    for number in range(CLASSES):
        of_class = asked(toy, trace, method=method, target=number)
        assert torch.equal(of_class.scores[number == LABELS], own.scores[number == LABELS])
        assert torch.equal(of_class.scores, asked(toy, trace, relabelled([number] * N_TEST), method=method).scores)


@pytest.mark.parametrize("target", ["prediction", 1, (0, 2)], ids=str)
def test_labels_of_minus_one_are_none(toy, trace, target):
    expected = asked(toy, trace, unlabelled(), target=target)
    found = asked(toy, trace, relabelled([-1, 0, -1, -1, 2, -1]), target=target)
    assert found.target_names == expected.target_names
    assert torch.equal(found.scores, expected.scores)
    assert found.test_texts.labels.isnan().tolist() == [True, False, True, True, False, True]
    with pytest.raises(ValueError, match=r'Target -1 is out of bounds. If .* no labels, target="prediction" explains'):
        asked(toy, trace, relabelled([-1] * N_TEST))


def test_the_prediction_is_the_class_that_the_model_says_at_the_last_checkpoint(toy, trace):
    labels = said(toy)
    assert len(labels.unique()) > 1
    by_hand = asked(toy, trace, relabelled(labels))
    found = asked(toy, trace, target="prediction")
    assert torch.equal(found.scores, by_hand.scores)
    assert found.target_names == [str(int(label)) for label in labels]
    torch.testing.assert_close(found.predictions, by_hand.predictions)


@pytest.mark.parametrize("method", METHODS[:2])
def test_a_pair_turned_around_turns_the_scores_around(toy, trace, method):
    one, other = (asked(toy, trace, method=method, target=pair) for pair in ((0, 2), [2, 0]))
    assert torch.equal(one.scores, -other.scores)
    parts = [asked(toy, trace, method=method, target=number).scores for number in (0, 2)]
    torch.testing.assert_close(one.scores, parts[0] - parts[1], rtol=1e-4, atol=1e-8)
    assert (one.target, one.target_names) == ("0, not 2", ["0, not 2"] * N_TEST)


@pytest.mark.parametrize("target", ["prediction", (0, 1)])
def test_words_add_up_to_the_score(toy, trace, target):
    result = asked(toy, trace, target=target)
    for test_index, train_index in ((0, 3), (4, 11)):
        total = sum(term for _, term in result.words(test_index, train_index))
        assert total == pytest.approx(float(result.scores[test_index, train_index]), rel=1e-4, abs=1e-9)
    table = result.word_table(n=None)
    assert float(table.values.sum()) == pytest.approx(float(result.scores.sum()), rel=1e-3)
    assert table.target == result.target


@pytest.mark.parametrize("target", ["prediction", 1, (1, 0)])
def test_examples_without_labels_are_explained_as_those_with(toy, trace, target):
    own, without = asked(toy, trace, target=target), asked(toy, trace, unlabelled(), target=target)
    assert torch.equal(own.scores, without.scores)
    assert own.target_names == without.target_names
    assert bool(without.test_texts.labels.isnan().all())
    assert {explained.test.label for explained in without.explanations()} == {None}
    assert not any(explained.test.is_mistaken for explained in without.explanations())


def test_what_is_said_is_found_again_in_another_order_in_blocks_and_in_a_stream(toy, trace, monkeypatch):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(IDS, LABELS, strict=True))

    expected = asked(toy, trace, target="prediction")
    shuffled = loader(test_texts(), batch_size=2, shuffle=True)
    found = [asked(toy, trace, data, target="prediction") for data in (shuffled, loader(Stream()))]
    monkeypatch.setattr(querying, "_BLOCK_BYTES", 1)
    found.append(asked(toy, trace, target="prediction"))
    for each in found:
        assert each.target_names == expected.target_names
        torch.testing.assert_close(each.scores, expected.scores, rtol=1e-5, atol=1e-9)


def test_a_result_remembers_its_target(toy, trace, tmp_path):
    result = asked(toy, trace, kind=NamedToy, target=("tech", 0))
    loaded = InfluenceResult.load(result.save(tmp_path / "result.safetensors"))
    assert (loaded.target, loaded.target_names) == ("tech, not 0", ["tech, not art"] * N_TEST)
    assert loaded.target_classes == result.target_classes == [1, 0]  # not 2, whose name is "0"
    assert {row["target"] for row in loaded.rows()} == {"tech, not art"}
    file = io.StringIO()
    Console(file=file, width=120).print(loaded)
    assert "target tech, not 0" in file.getvalue()
    assert ", target tech, not art" in file.getvalue()
    page = loaded.to_html(tmp_path / "page.html").read_text()
    assert "<span>target tech, not 0</span>" in page
    assert '"target":"tech, not art"' in page
    assert result.plot("scores", 1)[1].get_title("left").endswith("(target tech, not art)")
    own = asked(toy, trace).rows()
    assert {row["target"] for row in own} == {str(int(label)) for label in LABELS}


def test_a_name_counts_before_a_number_that_is_written_as_text(toy, trace):
    of_name, of_number = (asked(toy, trace, kind=NamedToy, target=target) for target in ("0", 2))
    assert torch.equal(of_name.scores, of_number.scores)
    assert torch.equal(asked(toy, trace, kind=NamedToy, target="1").scores, asked(toy, trace, target=1).scores)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "sport"}, ValueError, "There is no class 'sport'. The classes are 'art', 'tech', '0'"),
        ({"target": 3}, ValueError, "target='3': there is no class 3. The model has 3, numbered from 0"),
        ({"target": -1}, ValueError, "classes are numbered from 0"),
        ({"target": (1, 1)}, ValueError, "holds a class against itself"),
        ({"target": ("tech", 1)}, ValueError, "holds class 1 against itself"),
        ({"target": (0, 1, 2)}, ValueError, "must be a pair of classes, .* but has 3"),
        ({"target": None}, TypeError, "target must be .* but got None"),
        ({"target": True}, TypeError, "target must be .* but got True"),
        ({"target": "label", "positions": [1]}, ValueError, "positions goes with labels of tokens"),
        ({"positions": "1"}, TypeError, "positions must be a sequence of places"),
        ({"positions": []}, ValueError, "positions is empty"),
        ({"positions": [-1]}, ValueError, "positions count an example's tokens from 0, but got -1"),
        ({"positions": [1.5]}, TypeError, "positions must be whole numbers"),
    ],
)
def test_targets_that_are_none(toy, trace, options, error, message):
    with pytest.raises(error, match=message):
        asked(toy, trace, kind=NamedToy, **options)


def test_a_class_that_is_not_known_is_refused_before_gradients_are_computed(tmp_path):
    fit = fitted(tmp_path / "trace", NamedToy(), cache="on_demand", trainer={"max_epochs": 1})
    with pytest.raises(ValueError, match="There is no class 'sport'"):
        fit.influence(loader(test_texts()), target="sport")
    assert not any(each.has_gradients(site) for each in Trace(tmp_path / "trace").checkpoints for site in each.sites)


def test_without_labels_the_error_names_what_explains_the_prediction(toy, trace):
    with pytest.raises(ValueError, match=r"not enough values .* If these test examples have no labels, target=\"pred"):
        asked(toy, trace, unlabelled())


def test_the_last_layer_is_found_where_the_trace_does_not_know_it(tmp_path):
    fit = fitted(tmp_path / "trace", methods=("tracin-we",), trainer={"max_epochs": 1})
    with torch.no_grad():
        labels = fit.lightning_module.eval()(IDS).argmax(1)
    expected = fit.influence(relabelled(labels)).scores
    for data in (loader(test_texts()), unlabelled()):
        assert torch.equal(fit.influence(data, target="prediction").scores, expected)


class Tagger(Toy):
    """A tag for each token, and a loss of one's own."""

    def forward(self, ids):
        return self.head(torch.tanh(self.hidden(self.embedding(ids))))

    def influence_loss(self, batch):
        ids, tags = batch
        return functional.cross_entropy(self(ids).mT, tags, reduction="none").sum(1) / (tags != -100).sum(1)


class NextWord(Tagger):
    """The tag of a token is said before it."""

    def influence_loss(self, batch):
        ids, tags = batch
        losses = functional.cross_entropy(self(ids)[:, :-1].mT, tags[:, 1:], reduction="none")
        return 2 * losses.sum(1) / (tags[:, 1:] != -100).sum(1)


class Sets(Toy):
    """Sets of classes, and a loss of one's own."""

    def influence_loss(self, batch):
        ids, sets = batch
        return functional.binary_cross_entropy_with_logits(self(ids), sets, reduction="none").sum(1)


class OneHot(Sets):
    """Takes what looks like sets for probabilities."""

    def influence_loss(self, batch):
        ids, sets = batch
        return functional.cross_entropy(self(ids), sets, reduction="none")


def as_sets(labels):
    return functional.one_hot(labels, CLASSES).float()


def as_tags(labels):
    return labels[:, None].repeat(1, 7)


@pytest.mark.parametrize(("kind", "labels_of"), [(Tagger, as_tags), (NextWord, as_tags), (Sets, as_sets)])
def test_the_outputs_of_a_loss_of_ones_own_are_read_from_it(tmp_path, kind, labels_of):
    train, test = (TensorDataset(data.tensors[0], labels_of(data.tensors[1])) for data in (texts(), test_texts()))
    fit = fitted(tmp_path / "trace", kind(), loader(train), trainer={"max_epochs": 1})
    with torch.no_grad():
        logits = fit.lightning_module.eval()(IDS)
    labels = (logits > 0).float() if kind is Sets else logits.argmax(-1).roll(int(kind is NextWord), 1)
    by_hand = fit.influence(loader(TensorDataset(IDS, labels))).scores
    for data in (loader(test), unlabelled()):
        found = fit.influence(data, target="prediction").scores
        torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-9)
    if kind is Sets:
        with pytest.raises(ValueError, match="What OneHot says cannot be told from its outputs"):
            fit.influence(loader(test), OneHot(), trace=tmp_path / "trace", target="prediction")


class Taught(Toy):
    """A batch whose form does not tell where labels are."""

    def influence_loss(self, batch):
        ids, _, labels = batch
        return functional.cross_entropy(self(ids), labels, reduction="none")


class Telling(Taught):
    def influence_with_labels(self, batch, labels):
        return batch[0], None, labels


class Deaf(Taught):
    def influence_with_labels(self, batch, labels):
        return batch


class Forgetful(Taught):
    def influence_with_labels(self, batch, labels):
        return None


def in_threes(items):
    ids, labels = default_collate(items)
    return ids, ids.count_nonzero(1), labels


def test_a_module_puts_labels_where_its_loss_reads_them(toy, trace):
    data = loader(test_texts(), collate_fn=in_threes)
    for target in ("prediction", 1, (0, 1)):
        found = asked(toy, trace, data, kind=Telling, target=target)
        assert torch.equal(found.scores, asked(toy, trace, target=target).scores)
    for kind, message in (
        (Taught, "cannot be told from a batch of this form: tuple of 3 entries. Override influence_with_labels"),
        (Deaf, "The losses of Deaf are the same whatever labels influence_with_labels puts into the batch"),
        (Forgetful, "influence_with_labels must return the batch .* returned None"),
    ):
        with pytest.raises(ValueError, match=message):
            asked(toy, trace, data, kind=kind, target=1)


class OneOutput(TracInMixin, pl.LightningModule):
    """A single number for each text, and a loss of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8, padding_idx=0)
        self.head = nn.Linear(8, 1)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1))[:, 0]

    def loss(self, outputs, labels):
        return functional.binary_cross_entropy_with_logits(outputs, labels.float(), reduction="none")

    def influence_loss(self, batch):
        ids, labels = batch
        return self.loss(self(ids), labels)

    def training_step(self, batch, batch_idx):
        return self.influence_loss(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


class Rating(OneOutput):
    def loss(self, outputs, labels):
        return functional.mse_loss(outputs, labels, reduction="none")


class WithoutMixin(OneOutput):
    influence_loss = None
    influence_with_labels = None
    influence_labels = None

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        return self.loss(self(ids), labels).mean()


class WithoutMixinRating(WithoutMixin, Rating):
    pass


def one_output(tmp_path, kind, labels_of):
    """A fit of a module with a single output, and what scores are by the definition for a loss of its output."""
    train, test = (TensorDataset(data.tensors[0], labels_of(data.tensors[1])) for data in (texts(), test_texts()))
    torch.manual_seed(2)
    fit = fitted(tmp_path / "trace", kind(), loader(train), trainer={"max_epochs": 1})
    module = kind()
    module.load_state_dict(Trace(tmp_path / "trace").checkpoints[0].weights())

    def expected(loss):
        def gradients(data, of):
            batches = [(ids[None], label[None]) for ids, label in data]
            return [dense_gradients(module, module.embedding, batches, of)]

        def own(batch):
            return module.loss(module(batch[0]), batch[1])[0]

        return BruteForce(
            [RATE], gradients(test, lambda batch: loss(module(batch[0]))[0]), gradients(train, own)
        ).scores()

    return fit, test, expected


@pytest.mark.parametrize("kind", [OneOutput, WithoutMixin])
def test_one_logit_says_two_classes(tmp_path, kind):
    fit, test, expected = one_output(tmp_path, kind, lambda labels: (labels > 0).long())
    losses = {0: lambda output: -functional.logsigmoid(-output), 1: lambda output: -functional.logsigmoid(output)}
    with torch.no_grad():
        labels = (fit.lightning_module.eval()(test.tensors[0]) > 0).long()
    losses["prediction"] = None
    for data in (loader(test), loader(TensorDataset(test.tensors[0]))):
        for target in (0, 1):
            assert relative_error(fit.influence(data, target=target).scores, expected(losses[target])) < 1e-5
        found = fit.influence(data, target="prediction")
        by_hand = fit.influence(loader(TensorDataset(test.tensors[0], labels)))
        torch.testing.assert_close(found.scores, by_hand.scores, rtol=1e-5, atol=1e-9)
        assert found.target_names == [str(int(label)) for label in labels]
        assert torch.equal(found.predictions, by_hand.predictions)
        pair = fit.influence(data, target=(1, 0)).scores  # log p(1) - log p(0) is the logit
        assert relative_error(pair, expected(lambda output: -output)) < 1e-5
    none = fit.influence(loader(TensorDataset(test.tensors[0], torch.full_like(labels, -1))), target="prediction")
    assert torch.equal(none.scores, fit.influence(loader(test), target="prediction").scores)
    assert none.test_texts.labels.isnan().all()


@pytest.mark.parametrize("kind", [Rating, WithoutMixinRating])
def test_one_value_is_explained_as_it_is(tmp_path, kind):
    fit, test, expected = one_output(tmp_path, kind, lambda labels: labels + 0.5)
    for data in (loader(test), loader(TensorDataset(test.tensors[0]))):
        result = fit.influence(data, target="prediction")
        assert relative_error(result.scores, expected(lambda output: -output)) < 1e-5
        assert result.target_names == [f"{value:.3g}" for value in result.predictions[:, 0].tolist()]
        with pytest.raises(ValueError, match=r"target='1' is a class, but .* does regression"):
            fit.influence(data, target=1)
