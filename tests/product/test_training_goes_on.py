"""When recording fails in the middle of a fit, the fit ends as it would have without it, and says what is kept."""

from __future__ import annotations

import shutil
import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from toy import N_TRAIN, Toy, loader, quiet, site_of, test_texts
from variants import Reproducible

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.storage import files

CACHES = ("checkpoint", "training", "on_demand")


class AtStep(pl.Callback):
    """Does something when so many steps are done."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.act()


class Surrogate(Toy):
    """Prints a word that no file can hold, in the second half of the data set alone."""

    def influence_words(self, batch):
        ids = batch[0].tolist()
        return [["\ud800" if self.trainer.global_step > 5 else str(token) for token in row] for row in ids]


def weights_after(kind, callbacks, path=None, **options):
    """What a fit learns, and what it warned of."""
    pl.seed_everything(0, verbose=False)
    module = kind()
    logger = False if path is None else CSVLogger(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet(callbacks=callbacks, logger=logger, **options)
        trainer.fit(module, loader(shuffle=True), *([] if path is None else [loader(test_texts())]))
    ours = ("TracIn", "trace", "NaN", "log_examples")
    said = [str(each.message) for each in caught if any(word in str(each.message) for word in ours)]
    return {name: value.clone() for name, value in module.state_dict().items()}, said, trainer


def assert_same(found, expected):
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def failing(monkeypatch, trace, cause):
    """What makes recording fail after the first checkpoint, and a part of the message."""
    if cause == "full disk":
        save = files.save_file

        def full(tensors, path, **options):
            if "step-000000010" in str(path):
                raise OSError(28, "No space left on device")
            save(tensors, path, **options)

        monkeypatch.setattr(files, "save_file", full)
        return [], "No space left on device"
    if cause == "folder gone":
        return [AtStep(6, lambda: shutil.rmtree(trace))], "There is no trace in"
    if cause == "checkpoint gone":
        return [AtStep(6, lambda: shutil.rmtree(trace / "checkpoints" / "step-000000005"))], "was removed while the fit"
    assert cause == "another trace"

    def replace():
        header = files.read_json(trace / "trace.json")
        files.write_json(trace / "trace.json", {**header, "id": "another"})

    return [AtStep(6, replace)], "Another fit has replaced the trace"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("cause", ["full disk", "folder gone", "checkpoint gone", "another trace"])
def test_a_fit_ends_as_without_the_callback(tmp_path, monkeypatch, cache, cause):
    expected, _, _ = weights_after(Toy, [])
    trace = tmp_path / "trace"
    others, reason = failing(monkeypatch, trace, cause)
    callback = TracInCallback(trace, dtype="float32", cache=cache)
    found, said, trainer = weights_after(Toy, [callback, *others])
    assert_same(found, expected)
    stopped, again = said
    assert "stopped recording at step 10" in stopped
    assert reason in stopped
    kept = "has no checkpoint" if cause.endswith("gone") else "What was stored up to the last checkpoint"
    assert kept in stopped
    assert ".." not in stopped
    assert 'With on_error="raise" it would end here' in stopped
    assert "The trace of this fit is incomplete" in again
    assert not any(part._forward_hooks for part in trainer.lightning_module.modules())
    assert not list(tmp_path.rglob("*.partial"))
    if cause == "full disk":
        assert [each.step for each in Trace(trace).checkpoints] == [5]
        assert "The recording ended at step 10" in Trace(trace).incomplete
        result = trainer.influence(loader(test_texts()))
        assert result.scores.any()
        assert any("The trace is incomplete. The recording ended at step 10" in note for note in result.notes)


@pytest.mark.parametrize("cache", CACHES)
def test_the_strict_are_told_at_once(tmp_path, monkeypatch, cache):
    others, reason = failing(monkeypatch, tmp_path / "trace", "full disk")
    with pytest.raises(OSError, match=reason):
        weights_after(Toy, [TracInCallback(tmp_path / "trace", cache=cache, on_error="raise"), *others])


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_an_example_without_a_finite_gradient_counts_zero(tmp_path, cache):
    """Its loss is infinite where influence is computed, not where the model is trained."""

    class Infinite(Toy):
        def influence_loss(self, batch):
            losses = super().influence_loss(batch)
            bad = (batch[0] == ids_of_bad).all(1) & (not self.training)
            return losses / torch.where(bad & self.trained, 0.0, 1.0)

        @property
        def trained(self):
            return self.embedding.weight.grad is not None or bool(self.marked)

        def __init__(self):
            super().__init__()
            self.register_buffer("marked", torch.zeros(()))

        def on_train_batch_end(self, *_):
            self.marked.fill_(1)

    data = loader().dataset
    ids_of_bad = data[7][0]
    expected, _, _ = weights_after(Toy, [])
    callback = TracInCallback(tmp_path / "trace", dtype="float32", cache=cache)
    found, said, trainer = weights_after(Infinite, [callback])
    assert_same(found, expected)
    if cache == "on_demand":
        with pytest.warns(UserWarning, match="of 1 of 20 training examples is NaN or infinite at step (5|10): 7"):
            result = trainer.influence(loader(test_texts()))
    else:
        assert len(said) == 2
        assert "of 1 of 20 training examples is NaN or infinite at step 10: 7. They count with" in said[1]
        result = trainer.influence(loader(test_texts()))
    assert not result.scores[:, 7].any()
    assert "Training examples without a finite gradient count zero: 7 (at 2 of 2 checkpoints)." in result.notes
    whole = quiet(callbacks=[TracInCallback(tmp_path / "whole", dtype="float32")])
    pl.seed_everything(0, verbose=False)
    whole.fit(Toy(), loader(shuffle=True))
    others = [index for index in range(N_TRAIN) if index != 7]
    torch.testing.assert_close(
        result.scores[:, others], whole.influence(loader(test_texts())).scores[:, others], rtol=1e-5, atol=1e-9
    )


def test_what_has_diverged_ends_the_recording(tmp_path):
    class Diverged(Toy):
        def influence_loss(self, batch):
            late = not self.training and self.trainer.global_step > 5
            return super().influence_loss(batch) * (torch.nan if late else 1.0)

    expected, _, _ = weights_after(Toy, [])
    found, said, _ = weights_after(Diverged, [TracInCallback(tmp_path / "trace")])
    assert_same(found, expected)
    assert "of 20 of 20 training examples is NaN or infinite at step 10" in said[0]


def test_a_word_that_no_file_can_hold(tmp_path):
    expected, _, _ = weights_after(Toy, [])
    found, *_ = weights_after(Surrogate, [TracInCallback(tmp_path / "trace", cache="training")])
    assert_same(found, expected)
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints][:1] == [5]


def test_validation_batches_of_another_form(tmp_path):
    class Validated(Toy):
        def validation_step(self, batch, batch_idx):
            ids, _ = batch
            self(ids)

    callback = TracInCallback(tmp_path / "trace", log_examples=2)

    def see(*_):
        raise KeyError("labels")

    expected, _, _ = weights_after(Validated, [], tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_tracin.recording.validation_log.ValidationLog.see", see)
        found, said, _ = weights_after(Validated, [callback], tmp_path / "b")
    assert_same(found, expected)
    assert "log_examples stopped at step 5, because of KeyError: 'labels'" in said[0]
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == [5, 10]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:This fit was killed")
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("cache", ["checkpoint", "training"])
def test_a_fit_that_is_killed_while_it_stores_gradients_has_saved_its_epoch(tmp_path, monkeypatch, cache, epoch):
    """ModelCheckpoint comes first, wherever it stands in the list, and what it saved goes on with the whole trace."""

    class Killed(BaseException):
        pass

    def fit(name, epochs, cache=cache, **arguments):
        pl.seed_everything(0, verbose=False)
        ours = [TracInCallback(tmp_path / name / part, cache=cache, dtype="float32") for part in ("a", "b")]
        if cache == "training":
            del ours[1]  # there can be one of them
        saver = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        callbacks = [ours[0], saver, *ours[1:]]
        trainer = quiet(callbacks=callbacks, enable_checkpointing=True, max_epochs=epochs)
        listed = list(trainer.callbacks)
        try:
            trainer.fit(Reproducible(), loader(), **arguments)
        finally:
            assert trainer.callbacks == listed
        return trainer

    save = files.save_file

    def kill(tensors, path, **options):
        if f"step-{5 * (epoch + 1):09d}" in str(path) and path.parent.name.startswith("words"):
            raise Killed
        save(tensors, path, **options)

    expected = fit("whole", 3).influence(loader(test_texts()))
    monkeypatch.setattr(files, "save_file", kill)
    with pytest.raises(Killed):
        fit("killed", 3)
    monkeypatch.undo()
    assert [each.step for each in Trace(tmp_path / "killed" / "a").checkpoints] == [5, 10][:epoch]
    resumed = fit("killed", 3, ckpt_path=tmp_path / "killed" / f"epoch={epoch}.ckpt")
    checkpoints = Trace(tmp_path / "killed" / "a").checkpoints
    assert [step[0] for each in checkpoints for step in each.steps] == list(range(15))
    assert [(each.step, each.epoch) for each in checkpoints] == [(5, 0), (10, 1), (15, 2)]
    if cache == "checkpoint":
        found = resumed.influence(loader(test_texts()))
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-9)
    else:  # what training gave in that epoch is gone: it is that of a pass
        fit("pass", 3, cache="checkpoint")
        found, passed = (
            Trace(tmp_path / name / "a").checkpoints[epoch].gradients(site_of(checkpoints[0], "tracin-we")).read(0)
            for name in ("killed", "pass")
        )
        torch.testing.assert_close(found.norms, passed.norms, rtol=1e-5, atol=1e-9)
