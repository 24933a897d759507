"""The folder of a fit: rates as a recorder sees them, resumed fits, and fits that break at any moment."""

from __future__ import annotations

import shutil

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from toy import N_TEST, N_TRAIN, Toy, fitted, loader, quiet, site_of, test_texts, texts
from variants import Failing, Reproducible, resumable

from lightning_tracin import InfluenceResult, Trace, TracInCallback
from lightning_tracin.storage import files

METHODS = ["tracin-we", "tracin-last"]


class Recorder(Callback):
    """Notes, at every optimizer step, the rate of each layer's own parameter group, by the parameter itself."""

    def __init__(self):
        self.rates = {"embedding": [], "head": []}
        self.marks = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, rates in self.rates.items():
            weight = getattr(pl_module, name).weight
            rates += [g["lr"] for g in optimizer.param_groups if any(p is weight for p in g["params"])]

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.marks[trainer.global_step] = {name: len(rates) for name, rates in self.rates.items()}

    def mean(self, name, first, last):
        """Mean rate of a layer from one value of global_step to another; 0 if it was not trained in between."""
        start = self.marks[first][name] if first else 0
        own = self.rates[name][start : self.marks[last][name]]
        return sum(own) / len(own) if own else 0.0


def scheduled(optimizer, decay):
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TwoGroups(Toy):
    def configure_optimizers(self):
        slow = [*self.hidden.parameters(), *self.head.parameters()]
        groups = [{"params": slow, "lr": 0.01}, {"params": self.embedding.parameters(), "lr": 0.2}]
        return scheduled(torch.optim.SGD(groups), 0.8)


class TwoOptimizers(Toy):
    """The head's optimizer steps at every other batch only."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.influence_loss(batch).mean())
        embedding, head = self.optimizers()
        for optimizer, schedule in list(zip((embedding, head), self.lr_schedulers(), strict=True))[: 1 + batch_idx % 2]:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def configure_optimizers(self):
        head = torch.optim.Adam([*self.hidden.parameters(), *self.head.parameters()], 0.02)
        return [scheduled(torch.optim.SGD(self.embedding.parameters(), 0.3), 0.9), scheduled(head, 0.5)]


class Biases(Toy):
    """A group for biases, as weight decay has it; they learn faster."""

    def configure_optimizers(self):
        named = list(self.named_parameters())
        groups = [
            [weight for name, weight in named if name.endswith("bias") == of_biases] for of_biases in (True, False)
        ]
        return torch.optim.SGD([{"params": groups[0], "lr": 0.5}, {"params": groups[1]}], lr=0.1)


def test_the_rate_of_a_layer_is_that_of_its_weight(tmp_path):
    for checkpoint in fitted(tmp_path / "trace", Biases()).callbacks[0].trace.checkpoints:
        assert [checkpoint.learning_rate_of(site_of(checkpoint, method)) for method in METHODS] == pytest.approx(
            [0.1, 0.1]
        )


class Generating(torch.utils.data.Dataset):
    """Drops words at random, by a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, index):
        ids, label = texts()[index]
        return torch.where(torch.rand(len(ids), generator=self.generator) < 0.2, 1, ids), label


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_a_data_set_with_a_generator_of_its_own_is_known_by_its_length(tmp_path, cache):
    first = fitted(tmp_path / "trace", data=loader(Generating()), cache=cache)
    assert first.influence(loader(test_texts()), train_dataloaders=loader(Generating())).n_train == N_TRAIN
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = quiet(callbacks=[TracInCallback(tmp_path / "trace", cache=cache, dtype="float32")], max_epochs=3)
    second.fit(Toy(), loader(Generating()), ckpt_path=tmp_path / "last.ckpt")
    assert len(Trace(tmp_path / "trace").checkpoints) == 3
    with pytest.raises(ValueError, match=f"it had {N_TRAIN} examples, this one has {N_TEST}"):
        first.influence(loader(test_texts()), train_dataloaders=loader(test_texts()))


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 2}, {"every_n_epochs": 3}], ids=str)
@pytest.mark.parametrize(
    ("module", "accumulate"), [(Toy, 1), (Toy, 2), (TwoGroups, 2), (TwoOptimizers, 1)], ids=lambda x: str(x)
)
def test_rates_are_the_mean_of_those_that_were_used(tmp_path, module, accumulate, options):
    recorder = Recorder()
    callbacks = [recorder, TracInCallback(tmp_path / "trace", **options)]
    quiet(callbacks=callbacks, accumulate_grad_batches=accumulate, max_epochs=3).fit(module(), loader())
    checkpoints = Trace(tmp_path / "trace").checkpoints
    assert checkpoints
    before = 0
    for checkpoint in checkpoints:
        for method, layer in zip(METHODS, ("embedding", "head"), strict=True):
            expected = recorder.mean(layer, before, checkpoint.step)
            found = checkpoint.learning_rate_of(site_of(checkpoint, method))
            assert found == pytest.approx(expected), (checkpoint.step, method)
        assert checkpoint.learning_rate == checkpoint.learning_rate_of(site_of(checkpoint, "tracin-we"))
        before = checkpoint.step


