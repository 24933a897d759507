"""Each mistake in a question gets one clear error, and nothing that was stored is lost."""

from __future__ import annotations

import shutil

import pytest
import pytorch_lightning as pl
import torch
from mistakes import Endless, Plain, cross_entropy, empty, poisoned, with_loss
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, default_collate
from toy import N_TEST, N_TRAIN, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import InfluenceResult, Trace, TracInWE
from lightning_tracin.bridge.query_examples import example_blocks, spare_batch
from lightning_tracin.bridge.training_set import TrainingSet
from lightning_tracin.parallel.processes import ALONE, Processes
from lightning_tracin.storage import files


class Rows:
    """A data set that can be iterated, as those of Hugging Face can."""

    def __getitem__(self, index):
        return test_texts()[index]

    def __iter__(self):
        return iter(test_texts())


def test_a_test_gradient_that_is_not_finite_is_named(tmp_path):
    module, data = poisoned(13)
    trainer = fitted(tmp_path / "trace", module, loader())
    with pytest.raises(ValueError, match="test example 13 is NaN or infinite"):
        trainer.influence(loader(data, shuffle=True))


def only_one(items):
    (item,) = items
    return default_collate([item])


def test_a_loss_that_depends_on_other_test_examples(tmp_path):
    """Unseen in training with batches of one, of which no two can be put together."""
    module = with_loss(lambda m, b: cross_entropy(m, b, reduction="none") * m(b[0]).mean())
    with pytest.warns(UserWarning, match="Scores are of influence_loss"):
        trainer = fitted(tmp_path / "trace", module, loader(batch_size=1, collate_fn=only_one))
    with pytest.raises(ValueError, match="depends on the other examples"):
        trainer.influence(loader(test_texts()))


def test_a_training_step_that_is_a_sum_is_found_at_the_query_too(tmp_path):
    """Unseen in training with batches of one, of which no two can be put together."""
    module = Plain(lambda logits, labels: functional.cross_entropy(logits, labels, reduction="sum"))
    trainer = fitted(tmp_path / "trace", module, loader(batch_size=1, collate_fn=only_one))
    with pytest.raises(ValueError, match=r"(?s)not a mean of independent.*TracInMixin"):
        trainer.influence(loader(test_texts()))


def test_an_empty_training_set(toy, trace):
    with pytest.raises(ValueError, match="training set is empty"):
        toy.influence(loader(test_texts()), train_dataloaders=loader(empty()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: loader(empty()), "test loader is empty"),
        (lambda: [loader(), 3], "some are loaders or data sets, others are not"),
        (
            lambda: None,
            r'nothing to explain: pass test examples, as in.*influence\(\["some text"\], target="prediction"\)',
        ),
        (lambda: DataLoader(test_texts(), batch_size=None), "does not batch"),
        (lambda: 3, "must come in a DataLoader, but got int"),
        (
            lambda: Rows(),
            "must come in a DataLoader, but got Rows. Pass a list of texts or rows, a data set that has a length",
        ),
        (
            lambda: loader(test_texts(), collate_fn=lambda r: torch.utils.data.default_collate(r[1:])),
            "collate function",
        ),
    ],
    ids=["empty", "several kinds", "none", "unbatched", "not a loader", "rows", "dropping collate"],
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
    files.write_json(path, {**files.read_json(path), "n_examples": number})
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


@pytest.mark.parametrize(("name", "value"), [("shard_examples", 7), ("n_examples", 12), ("n_examples", 30)])
def test_texts_of_another_number_of_examples(tmp_path, name, value):
    fitted(tmp_path)
    for gradients in tmp_path.glob("checkpoints/*/words"):
        shutil.rmtree(gradients)
    path = tmp_path / "texts" / "index.json"
    files.write_json(path, {**files.read_json(path), name: value})
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
    with pytest.warns(UserWarning, match="Scores are of influence_loss"):
        fit = fitted(tmp_path, Steep())
    for k in (None, 2):
        with pytest.raises(ValueError, match=r"test example 0 are too large for float32.*cosine"):
            fit.influence(loader(test_texts()), k=k)
    assert torch.isfinite(fit.influence(loader(test_texts()), method=TracInWE(normalize="cosine")).scores).all()


def test_a_spare_batch_of_a_loader_with_workers_and_a_timeout():
    ids, _ = spare_batch(loader(num_workers=1, timeout=60), ALONE)
    assert torch.equal(ids, texts().tensors[0][:8])


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
