"""The sampler, not the data set, says what is trained on."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from torch.nn import functional
from torch.utils.data import DataLoader, SubsetRandomSampler, WeightedRandomSampler
from toy import EPOCHS, N_TRAIN, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import InfluenceResult, Trace, TracInCallback

CACHES = ["checkpoint", "on_demand", "training"]

FOLD = list(range(0, N_TRAIN, 4))  # held back


class Watched(Toy):
    """Keeps which examples each training step was given, told from their words, which are all different."""

    def __init__(self, data) -> None:
        super().__init__()
        self.dropout.p = 0.0
        self.data = data
        self.steps: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        if self.training:  # checks before the fit call it too
            same = (batch[0][:, None] == self.data.tensors[0][None]).all(2)
            assert (same.sum(1) == 1).all()
            self.steps.append(same.int().argmax(1).tolist())
        return super().training_step(batch, batch_idx)


def without_fold(data, **options) -> DataLoader:
    kept = [index for index in range(N_TRAIN) if index not in FOLD]
    return loader(data, sampler=SubsetRandomSampler(kept), **options)


def with_replacement(data, **options) -> DataLoader:
    return loader(data, sampler=WeightedRandomSampler(torch.arange(N_TRAIN).float(), N_TRAIN), **options)


class EveryOther(torch.utils.data.BatchSampler):
    """A batch sampler of the user's own, which yields tuples, and counts from the end."""

    def __init__(self) -> None:
        self.batch_size = 4

    def __iter__(self):
        return iter([(-1, -3), (-5, -7, -9)])

    def __len__(self) -> int:
        return 2


def every_other(data, **_) -> DataLoader:
    return DataLoader(data, batch_sampler=EveryOther())


FITS = {
    "k-fold": (without_fold, {}, {}),
    "sampled with replacement": (with_replacement, {}, {}),
    "a batch sampler of one's own": (every_other, {}, {}),
    "a list of batches": (lambda data, **_: DataLoader(data, batch_sampler=[[6, 3], [0, 2], [5, 4], [1, 0]]), {}, {}),
    "workers": (without_fold, {}, {"num_workers": 2}),
    "limit_train_batches": (loader, {"limit_train_batches": 3}, {"shuffle": True}),
    "overfit_batches": (loader, {"overfit_batches": 2}, {}),
    "max_steps inside of the first epoch": (loader, {"max_steps": 3, "max_epochs": -1}, {"shuffle": True}),
    "drop_last": (loader, {}, {"batch_size": 6, "drop_last": True, "shuffle": True}),
    "accumulated": (without_fold, {"accumulate_grad_batches": 2}, {}),
}