def test_two_callbacks_write_two_traces(tmp_path):
    callbacks = [TracInCallback(tmp_path / "a"), TracInCallback(tmp_path / "b", every_n_train_steps=4)]
    trainer = quiet(callbacks=callbacks)
    trainer.fit(Toy(), loader())
    assert [each.step for each in Trace(tmp_path / "a").checkpoints] == [5, 10]
    assert [each.step for each in Trace(tmp_path / "b").checkpoints] == [4, 8]
    scores = [trainer.influence(loader(test_texts()), trace=tmp_path / name).scores for name in "ab"]
    assert not torch.allclose(*scores)


def test_a_trace_may_be_moved(tmp_path):
    expected = fitted(tmp_path / "trace").influence(loader(test_texts())).scores
    shutil.move(tmp_path / "trace", tmp_path / "elsewhere")
    found = quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "elsewhere").scores
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("step", [3, 7, 9])
def test_a_fit_resumed_between_two_checkpoints_counts_the_steps_before_the_cut(tmp_path, step):
    """Lightning begins the loader anew in the middle of an epoch, so that only steps and rates are comparable."""

    def fit(name, steps, **arguments):
        pl.seed_everything(0, verbose=False)
        saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{step}", every_n_train_steps=1)
        trainer = quiet(
            callbacks=[TracInCallback(tmp_path / name, dtype="float32", every_n_train_steps=4), saver],
            max_epochs=4,
            max_steps=steps,
            enable_checkpointing=True,
        )
        trainer.fit(Reproducible(), loader(), **arguments)
        return trainer

    fit("whole", 16)
    shutil.rmtree(tmp_path / "saved")
    fit("cut", 9)
    resumed = fit("cut", 16, ckpt_path=str(tmp_path / "saved" / f"step={step}.ckpt"))
    expected, found = (Trace(tmp_path / name).checkpoints for name in ("whole", "cut"))
    assert [each.step for each in found] == [each.step for each in expected] == [4, 8, 12, 16]
    assert [each.learning_rate for each in found] == pytest.approx([each.learning_rate for each in expected])
    assert resumed.influence(loader(test_texts())).scores.shape == (N_TEST, N_TRAIN)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_without_a_dirpath_goes_on_in_the_new_folder_of_its_logger(tmp_path):
    def fit(epochs, **arguments):
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}")
        logger = CSVLogger(tmp_path, name="news")
        trainer = quiet(
            callbacks=[TracInCallback(), saver], logger=logger, max_epochs=epochs, enable_checkpointing=True
        )
        trainer.fit(Reproducible(), loader(), **arguments)
        return trainer.callbacks[0].trace

    first = fit(1)
    resumed = fit(2, ckpt_path=str(tmp_path / "saved" / "step=5.ckpt"))
    assert first.path == tmp_path / "news" / "version_0" / "trace"
    assert resumed.path == tmp_path / "news" / "version_1" / "trace"
    assert [each.step for each in resumed.checkpoints] == [5, 10]
    assert [each.step for each in first.checkpoints] == [5]
    assert resumed.checkpoints[0].id == first.checkpoints[0].id


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_gradients_on_demand_are_filled_in_after_a_resumed_fit(tmp_path):
    def fit(name, epochs, **arguments):
        pl.seed_everything(0, verbose=False)
        saver = ModelCheckpoint(tmp_path / f"saved-{name}", save_top_k=-1, filename="{step}")
        callback = TracInCallback(tmp_path / name, dtype="float32", cache="on_demand")
        trainer = quiet(callbacks=[callback, saver], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(Reproducible(), loader(), **arguments)
        return trainer

    expected = fit("whole", 2).influence(loader(test_texts())).scores
    fit("cut", 1).influence(loader(test_texts()))
    resumed = fit("cut", 2, ckpt_path=str(tmp_path / "saved-cut" / "step=5.ckpt"))
    torch.testing.assert_close(resumed.influence(loader(test_texts())).scores, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*Scores are of influence_loss")
@pytest.mark.parametrize("saved", [True, False], ids=["loaded from a file", "in memory"])
@pytest.mark.parametrize(("step", "epochs"), [(5, 2), (10, 3)], ids=["last checkpoint replaced", "one more"])
def test_words_of_a_result_are_never_those_of_checkpoints_that_a_resumed_fit_has_written(
    tmp_path, monkeypatch, step, epochs, saved
):
    result = resumable(tmp_path / "trace", 2).influence(loader(test_texts()))
    result.save(tmp_path / "result.safetensors")
    # Other weights from here on, as with dropout or with another order of the batches.
    monkeypatch.setattr(Reproducible, "training_step", lambda self, batch, _: self.influence_loss(batch).sum())
    resumable(tmp_path / "trace", epochs, ckpt_path=str(tmp_path / "saved-trace" / f"step={step}.ckpt"))
    after = InfluenceResult.load(tmp_path / "result.safetensors") if saved else result
    assert "Test example 0" in str(after)
    train_index = int(after.proponents(1).indices[0, 0])
    try:
        total = sum(term for _, term in after.words(0, train_index))
    except FileNotFoundError:
        return  # a clear error is as good
    assert total == pytest.approx(float(after.scores[0, train_index]), rel=1e-4)


def test_a_fit_that_follows_another_with_the_same_callback_needs_overwrite(tmp_path):
    callback = TracInCallback(tmp_path / "trace")
    quiet(callbacks=[callback]).fit(Toy(), loader())
    before = callback.trace.id
    with pytest.raises(FileExistsError, match="overwrite=True"):
        quiet(callbacks=[callback]).fit(Toy(), loader())
    assert Trace(tmp_path / "trace").id == before
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5, 10]


def test_a_fast_dev_run_leaves_the_trace_of_an_earlier_fit_alone(tmp_path):
    callback = TracInCallback(tmp_path / "trace", every_n_epochs=1)
    quiet(callbacks=[callback]).fit(Toy(), loader())
    quiet(callbacks=[callback], fast_dev_run=True).fit(Toy(), loader())
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5, 10]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_filling_on_demand_that_is_cut_off_is_taken_up_again(tmp_path, error):
    fit = fitted(tmp_path / "trace", cache="on_demand")
    # In the middle of the second checkpoint's pass.
    data = Failing(fit.callbacks[0].trace.checkpoints[0].path / "words", 9, error)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit.influence(loader(test_texts()), train_dataloaders=loader(data))
    trace = Trace(tmp_path / "trace")
    assert [each.has_gradients(site_of(trace, "tracin-we")) for each in trace.checkpoints] == [True, False]
    assert not list(tmp_path.rglob("*.partial"))
    scores = fit.influence(loader(test_texts())).scores
    expected = fitted(tmp_path / "other").influence(loader(test_texts())).scores
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9)


