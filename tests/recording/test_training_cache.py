"""Gradients from training's own backward passes.

Where training moves the weights by nothing and drops nothing out, they are those of the pass at the checkpoint.
"""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import pytorch_lightning as pl
import torch
from families import FAMILIES
from families import N_TRAIN as N_FAMILY
from pytorch_lightning.plugins import MixedPrecision
from still_fits import METHODS, Still, assert_expected, build, scores_of
from stored_files import bytes_of_tensors
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler, default_collate
from toy import N_TRAIN, VOCABULARY, fitted, loader, quiet, test_texts, texts
from variants import without_dropout

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.recording import space, training_cache
from lightning_tracin.storage import runs

# One of each way that losses come by; the others are run by `make test-slow`.
QUICK = {
    *("bert-classes", "bert-tokens", "bert-masked", "gpt2-padded-on-the-left", "t5", "lora", "lstm-time-first"),
    *(
        "embedding-called-twice",
        "frozen-embedding",
        "bag-weighted",
        "bert-choices",
        "preferences-interleaved",
        "images",
    ),
}

LOADERS = {
    "in order": lambda: loader(),
    "shuffled": lambda: loader(shuffle=True),
    "uneven batches": lambda: loader(batch_size=7, shuffle=True),
    "one by one": lambda: loader(batch_size=1, shuffle=True),
    "as many examples as tokens": lambda: loader(batch_size=7, shuffle=True),
    "workers": lambda: loader(shuffle=True, num_workers=2, prefetch_factor=3),
    "persistent workers": lambda: loader(shuffle=True, num_workers=1, persistent_workers=True),
    "own batch sampler": lambda: DataLoader(
        texts(), batch_sampler=BatchSampler(RandomSampler(texts()), 3, drop_last=False)
    ),
    "batches from the sampler": lambda: DataLoader(
        Batched(),
        batch_size=None,
        sampler=BatchSampler(RandomSampler(texts()), 3, drop_last=False),
    ),
}


class Batched(torch.utils.data.Dataset):
    """Takes a list of indices, and gives a batch, as Hugging Face's data sets do."""

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, indices):
        if isinstance(indices, int):
            return texts()[indices]
        return tuple(torch.stack(column) for column in zip(*(texts()[i] for i in indices), strict=True))


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_every_example_is_stored_under_its_index(tmp_path, expected, make):
    fit = fitted(tmp_path / "trace", build(), make(), cache="training", trainer={"max_epochs": 2})
    assert_expected(fit, expected, epochs=2)
    trace = Trace(tmp_path / "trace")
    for example in range(N_TRAIN):
        ids, label = texts()[example]
        assert trace.texts([example]).ids_of(0) == [token for token in ids.tolist() if token]
        assert trace.texts([example]).label_of(0) == label
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_is_skipped_keeps_its_indices(tmp_path, workers):
    missing = 9
    ids = texts()[missing][0]

    def collate(rows):
        return None if any(torch.equal(row[0], ids) for row in rows) else torch.utils.data.default_collate(rows)

    data = loader(batch_size=1, collate_fn=collate, num_workers=workers)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 3}
    fitted(tmp_path / "trace", build(), data, cache="training", trainer=settings)
    stored = Trace(tmp_path / "trace").texts(list(range(N_TRAIN)))
    for example in range(N_TRAIN):
        expected = [] if example == missing else [token for token in texts()[example][0].tolist() if token]
        assert stored.ids_of(example) == expected


def test_an_epoch_that_a_hook_ends_early_leaves_no_indices_behind(tmp_path):
    class Short(Still):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 and self.current_epoch == 0 else None

    fitted(tmp_path / "trace", build(Short), loader(shuffle=True), cache="training", trainer={"max_epochs": 2})
    stored = Trace(tmp_path / "trace").texts(list(range(N_TRAIN)))
    for example in range(N_TRAIN):
        assert stored.ids_of(example) == [token for token in texts()[example][0].tolist() if token]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_thread_that_serves_other_devices_finds_the_same(tmp_path, monkeypatch, expected, workers):
    monkeypatch.setattr(training_cache, "_computed_elsewhere", lambda calls: True)
    data = loader(shuffle=True, num_workers=workers, batch_size=1)
    fit = fitted(tmp_path / "trace", build(), data, cache="training", trainer={"max_epochs": 2})
    assert_expected(fit, expected, epochs=2)


SETTINGS = {
    "accumulated": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 1e-4},
    "validated in between": {"val_check_interval": 2, "limit_val_batches": 2, "num_sanity_val_steps": 2},
    "reloaded": {"reload_dataloaders_every_n_epochs": 1},
    "bfloat16": {"precision": "bf16-mixed"},
}