def scores_by_hand(fit, module, data, drawn: list[set[int]], method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_test, n_train) of the definition, where a training example counts at the checkpoints that it was drawn for."""
    trace = Trace(fit.callbacks[0].trace.path)
    layer = module.embedding if method == "tracin-we" else module.head
    sides = []
    for checkpoint in trace.checkpoints:
        module.load_state_dict(checkpoint.weights())

        def loss(batch):
            return functional.cross_entropy(module(batch[0]), batch[1])

        for each in (test_texts(), data):
            batches = [(ids[None], label[None]) for ids, label in zip(*each.tensors, strict=True)]
            sides.append(dense_gradients(module, layer, batches, loss))
    rates = [checkpoint.learning_rate for checkpoint in trace.checkpoints]
    counted = torch.zeros(len(rates), N_TRAIN, 1, 1)
    for number, examples in enumerate(drawn):
        counted[number, sorted(examples)] = 1
    train = [gradients * mask for gradients, mask in zip(sides[1::2], counted, strict=True)]
    return BruteForce(rates, sides[::2], train).scores(), counted.flatten(1).any(0)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", FITS)
def test_what_no_batch_has_held_since_a_checkpoint_counts_zero_there(tmp_path, kind, cache):
    """In every cache alike; and what was never drawn is neither proponent nor opponent."""
    loader_of, trainer, options = FITS[kind]
    if cache == "training" and kind == "accumulated":
        options = {**options, "batch_size": 5}
    data = texts()
    module = Watched(data)
    fit = fitted(tmp_path, module, loader_of(data, **options), trainer=trainer, cache=cache)
    per_epoch = len(module.steps) // len(Trace(tmp_path).checkpoints)
    epochs = [module.steps[start : start + per_epoch] for start in range(0, len(module.steps), per_epoch)]
    drawn = [{index for batch in epoch for index in batch} for epoch in epochs]
    for method in ("tracin-last", "tracin-we"):
        result = fit.influence(loader(test_texts()), method=method)
        expected, ever = scores_by_hand(fit, module, data, drawn, method)
        if cache == "training":  # of the weights of the moment: which examples count is what can be compared
            assert ((result.scores != 0).any(0) == (expected != 0).any(0)).all()
        else:
            assert relative_error(result.scores, expected) < 1e-5
    undrawn = torch.nonzero(~ever)[:, 0].tolist()
    assert result.undrawn.tolist() == undrawn
    for top in (result.proponents(int(ever.sum())), result.opponents(int(ever.sum()))):
        assert all(sorted(row) == torch.nonzero(ever)[:, 0].tolist() for row in top.indices.tolist())
    assert fit.self_influence()[~ever].eq(0).all()
    assert any(f"{len(undrawn)} of the 20 examples" in note for note in result.notes) is bool(undrawn)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # what Lightning says, once a process
@pytest.mark.parametrize("cache", CACHES)
def test_an_epoch_without_a_loss_gives_no_checkpoint_and_the_next_one_does(tmp_path, cache):
    class Late(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.training and self.current_epoch == 0 else loss

    data = texts()
    module = Late(data)
    with pytest.warns(UserWarning, match="Late has returned no loss since the last checkpoint, up to step 5: nothing"):
        fit = fitted(tmp_path, module, loader(data, shuffle=True), cache=cache)
    (checkpoint,) = Trace(tmp_path).checkpoints
    assert checkpoint.step == 10
    result = fit.influence(loader(test_texts()), method="tracin-last")
    expected, ever = scores_by_hand(fit, module, data, [set(range(N_TRAIN))], "tracin-last")
    assert ever.all()
    assert result.undrawn.tolist() == []
    if cache != "training":
        assert relative_error(result.scores, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # what Lightning says, once a process
def test_a_fit_without_a_loss_says_so_once_and_leaves_nothing_to_ask(tmp_path):
    """As of a model of transformers whose batches have ``label`` for ``labels``, and so no loss."""

    class Silent(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if not self.training else None

    with pytest.warns(UserWarning, match="returns a loss only for a batch with 'labels'") as caught:
        fit = fitted(tmp_path, Silent(), trainer={"max_epochs": 1})
    assert sum("checkpoint" in str(each.message) for each in caught) == 1
    with pytest.raises(ValueError, match="no checkpoint"):
        fit.influence(loader(test_texts()))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("of", ["a sampler", "a list of batches"])
def test_a_checkpoint_inside_of_an_epoch_is_of_what_came_since_the_one_before(tmp_path, cache, of):
    data = texts()
    module = Watched(data)
    batches = torch.randperm(N_TRAIN).view(5, 4).tolist()
    train = loader(data, shuffle=True) if of == "a sampler" else DataLoader(data, batch_sampler=batches)
    fit = fitted(tmp_path, module, train, cache=cache, every_n_train_steps=2)
    steps = module.steps
    assert [each.step for each in Trace(tmp_path).checkpoints] == [2, 4, 6, 8, 10]
    drawn = [set(steps[start] + steps[start + 1]) for start in range(0, 10, 2)]
    result = fit.influence(loader(test_texts()), method="tracin-last")
    assert result.undrawn.tolist() == []
    texts_of_all = Trace(tmp_path).texts(range(N_TRAIN))
    assert texts_of_all.labels.tolist() == data.tensors[1].tolist()
    assert texts_of_all.ids_by_example() == [row[row > 0].tolist() for row in data.tensors[0]]
    if cache != "training":
        expected, _ = scores_by_hand(fit, module, data, drawn, "tracin-last")
        assert relative_error(result.scores, expected) < 1e-5
        sizes = [file.stat().st_size for file in sorted(tmp_path.glob("checkpoints/*/linear-0/00000.safetensors"))]
        whole = fitted(tmp_path / "whole", Watched(data), loader(data), cache="checkpoint", trainer={"max_epochs": 1})
        file = whole.callbacks[0].trace.checkpoints[0].path / "linear-0" / "00000.safetensors"
        assert max(sizes) < 0.6 * file.stat().st_size  # 8 of 20 examples, and the file's head


def test_only_what_was_drawn_is_kept_saved_and_explained(tmp_path):
    data = texts()
    data.tensors[0][FOLD[0]], data.tensors[1][FOLD[0]] = (part[0] for part in test_texts().tensors)
    fit = fitted(tmp_path / "trace", Watched(data), without_fold(data))
    whole = fit.influence(loader(test_texts()))
    with pytest.warns(UserWarning, match="all 15 training examples"):
        kept = fit.influence(loader(test_texts()), k=20)
    loaded = InfluenceResult.load(kept.save(tmp_path / "kept.safetensors"))
    for result in (kept, loaded, InfluenceResult.load(whole.save(tmp_path / "whole.safetensors"))):
        assert result.undrawn.tolist() == FOLD
        assert torch.equal(result.proponents(15).indices, whole.proponents(15).indices)
        assert torch.equal(result.opponents(3).values, whole.opponents(3).values)
        assert not set(result.aggregate("vote").nonzero().flatten().tolist()) & set(FOLD)
    assert not set(FOLD) & {row["train_index"] for row in kept.rows(20)}
    assert kept.words(0, FOLD[0]) == []
    assert "6 test and 15 training examples" in repr(kept) or "15 training examples" in str(kept)
    page = kept.to_html(tmp_path / "page.html", k=20, suspects=20).read_text()
    assert "5 of the 20 examples in the training data set are no training examples" in page


@pytest.mark.parametrize("cache", CACHES)
def test_a_fit_that_goes_on_between_two_checkpoints_remembers_what_it_has_drawn(tmp_path, cache):
    """So do the steps before, whether the state was saved inside of the first fit or when that was over."""
    data = texts()
    trained: list[list[int]] = []
    state = None
    for steps in (6, 8):
        module = Watched(data)
        callback = TracInCallback(tmp_path / "trace", every_n_train_steps=4, on_error="raise", cache=cache)
        trainer = quiet(callbacks=[callback], max_steps=steps, max_epochs=-1)
        trainer.fit(module, loader(data), ckpt_path=state)
        state = tmp_path / "state.ckpt"
        trainer.save_checkpoint(state)
        trained += module.steps
    first, second = Trace(tmp_path / "trace").checkpoints
    assert [step[0] for step in second.steps] == [4, 5, 6, 7]
    for checkpoint, batches in ((first, trained[:4]), (second, trained[4:])):
        assert torch.nonzero(checkpoint.drawn())[:, 0].tolist() == sorted({i for batch in batches for i in batch})


def test_two_callbacks_both_know_and_leave_the_loader_as_it_was(tmp_path):
    data = texts()
    train = every_other(data)
    sampler = train.batch_sampler
    kinds = []

    class Asks(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            kinds.append(isinstance(trainer.train_dataloader.batch_sampler, EveryOther))

    callbacks = [TracInCallback(tmp_path / name, cache=name) for name in CACHES]
    trainer = quiet(callbacks=[*callbacks, Asks()])
    trainer.fit(Watched(data), train)
    assert train.batch_sampler is sampler
    assert all(kinds)
    for name in CACHES:
        trace = Trace(tmp_path / name)
        assert len(trace.checkpoints) == EPOCHS
        for checkpoint in trace.checkpoints:
            assert torch.nonzero(checkpoint.drawn())[:, 0].tolist() == [11, 13, 15, 17, 19]


def test_a_batch_that_gives_no_loss_is_not_trained_on(tmp_path):
    data = texts()

    class Skips(Watched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.training and batch_idx == 1 else loss

    for cache in CACHES:
        fit = fitted(tmp_path / cache, Skips(data), loader(data), cache=cache, trainer={"max_epochs": 1})
        assert fit.influence(loader(test_texts())).undrawn.tolist() == [4, 5, 6, 7]
