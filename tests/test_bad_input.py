"""Each mistake gets one clear error, early, and nothing that was stored is lost."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import pytorch_lightning as pl
import torch
from mistakes import Endless, Plain, cross_entropy, empty, poisoned, with_loss
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from toy import N_TEST, N_TRAIN, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import InfluenceResult, Trace, TracInCallback, TracInLast, TracInMixin, TracInWE
from lightning_tracin.bridge.query_examples import example_blocks, spare_batch
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage import files, shards


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: cross_entropy(m, b), r"shape \(B,\), but got shape \(\)"),
        (lambda m, b: cross_entropy(m, b, reduction="none")[:, None], r"but got shape \(4, 1\)"),
        (lambda m, b: cross_entropy(m, b, reduction="none")[:, None].expand(-1, 7), r"but got shape \(4, 7\)"),
        (lambda m, b: cross_entropy(m, b, reduction="none").tolist(), "but got list"),
        (lambda m, b: b[1], "float tensor"),
        (lambda m, b: cross_entropy(m, b, reduction="none").detach(), "detaches them"),
        (lambda m, b: cross_entropy(m, b, reduction="none")[:2], "is the number of losses, 2"),
        (lambda m, b: cross_entropy(m, b, reduction="none") * m(b[0]).mean(), "depends on the other examples"),
    ],
    ids=["scalar", "(B, 1)", "(B, T)", "list", "integers", "detached", "too few", "of the whole batch"],
)
def test_a_loss_that_is_not_one_for_each_example(tmp_path, loss, message):
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path / "trace", with_loss(loss))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, labels: functional.cross_entropy(logits, labels, reduction="sum"), "not a mean of independent"),
        (lambda logits, labels: functional.cross_entropy(logits, labels, weight=torch.arange(1.0, 4)), "not a mean of"),
        (lambda logits, labels: functional.cross_entropy(logits @ logits.T, torch.arange(len(labels))), "not a mean"),
    ],
    ids=["sum", "weighted", "contrastive"],
)
def test_a_training_step_that_is_not_a_mean_of_independent_losses(tmp_path, loss, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*TracInMixin"):
        fitted(tmp_path / "trace", Plain(loss))


def to_the_longest(items):
    ids, labels = torch.utils.data.default_collate(items)
    return ids[:, : int((ids != 0).sum(1).max())], labels


class ReadsPadding(Toy):
    """Takes the mean over padding too."""

    def forward(self, ids):
        return 5 * self.head(torch.tanh(self.hidden(self.embedding(ids).mean(1))))


class PlainReadsPadding(ReadsPadding):
    influence_loss = None

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: cross_entropy(m, b, reduction="none") / len(b[1]),
        lambda m, b: cross_entropy(m, b, reduction="none") * len(b[1]) / (b[0] != 0).sum(),
    ],
    ids=["by the batch's examples", "by the batch's tokens"],
)
def test_a_loss_that_is_divided_by_what_the_batch_holds(tmp_path, loss):
    with pytest.raises(
        ValueError, match=r"the loss of training example \d+ is .* in a batch of 4, but .* in one of half"
    ):
        fitted(tmp_path / "trace", with_loss(loss))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("kind", [ReadsPadding, PlainReadsPadding])
def test_a_model_that_reads_padding_is_warned_of(tmp_path, kind):
    with pytest.warns(UserWarning, match="seems to read padding: (the loss of training example|losses are)"):
        fitted(tmp_path / "trace", kind(), loader(collate_fn=to_the_longest))


def test_losses_that_are_drawn_at_random_say_nothing_of_their_batch(tmp_path):
    def masking(items):
        ids, labels = torch.utils.data.default_collate(items)
        return torch.where(torch.rand(ids.shape) < 0.3, 1, ids), labels

    fitted(tmp_path / "masked", data=loader(collate_fn=masking))
    fitted(tmp_path / "noisy", with_loss(lambda m, b: cross_entropy(m, b, reduction="none") * torch.rand(len(b[1]))))


def test_a_training_step_that_optimizes_by_hand(tmp_path):
    module = Plain(functional.cross_entropy)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"(?s)optimizes manually.*TracInMixin"):
        fitted(tmp_path / "trace", module)


def test_the_default_loss_of_a_module_that_is_not_hugging_face(tmp_path):
    class Defaulting(Toy):
        influence_loss = TracInMixin.influence_loss

        def training_step(self, batch, batch_idx):
            return cross_entropy(self, batch)

    with pytest.raises(ValueError, match=r"(?s)no loss for each example.*Override influence_loss"):
        fitted(tmp_path / "trace", Defaulting())


def test_no_embedding_layer(tmp_path):
    module = Toy()
    module.embedding = nn.Sequential()
    with pytest.raises(ValueError, match=r'has no embedding layer.*methods=\("tracin-last",\)'):
        fitted(tmp_path / "trace", module)


def test_two_embedding_layers(tmp_path):
    module = Toy()
    module.positions = nn.Embedding(7, 8)
    with pytest.raises(ValueError, match=r"embedding \(\(40, 8\)\), positions \(\(7, 8\)\).*influence_embedding_layer"):
        fitted(tmp_path / "trace", module)


def test_two_heads(tmp_path):
    class TwoHeads(Toy):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 3)

        def influence_loss(self, batch):
            words = self.embedding(batch[0]).mean(1)
            return functional.cross_entropy(self.head(words) + self.other(words), batch[1], reduction="none")

    with pytest.raises(ValueError, match=r"(?s)head \(.*other \(.*influence_last_layer|other \(.*head \("):
        fitted(tmp_path / "trace", TwoHeads())


def test_a_named_layer_that_is_not_one(tmp_path):
    class Wrong(Toy):
        def influence_last_layer(self):
            return self.dropout

    with pytest.raises(ValueError, match=r"must return an nn\.Linear, but returned Dropout"):
        fitted(tmp_path / "trace", Wrong())


def test_an_embedding_bag_has_no_words(tmp_path):
    class Bag(Toy):
        def __init__(self):
            super().__init__()
            self.embedding = nn.EmbeddingBag(40, 8)

        def forward(self, ids):
            return self.head(self.embedding(ids))

        def influence_embedding_layer(self):
            return self.embedding

    with pytest.raises(ValueError, match="EmbeddingBag has no gradient for each word"):
        fitted(tmp_path / "trace", Bag())


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("index", [1, 13])
def test_a_training_gradient_that_is_not_finite_is_named(tmp_path, index, value):
    module, data = poisoned(index, value)
    with pytest.raises(ValueError, match=rf"training example {index} is NaN or infinite"):
        fitted(tmp_path / "trace", module, loader(data, shuffle=True))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_test_gradient_that_is_not_finite_is_named(tmp_path):
    module, data = poisoned(13)
    trainer = fitted(tmp_path / "trace", module, loader())
    with pytest.raises(ValueError, match="test example 13 is NaN or infinite"):
        trainer.influence(loader(data, shuffle=True))


def test_a_gradient_that_becomes_nan_late_keeps_the_checkpoints_before_it(tmp_path):
    class Late(Toy):
        def influence_loss(self, batch):
            losses = super().influence_loss(batch)
            if self.training or self.trainer.current_epoch == 0:
                return losses
            return torch.where((batch[0] == texts()[17][0]).all(1), torch.nan, losses)

    with pytest.raises(ValueError, match="training example 17 is NaN or infinite"):
        fitted(tmp_path / "trace", Late())
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5]
    assert not list(tmp_path.rglob("*.partial"))
    assert quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace").scores.abs().sum() > 0


def test_a_loss_that_depends_on_other_test_examples(tmp_path):
    """Unseen in training with batches of one."""
    module = with_loss(lambda m, b: cross_entropy(m, b, reduction="none") * m(b[0]).mean())
    trainer = fitted(tmp_path / "trace", module, loader(batch_size=1))
    with pytest.raises(ValueError, match="depends on the other examples"):
        trainer.influence(loader(test_texts()))


def test_a_training_step_that_is_a_sum_is_found_at_the_query_too(tmp_path):
    """Unseen in training with batches of one."""
    module = Plain(lambda logits, labels: functional.cross_entropy(logits, labels, reduction="sum"))
    trainer = fitted(tmp_path / "trace", module, loader(batch_size=1))
    with pytest.raises(ValueError, match=r"(?s)not a mean of independent.*TracInMixin"):
        trainer.influence(loader(test_texts()))


@pytest.mark.parametrize("told", [N_TRAIN - 1, N_TRAIN + 1])
def test_a_stream_that_tells_a_wrong_number_of_examples(tmp_path, told):
    class Wrong(IterableDataset):
        def __len__(self):
            return told

        def __iter__(self):
            return iter(texts())

    found = f"more than {told}" if told < N_TRAIN else str(N_TRAIN)
    with pytest.raises(ValueError, match=f"has {told} examples, but a pass over it gave {found}: "):
        fitted(tmp_path / "trace", data=DataLoader(Wrong(), batch_size=N_TRAIN + 1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: loader(Endless()), "does not tell how many examples"),
        (lambda: [loader(), loader()], "one training loader, but got 2"),
        (lambda: {"a": loader(), "b": loader()}, "one training loader, but got 2"),
        (lambda: CombinedLoader([loader(), loader()], "max_size"), "one training loader, but got 2"),
        (lambda: [loader()], "comes in a list.*Pass the loader itself"),
        (lambda: {"a": loader()}, "comes in a dict.*Pass the loader itself"),
        (lambda: CombinedLoader({"a": loader()}), "comes in a dict.*Pass the loader itself"),
        (lambda: DataLoader(texts(), batch_size=None), "does not batch"),
        (lambda: [[torch.ones(2, 3)], [torch.ones(2, 3)]], "one training loader|must come in a"),
    ],
    ids=[
        "unknown length",
        "list",
        "dict",
        "combined",
        "list of one",
        "dict of one",
        "combined dict of one",
        "unbatched",
        "list of batches",
    ],
)
def test_training_data_that_cannot_be_numbered(tmp_path, data, message):
    class Any(Toy):
        def training_step(self, batch, batch_idx):
            return self.embedding.weight.sum()

    with pytest.raises((ValueError, TypeError), match=message):
        fitted(tmp_path / "trace", Any(), data())
    assert not (tmp_path / "trace").exists()


def test_a_collate_function_that_drops_examples(tmp_path):
    def drop(rows):
        return torch.utils.data.default_collate(rows[:-1])

    with pytest.raises(ValueError, match=r"has 20 examples, but a pass over it gave 15"):
        fitted(tmp_path / "trace", data=loader(collate_fn=drop))


def test_an_empty_training_set(toy, trace):
    with pytest.raises(ValueError, match="training set is empty"):
        toy.influence(loader(test_texts()), train_dataloaders=loader(empty()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: loader(empty()), "test loader is empty"),
        (lambda: [loader(), loader()], "one test loader, but got 2"),
        (lambda: None, "no test loader"),
        (lambda: DataLoader(test_texts(), batch_size=None), "does not batch"),
        (lambda: 3, "must come in a DataLoader, but got int"),
        (
            lambda: loader(test_texts(), collate_fn=lambda r: torch.utils.data.default_collate(r[1:])),
            "collate function",
        ),
    ],
    ids=["empty", "several", "none", "unbatched", "not a loader", "dropping collate"],
)
def test_test_data_that_cannot_be_numbered(toy, data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        toy.influence(data())


def test_a_test_loader_that_draws_other_examples_at_each_checkpoint(toy):
    torch.manual_seed(0)
    sampler = torch.utils.data.RandomSampler(test_texts(), replacement=True, num_samples=2)
    with pytest.raises(ValueError, match="other examples at each pass"):
        toy.influence(loader(test_texts(), sampler=sampler))


def test_a_stream_that_is_shuffled_anew_at_each_checkpoint(toy):
    class Shuffled(IterableDataset):
        def __iter__(self):
            return iter([test_texts()[int(index)] for index in torch.randperm(N_TEST)])

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="other examples at each pass"):
        toy.influence(loader(Shuffled()))


@pytest.mark.parametrize("k", [N_TRAIN + 1, 10**6])
def test_k_beyond_the_training_set_is_clipped_and_says_so(toy, k):
    with pytest.warns(UserWarning, match=rf"k={k} is larger than the training set: all {N_TRAIN}"):
        result = toy.influence(loader(test_texts()), k=k)
    assert result.proponents(N_TRAIN).values.shape == (N_TEST, N_TRAIN)
    with pytest.warns(UserWarning, match="larger than the training set"):
        assert result.opponents(k).indices.shape == (N_TEST, N_TRAIN)


@pytest.mark.parametrize("k", [0, 2.5])
def test_k_below_one(toy, k):
    with pytest.raises(ValueError, match=f"k must be a whole number of at least 1, but got {k}"):
        toy.influence(loader(test_texts()), k=k)


def test_more_than_was_kept(toy):
    result = toy.influence(loader(test_texts()), k=3)
    with pytest.raises(ValueError, match="Only the 3 strongest were kept"):
        result.proponents(4)
    with pytest.raises(ValueError, match="without k"):
        result.aggregate("mean")


def test_a_trace_of_another_model(toy, trace):
    module = Toy()
    module.hidden = nn.Linear(8, 9)
    module.head = nn.Linear(9, 3)
    with pytest.raises(ValueError, match=r"of another model.*head\.weight: \(3, 8\) in the trace, \(3, 9\) here"):
        quiet().influence(loader(test_texts()), module, trace=trace)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: texts(19), "it had 20 examples, this one has 19"),
        (lambda: texts(seed=5), "the examples, or their order"),
    ],
    ids=["length", "content"],
)
@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_a_trace_of_another_data_set(tmp_path, other, message, cache):
    fit = fitted(tmp_path / "trace", cache=cache)
    with pytest.raises(ValueError, match=message):
        fit.influence(loader(test_texts()), train_dataloaders=loader(other()))


def test_a_trace_of_a_newer_version(tmp_path, trace):
    copied = shutil.copytree(trace, tmp_path / "trace")
    header = files.read_json(copied / "trace.json")
    files.write_json(copied / "trace.json", {**header, "version": 99})
    with pytest.raises(ValueError, match=r"format version 99.*Update lightning_tracin"):
        Trace(copied)


def test_a_trace_that_another_fit_has_replaced(tmp_path):
    first = fitted(tmp_path / "trace")
    fitted(tmp_path / "trace", overwrite=True)
    with pytest.raises(ValueError, match="Another fit has replaced the trace"):
        first.influence(loader(test_texts()))
    assert first.influence(loader(test_texts()), trace=tmp_path / "trace").scores.shape == (N_TEST, N_TRAIN)


def test_no_trace():
    with pytest.raises(ValueError, match="There is no trace"):
        quiet().influence(loader(test_texts()), Toy())


def test_a_folder_without_a_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no trace\.json"):
        quiet().influence(loader(test_texts()), Toy(), trace=tmp_path)


def test_a_plain_training_step_that_needs_a_fit_around_it(tmp_path):
    class Reading(Toy):
        influence_loss = None

        def training_step(self, batch, batch_idx):
            assert self.trainer.optimizers[0]
            return functional.cross_entropy(self(batch[0]), batch[1])

    fitted(tmp_path / "trace", Reading())
    with pytest.raises(ValueError, match=r"Reading cannot be called by itself: IndexError: list index.*TracInMixin"):
        quiet().influence(loader(test_texts()), Reading(), trace=tmp_path / "trace")


@pytest.mark.parametrize("number", [N_TRAIN - 1, N_TRAIN + 1])
def test_gradients_of_another_number_of_examples(tmp_path, number):
    fit = fitted(tmp_path / "trace")
    path = fit.callbacks[0].trace.checkpoints[1].path / "words" / "index.json"
    files.write_json(path, {**json.loads(path.read_text()), "n_examples": number})
    with pytest.raises(ValueError, match=f"words/index.json is damaged: it counts {number} .* the trace has {N_TRAIN}"):
        fit.influence(loader(test_texts()))


def test_a_loader_in_the_place_of_the_model(toy):
    with pytest.raises(TypeError, match=r"got DataLoader. The order is trainer.influence\(test_loader, model\)"):
        toy.influence(Toy(), loader(test_texts()))
    with pytest.raises(TypeError, match=r"and trainer.self_influence\(model, train_dataloaders=train_loader\)"):
        toy.self_influence(loader())


def test_no_model(trace):
    with pytest.raises(ValueError, match="pass model="):
        quiet().influence(loader(test_texts()), trace=trace)


def test_gradients_that_are_missing_and_no_training_set(tmp_path):
    fitted(tmp_path / "trace", cache="on_demand")
    with pytest.raises(ValueError, match=r"have no stored gradients for tracin-we; pass the training set"):
        quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace")
    with pytest.raises(ValueError, match=r"pass the model"):
        quiet().self_influence(trace=tmp_path / "trace", train_dataloaders=loader())


def test_a_method_whose_layer_was_not_recorded(tmp_path):
    fit = fitted(tmp_path / "trace", methods=("tracin-we",))
    with pytest.raises(ValueError, match=r"did not record the layer of TracInLast.*Fit again with \"tracin-last\""):
        fit.influence(loader(test_texts()), method="tracin-last")


def test_more_words_than_are_stored(tmp_path):
    fit = fitted(tmp_path / "trace", top_words=2)
    with pytest.raises(ValueError, match="keeps 2 words"):
        fit.influence(loader(test_texts()), method=TracInWE(top_words=3))


def doubled(items):
    return torch.utils.data.default_collate([*items, *items])


def without_the_last(items):
    return torch.utils.data.default_collate(items[:-1])


@pytest.mark.parametrize("shard_examples", [8, 100])
@pytest.mark.parametrize(("collate", "found"), [(doubled, "more than 20"), (without_the_last, "15")])
def test_a_collate_function_that_adds_or_drops_examples(tmp_path, monkeypatch, collate, found, shard_examples):
    monkeypatch.setattr(shards, "_SHARD_EXAMPLES", shard_examples)
    with pytest.raises(ValueError, match=f"has 20 examples, but a pass over it gave {found}: the collate function"):
        fitted(tmp_path, data=loader(collate_fn=collate))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("name", "value"), [("shard_examples", 7), ("n_examples", 12), ("n_examples", 30)])
def test_texts_of_another_number_of_examples(tmp_path, name, value):
    fitted(tmp_path)
    for gradients in tmp_path.glob("checkpoints/*/words"):
        shutil.rmtree(gradients)
    path = tmp_path / "texts" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=r"texts/index.json is damaged: it counts .* but the trace has 20"):
        quiet().influence(loader(test_texts()), Toy(), trace=tmp_path, train_dataloaders=loader())
    assert not list(tmp_path.glob("checkpoints/*/words"))


class OnlyTests(pl.LightningDataModule):
    def test_dataloader(self):
        return loader(test_texts())


def test_a_datamodule_without_a_training_set(tmp_path):
    fit = fitted(tmp_path / "stored")
    expected = fit.influence(loader(test_texts())).scores
    torch.testing.assert_close(fit.influence(datamodule=OnlyTests()).scores, expected)
    fitted(tmp_path / "bare", cache="on_demand")
    with pytest.raises(ValueError, match=r"no stored gradients.*pass the training set"):
        quiet().influence(model=Toy(), datamodule=OnlyTests(), trace=tmp_path / "bare")


class Steep(Toy):
    """The gradients of its examples are finite; their products are not."""

    def influence_loss(self, batch):
        return super().influence_loss(batch) * 1e25

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 1e-25


def test_products_that_overflow(tmp_path):
    fit = fitted(tmp_path, Steep())
    for k in (None, 2):
        with pytest.raises(ValueError, match=r"test example 0 are too large for float32.*cosine"):
            fit.influence(loader(test_texts()), k=k)
    assert torch.isfinite(fit.influence(loader(test_texts()), method=TracInWE(normalize="cosine")).scores).all()


def test_a_spare_batch_of_a_loader_with_workers_and_a_timeout():
    ids, _ = spare_batch(loader(num_workers=1, timeout=60), ALONE)
    assert torch.equal(ids, texts().tensors[0][:8])


def test_a_disk_without_enough_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(
        OSError, match=r"(?s)needs about .* MB for 2 checkpoints of 20.*0\.0 MB are free.*top_words.*dtype"
    ):
        fitted(tmp_path / "trace")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("epochs", [-1, 10**9])
def test_the_space_needed_is_bounded_by_max_steps(tmp_path, monkeypatch, epochs):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    limits = {"max_epochs": epochs, "max_steps": 5, "accumulate_grad_batches": 3}  # 2 steps of each epoch's 5 batches
    with pytest.raises(OSError, match="for 3 checkpoints of 20"):
        fitted(tmp_path / "trace", trainer=limits)
    monkeypatch.undo()
    fitted(tmp_path / "trace", trainer=limits)
    assert len(Trace(tmp_path / "trace").checkpoints) == 3


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 5),  # 10 steps in 2 epochs
        ({"accumulate_grad_batches": 2}, 3),  # 3 steps of each epoch's 5 batches
        ({"max_epochs": 4}, 10),
        ({"max_epochs": 4, "max_steps": 6}, 3),
        ({"max_epochs": -1, "max_steps": 7}, 3),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, 5),  # it has yet to begin
    ],
)
def test_the_space_needed_by_checkpoints_of_every_second_step(tmp_path, monkeypatch, limits, expected):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    callbacks = [*limits.get("callbacks", ()), TracInCallback(tmp_path, every_n_train_steps=2)]
    with pytest.raises(OSError, match=f"for {expected} checkpoints of 20"):
        quiet(**{**limits, "callbacks": callbacks}).fit(Toy(), loader())


def test_the_space_needed_by_a_resumed_fit_is_that_of_the_steps_to_come(tmp_path, monkeypatch):
    fit = fitted(tmp_path / "trace", every_n_train_steps=2)
    fit.save_checkpoint(tmp_path / "fit.ckpt")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    resumed = quiet(callbacks=[TracInCallback(tmp_path / "trace", every_n_train_steps=2)], max_epochs=3)
    with pytest.raises(OSError, match="for 2 checkpoints of 20"):  # after steps 12 and 14
        resumed.fit(Toy(), loader(), ckpt_path=tmp_path / "fit.ckpt")


def test_a_disk_that_fills_up_later(tmp_path, monkeypatch):
    calls = []
    save = files.save_file

    def fill(tensors, path, **options):
        calls.append(path)
        if "step-000000010" in str(path) and "linear-0" in str(path.parent):
            raise OSError(28, "No space left on device")
        save(tensors, path, **options)

    monkeypatch.setattr(files, "save_file", fill)
    with pytest.raises(OSError, match="No space left"):
        fitted(tmp_path / "trace")
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5]
    assert not list(tmp_path.rglob("*.partial"))
    assert quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace").scores.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TracInCallback(cache="always"),
            "cache must be 'checkpoint', 'training' or 'on_demand', but got 'always'",
        ),
        (lambda: TracInCallback(methods="tracin-we"), "methods must be some of"),
        (lambda: TracInCallback(methods=()), "methods must be some of"),
        (lambda: TracInCallback(dtype="float8"), "dtype must be one of"),
        (lambda: TracInCallback(top_words=0), "top_words must be None or at least 1, but got 0"),
        (lambda: TracInCallback(every_n_epochs=0), "every_n_epochs must be at least 1, but got 0"),
        (lambda: TracInCallback(every_n_train_steps=0), "every_n_train_steps must be None or at least 1, but got 0"),
        (
            lambda: TracInWE(exclude_tokens=["[CLS]"]),
            r"exclude_tokens must be token ids.*all_special_ids, but got \['\[CLS\]'\]",
        ),
        (lambda: TracInWE(exclude_tokens=3), "exclude_tokens must be token ids, such as tokenizer.all_special_ids"),
        (lambda: TracInWE(top_words=0), "top_words must be None or at least 1, but got 0"),
        (lambda: TracInWE(normalize="test"), "normalize must be None, 'train' or 'cosine', but got 'test'"),
        (lambda: TracInLast(precondition="sgd"), "precondition must be None or 'adam', but got 'sgd'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_layer(tmp_path):
    with pytest.raises(ValueError, match=r"methods names 'tracin', but Toy has no .* of that name. The nearest are: "):
        fitted(tmp_path / "trace", methods=("tracin",))
    assert not (tmp_path / "trace").exists()


def test_an_unknown_method(toy):
    with pytest.raises(ValueError, match="method must be one of tracin-we, tracin-last"):
        toy.influence(loader(test_texts()), method="trak")


def test_a_stream_cannot_be_divided_among_processes():
    class Stream(Endless):
        def __len__(self):
            return N_TRAIN

    with pytest.raises(ValueError, match="is a stream, which several processes cannot divide"):
        TrainingSet(loader(Stream())).check_divisible(Processes(0, 2))
    with pytest.raises(ValueError, match="come in a stream, which several processes cannot divide"):
        example_blocks(loader(Stream()), None, Processes(0, 2))


def test_a_trace_of_another_model_is_refused_before_anything_is_computed(toy, trace):
    class Other(Toy):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(8, 3)

    module = Other()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another model.*2 parameters differ.*extra\.bias: None in the trace"):
        quiet().influence(loader(test_texts()), module, trace=trace)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_result_that_cannot_be_written_leaves_the_old_one(toy, tmp_path, monkeypatch):
    result = toy.influence(loader(test_texts()))
    path = result.save(tmp_path / "result.safetensors")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            toy.influence(loader(test_texts()), k=2).save(path)
    assert torch.equal(InfluenceResult.load(path).scores, result.scores)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_fit_without_a_training_example(tmp_path):
    trainer = fitted(tmp_path / "trace", data=loader(empty()))
    with pytest.raises(ValueError, match="There is no trace"):
        trainer.influence(loader(test_texts()))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_dirpath_that_is_not_a_folder(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        fitted(tmp_path / place, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