class Validated(Still):
    def validation_step(self, batch, batch_idx):
        self.log("loss", self.influence_loss(batch).mean())

    def train_dataloader(self):
        return loader(shuffle=True)

    def val_dataloader(self):
        return loader(test_texts())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_the_trainer_does_to_the_loss_is_undone(tmp_path, expected, settings):
    pl.seed_everything(5, verbose=False)
    callback = TracInCallback(tmp_path / "trace", dtype="float32", cache="training")
    fit = quiet(callbacks=[callback], **{"max_epochs": 2, **settings})
    fit.fit(build(Validated))
    exact = quiet()  # scores are asked for in full precision
    for method in METHODS:
        scores = exact.influence(loader(test_texts()), build(), trace=tmp_path / "trace", method=method).scores * 1e12
        tolerance = 2e-2 if "precision" in settings else 1e-5
        error = (scores - 2 * expected[method]).norm() / expected[method].norm()
        assert error < 2 * tolerance


def test_a_loss_scale_is_undone_and_overflowing_steps_are_left_out(tmp_path, expected):
    class Overflowing(Still):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (torch.inf if batch_idx == 1 and self.training and torch.is_grad_enabled() else 1.0)

    for module, epochs in ((Still, 1), (Overflowing, 1)):
        pl.seed_everything(5, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        fit = quiet(
            callbacks=[TracInCallback(tmp_path / module.__name__, dtype="float32", cache="training")],
            plugins=MixedPrecision("bf16-mixed", "cpu"),
            max_epochs=epochs,
        )
        fit.precision_plugin.scaler = scaler
        data = loader()
        fit.fit(build(module), data)
        scores = {}
        for method in METHODS:
            result = quiet().influence(loader(test_texts()), build(), trace=tmp_path / module.__name__, method=method)
            scores[method] = result.scores * 1e12
            if module is Overflowing:
                assert not scores[method][:, 4:8].any()
                scores[method][:, 4:8] = expected[method][:, 4:8]
            error = (scores[method] - expected[method]).norm() / expected[method].norm()
            assert error < 2e-2


@pytest.mark.parametrize("run_bytes", [1, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_many_runs_and_shards(tmp_path, monkeypatch, expected, run_bytes, dtype):
    monkeypatch.setattr(runs, "_RUN_BYTES", run_bytes)
    monkeypatch.setattr("lightning_tracin.storage.shards.MOST_SHARD_EXAMPLES", 6)
    fit = fitted(tmp_path / "trace", build(), cache="training", dtype=dtype)
    for method in METHODS:
        error = (scores_of(fit, method) - 2 * expected[method]).norm() / expected[method].norm()
        assert error < {"float32": 1e-5, "float16": 2e-3, "int8": 4e-2}[dtype]


def test_examples_that_no_batch_held_count_zero(tmp_path, expected, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_tracin.recording.training_cache.rank_zero_info", said.append)
    sampler = WeightedRandomSampler(torch.arange(1.0, N_TRAIN + 1), N_TRAIN)
    drawn = set()

    class Drawn(Still):
        def training_step(self, batch, batch_idx):
            if self.training:  # not in the check before training
                drawn.update(map(tuple, batch[0].tolist()))
            return super().training_step(batch, batch_idx)

    fit = fitted(tmp_path / "trace", build(Drawn), loader(sampler=sampler), cache="training", trainer={"max_epochs": 1})
    came = torch.tensor([tuple(texts()[i][0].tolist()) in drawn for i in range(N_TRAIN)])
    assert 0 < came.sum() < N_TRAIN
    for method in METHODS:
        scores = scores_of(fit, method)
        torch.testing.assert_close(scores[:, came], expected[method][:, came], rtol=1e-5, atol=1e-7)
        assert not scores[:, ~came].any()
    [note] = said
    assert note.startswith(f"{int((~came).sum())} of {N_TRAIN} training examples count with a gradient of zero at")


@pytest.mark.parametrize("options", [{"every_n_train_steps": 2}, {"every_n_train_steps": 7}, {"every_n_epochs": 2}])
def test_an_example_counts_once_at_each_checkpoint_after_which_it_came(tmp_path, expected, options):
    fit = fitted(tmp_path / "trace", build(), loader(), cache="training", trainer={"max_epochs": 4}, **options)
    every = options.get("every_n_train_steps", 10)
    seen = torch.zeros(N_TRAIN)
    for start in range(0, 20 - every + 1, every):
        batches = {step % 5 for step in range(start, start + every)}
        seen += torch.tensor([float(example // 4 in batches) for example in range(N_TRAIN)])
    for method in METHODS:
        torch.testing.assert_close(scores_of(fit, method), seen * expected[method], rtol=1e-5, atol=1e-7)


def test_a_resumed_fit_goes_on(tmp_path, expected):
    options = {"cache": "training", "dtype": "float32"}
    first = quiet(callbacks=[TracInCallback(tmp_path / "trace", **options)], max_epochs=2)
    first.fit(build(), loader(shuffle=True))
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = quiet(callbacks=[TracInCallback(tmp_path / "trace", **options)], max_epochs=3)
    second.fit(build(), loader(shuffle=True), ckpt_path=tmp_path / "last.ckpt")
    assert_expected(second, expected, epochs=3)


def test_of_several_backward_passes_of_one_batch_the_last_counts(tmp_path, expected):
    class Searching(Still):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=1e-12, max_iter=3)

    fit = fitted(tmp_path / "trace", build(Searching), cache="training", trainer={"max_epochs": 1})
    assert_expected(fit, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(FAMILIES.keys() - {"bert-dropout", "cnn", "without-mixin"})
    ],
)
def test_every_family_of_models(tmp_path, monkeypatch, name):
    family = FAMILIES[name]
    monkeypatch.setattr("families.EMBEDDING_RATE", 1e-12)
    monkeypatch.setattr("families.OTHER_RATE", 1e-12)
    found = {}
    for cache in ("training", "checkpoint"):
        module = without_dropout(family.build())
        methods = METHODS if module.embedding else METHODS[1:]
        pl.seed_everything(3, verbose=False)
        fit = quiet(
            callbacks=[TracInCallback(tmp_path / cache, dtype="float32", cache=cache, methods=methods)], max_epochs=1
        )
        fit.fit(module, family.train_loader())
        found[cache] = [fit.influence(family.test_loader(), method=method).scores for method in methods]
    for training, checkpoint in zip(found["training"], found["checkpoint"], strict=True):
        assert training.shape[1] == N_FAMILY
        assert checkpoint.any()
        assert (training - checkpoint).norm() <= 1e-4 * checkpoint.norm()


@pytest.mark.parametrize("name", ["cnn", "without-mixin"])
def test_batch_norm_is_warned_of(tmp_path, name):
    callback = TracInCallback(tmp_path / "trace", cache="training")
    with pytest.warns(UserWarning, match="batch norm, which in training mixes the examples"):
        quiet(callbacks=[callback], max_epochs=1).fit(FAMILIES[name].build(), FAMILIES[name].train_loader())


def test_the_loader_and_the_module_are_left_as_they_were(tmp_path):
    for error in (None, RuntimeError("broken")):

        class Breaking(Still):
            def training_step(self, batch, batch_idx, error=error):
                if error is not None and self.trainer.global_step == 6:
                    raise error
                return super().training_step(batch, batch_idx)

        data, module = loader(shuffle=True), build(Breaking)
        sampler = data.batch_sampler
        fit = quiet(callbacks=[TracInCallback(tmp_path / str(error), cache="training")])
        if error is None:
            fit.fit(module, data)
        else:
            with pytest.raises(RuntimeError, match="broken"):
                fit.fit(module, data)
        assert data.batch_sampler is sampler
        assert "process_dataloader" not in vars(fit.strategy)
        assert not any(part._forward_hooks for part in module.modules())
        assert not list(tmp_path.rglob("*.partial"))
        assert [each.step for each in Trace(tmp_path / str(error)).checkpoints] == [5, 10][: 1 if error else 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_that_are_given_again_at_a_reload(tmp_path, expected, workers):
    loaders = [loader(shuffle=True, num_workers=workers, persistent_workers=workers > 0) for _ in range(2)]
    samplers = [each.batch_sampler for each in loaders]

    class Kept(pl.LightningDataModule):
        def train_dataloader(self):
            return loaders[self.trainer.current_epoch // 2]

    trainer = {"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
    fit = fitted(tmp_path / "trace", build(), Kept(), cache="training", trainer=trainer)
    assert_expected(fit, expected, epochs=4)
    assert [each.batch_sampler for each in loaders] == samplers


class Counting(BatchSampler):
    """Counts the last example as -1, and can be told its batch size."""

    def __iter__(self):
        for batch in super().__iter__():
            yield [index - N_TRAIN for index in batch]


def test_what_others_set_on_the_loaders_sampler_reaches_it(tmp_path, expected):
    class Growing(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.train_dataloader.batch_sampler.batch_size = 10

    data = DataLoader(texts(), batch_sampler=Counting(range(N_TRAIN), 4, drop_last=False))
    sizes = []

    class Seeing(Still):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch[1]))
            return super().training_step(batch, batch_idx)

    callbacks = [TracInCallback(tmp_path / "trace", cache="training", dtype="float32"), Growing()]
    fit = quiet(callbacks=callbacks)
    fit.fit(build(Seeing), data)
    assert sizes[-7:] == [4, 4, 4, 4, 4, 10, 10]
    assert_expected(fit, expected, epochs=2)


@pytest.mark.parametrize("plain", [False, True])
def test_a_training_step_that_takes_its_batch_apart(tmp_path, expected, plain):
    class Popping(Still):
        def influence_loss(self, batch):
            return super().influence_loss((batch.pop("ids"), batch.pop("labels")))

    class Plain(Popping):
        influence_loss = None

        def training_step(self, batch, batch_idx):
            return Popping.influence_loss(self, batch).mean()

    def named(items):
        return dict(zip(("ids", "labels"), default_collate(items), strict=True))

    data = loader(collate_fn=named)
    fit = fitted(
        tmp_path / "trace", build(Plain if plain else Popping), data, cache="training", trainer={"max_epochs": 1}
    )
    labels = [float(texts()[example][1]) for example in range(N_TRAIN)]
    assert fit.callbacks[0].trace.texts(range(N_TRAIN)).labels.tolist() == labels
    scores = fit.influence(loader(test_texts(), collate_fn=named)).scores * 1e12
    torch.testing.assert_close(scores, expected["tracin-we"], rtol=1e-5, atol=1e-7)


def test_a_frozen_embedding_whose_output_is_changed_in_place(tmp_path):
    class InPlace(Still):
        def __init__(self):
            super().__init__()
            self.embedding.requires_grad_(False)

        def forward(self, ids):
            rows = self.embedding(ids)
            rows *= (ids != 0)[..., None]
            return self.head(torch.tanh(self.hidden(rows.sum(1))))

    scores = [
        scores_of(fitted(tmp_path / cache, build(InPlace), cache=cache, trainer={"max_epochs": 1}), "tracin-we")
        for cache in ("training", "checkpoint")
    ]
    assert scores[0].any()
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-7)


def test_a_new_head_is_still_zero_when_training_begins(tmp_path):
    class Fresh(Still):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.head.weight)

        def training_step(self, batch, batch_idx):
            if self.training:
                assert not self.head.weight.any() or self.global_step
            return super().training_step(batch, batch_idx)

    fit = fitted(tmp_path / "trace", build(Fresh), cache="training")
    assert len(fit.callbacks[0].trace.checkpoints) == 2


def test_an_optimizer_that_also_trains_what_is_not_in_the_module(tmp_path, expected):
    class Outside(Still):
        def configure_optimizers(self):
            self.centres = [nn.Parameter(torch.ones(3))]  # in a list, where torch does not see it
            return torch.optim.SGD([*self.parameters(), *self.centres], lr=1e-12)

    fit = fitted(tmp_path / "trace", build(Outside), cache="training", trainer={"max_epochs": 1})
    assert_expected(fit, expected)


def test_a_forward_pass_without_gradients_in_a_step_does_not_count(tmp_path, expected):
    class Measuring(Still):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self(torch.randint(1, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(0)))
            self(batch[0])  # nor does one that leads to no loss
            return super().training_step(batch, batch_idx)

    assert_expected(fitted(tmp_path / "trace", build(Measuring), cache="training"), expected, epochs=2)


@pytest.mark.parametrize("epochs", [1, 2, pytest.param(10, marks=pytest.mark.slow)])
def test_many_epochs_between_checkpoints_take_no_more_space_than_was_asked_for(tmp_path, monkeypatch, epochs):
    """Scores are those of one epoch before the checkpoint."""
    monkeypatch.setattr(runs, "_RUN_BYTES", 3000)
    data, lay, needed = texts(80), [], []

    class Watching(pl.Callback):
        def on_train_batch_end(self, *_):
            running = tmp_path / "trace" / "running.partial"
            lay.append(bytes_of_tensors(running, "words*") + bytes_of_tensors(running, "linear-*"))

    def asked(*given):
        needed.append(runs.max_run_bytes(*given))
        return needed[-1]

    monkeypatch.setattr(space, "max_run_bytes", asked)
    options = {"cache": "training", "every_n_epochs": epochs, "dtype": "float32"}
    recorded = TracInCallback(tmp_path / "trace", **options)
    fit = quiet(callbacks=[recorded, Watching()], max_epochs=epochs)
    fit.fit(build(), loader(data, shuffle=True))
    expected = fitted(tmp_path / "once", build(), loader(data), trainer={"max_epochs": 1})
    for method in METHODS:
        torch.testing.assert_close(scores_of(fit, method), scores_of(expected, method), rtol=1e-5, atol=1e-7)
    assert 0 < max(lay) < 1.2 * needed[0]  # which is an estimate
    assert needed[0] < 3 * min(epochs, 2) * bytes_of_tensors(recorded.trace.checkpoints[0].path, "0*.safetensors")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, int(needed[0])))  # none for the checkpoint
    with pytest.raises(OSError, match="for 1 checkpoint of 80"):
        fitted(tmp_path / "full", build(), loader(data), trainer={"max_epochs": epochs}, **options)
