"""Callbacks of several fits: given to another trainer, made anew by the module, or to another process."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import pytorch_lightning as pl
import torch
from toy import N_TRAIN, Toy, fitted, loader, quiet, test_texts, texts

from lightning_tracin import Trace, TracInCallback


def test_a_callback_can_be_pickled_after_a_fit_and_fits_again(tmp_path):
    trainer = fitted(
        tmp_path / "trace", data=loader(collate_fn=lambda rows: [torch.stack(each) for each in zip(*rows, strict=True)])
    )
    (callback,) = trainer.callbacks
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert other.plan == callback.plan
        assert other.state_key == callback.state_key
        assert other.trace is None
        with pytest.raises(FileExistsError, match="holds the trace of another fit"):
            quiet(callbacks=[other]).fit(Toy(), loader())
    assert trainer.influence(loader(test_texts())).scores.shape[1] == N_TRAIN


def test_each_trainer_is_answered_from_its_own_fit(tmp_path):
    callback = TracInCallback(dtype="float32", on_error="raise")
    first, second = (quiet(callbacks=[callback], default_root_dir=tmp_path / name) for name in ("first", "second"))
    pl.seed_everything(0, verbose=False)
    first.fit(Toy(), loader())
    expected = first.influence(loader(test_texts())).scores
    second.fit(Toy(), loader(texts(16, seed=9)))
    assert torch.equal(first.influence(loader(test_texts())).scores, expected)
    assert second.influence(loader(test_texts())).scores.shape[1] == 16
    other = quiet(callbacks=[callback])  # has not fitted: the last fit counts
    assert other.influence(loader(test_texts()), second.lightning_module).scores.shape[1] == 16
    first.fit_loop.max_epochs = 3
    first.fit(first.lightning_module, loader())
    assert [each.step for each in Trace(tmp_path / "first" / "trace").checkpoints] == [5, 10, 15]


def test_a_trace_that_another_trainers_fit_has_replaced_is_not_answered_from(tmp_path):
    callback = TracInCallback(tmp_path / "trace", overwrite=True)
    first, second = (quiet(callbacks=[callback]) for _ in range(2))
    first.fit(Toy(), loader())
    second.fit(Toy(), loader(texts(16, seed=9)))
    with pytest.raises(ValueError, match="Another fit has replaced the trace"):
        first.influence(loader(test_texts()))


def test_a_callback_that_the_module_makes_anew_goes_on(tmp_path):
    class Making(Toy):
        def configure_callbacks(self):
            return [TracInCallback(tmp_path / "trace", dtype="float32", on_error="raise")]

        def test_step(self, batch, batch_idx):
            pass

    pl.seed_everything(0, verbose=False)
    trainer, module = quiet(), Making()
    trainer.fit(module, loader())
    expected = trainer.influence(loader(test_texts())).scores
    trainer.test(module, loader(test_texts()), verbose=False)
    assert torch.equal(trainer.influence(loader(test_texts())).scores, expected)
    assert trainer.callbacks[0].trace.id == Trace(tmp_path / "trace").id
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    trace = Trace(tmp_path / "trace")
    assert [each.step for each in trace.checkpoints] == [5, 10, 15]
    assert not trace.header.notes


def test_no_trainer_is_kept_alive(tmp_path):
    callback = TracInCallback(tmp_path / "trace", cache="on_demand")
    trainer = quiet(callbacks=[callback])
    trainer.fit(Toy(), loader())
    gone = weakref.ref(trainer)
    del trainer, callback
    gc.collect()
    assert gone() is None