def test_a_fit_that_is_cut_off_while_training_keeps_its_checkpoints(tmp_path):
    class Stopping(Toy):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 7:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="broken"):
        fitted(tmp_path / "trace", Stopping())
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5]
    scores = quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace").scores
    assert scores.shape == (N_TEST, N_TRAIN)


def test_at_whatever_file_the_disk_fills_up_what_was_complete_stays_readable(tmp_path, monkeypatch):
    left = 0

    def fill(_):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fill)  # called once for every file, before it takes its name
    outcomes = []
    for number in range(1, 100):
        left = number
        try:
            fitted(tmp_path / f"{number}")
        except OSError:
            assert not list(tmp_path.rglob("*.partial")), f"file {number}"
            steps = [each.step for each in Trace(tmp_path / f"{number}").checkpoints] if number > 1 else []
            outcomes.append(steps)
            if steps:
                left = 0
                result = quiet().influence(
                    loader(test_texts()), Toy(), trace=tmp_path / f"{number}", method=METHODS[number % 2]
                )
                assert result.scores.abs().sum() > 0
                assert str(result)
            continue
        break
    assert outcomes[-1] == [5]  # the last file that failed was one of the second checkpoint
    assert [] in outcomes[1:]
    assert [5, 10] not in outcomes


def test_a_bare_checkpoint_names_step_epoch_rate_and_weights(toy):
    """What other tools rely on: docs/trace.md."""
    trace = Trace(str(toy.callbacks[0].trace.path))
    assert trace.n_train == N_TRAIN
    for number, checkpoint in enumerate(trace.checkpoints):
        assert (checkpoint.step, checkpoint.epoch) == (5 * (number + 1), number)
        assert isinstance(checkpoint.learning_rate, float)
        module = Toy()
        assert not module.load_state_dict(checkpoint.weights()).missing_keys
    assert "checkpoints=2" in repr(trace)
    assert trace.texts([3]).ids_of(0) == [token for token in texts()[3][0].tolist() if token]
