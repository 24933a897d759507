"""One fit or query at a time writes into a trace; the others are refused, and nothing of it is lost."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytorch_lightning as pl
import torch
from toy import Toy, fitted, loader, quiet, site_of, test_texts

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.querying import filling
from lightning_tracin.storage.files import read_json, write_json
from lightning_tracin.storage.verification import verify

REFUSED = r"Another fit or query writes into the trace in .*/trace now.*another dirpath, or wait"


class Doing(pl.Callback):
    """Does something once, as the second epoch begins."""

    def __init__(self, what):
        self.what = what

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.what()


def fit_with(path, what, **options):
    """Fit into a folder, and do something meanwhile."""
    pl.seed_everything(0, verbose=False)
    trainer = quiet(
        callbacks=[TracInCallback(path, **{"dtype": "float32", "on_error": "raise", **options}), Doing(what)]
    )
    trainer.fit(Toy(), loader(shuffle=True))
    return trainer


def scores_of(path, **options):
    return quiet().influence(loader(test_texts()), Toy(), trace=path, **options).scores


def whole(path) -> bool:
    return not any(problem for _, problem in verify(Trace(path)))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fit_into_the_folder_of_a_running_one_is_refused(tmp_path, trace, overwrite):
    def another():
        with pytest.raises(BlockingIOError, match=REFUSED):
            fitted(tmp_path / "trace", overwrite=overwrite)

    fit = fit_with(tmp_path / "trace", another)
    assert fit.callbacks[0].trace.id == Trace(tmp_path / "trace").id
    assert [checkpoint.step for checkpoint in Trace(tmp_path / "trace").checkpoints] == [5, 10]
    assert whole(tmp_path / "trace")


def test_the_lock_of_a_killed_process_is_freed_and_reading_needs_none(tmp_path):
    context = multiprocessing.get_context("fork")
    began = context.Event()

    def fit_and_hang():
        fit_with(tmp_path / "trace", lambda: (began.set(), time.sleep(60)))

    child = context.Process(target=fit_and_hang)
    child.start()
    assert began.wait(60)
    with pytest.raises(BlockingIOError, match=REFUSED):
        fitted(tmp_path / "trace", overwrite=True)
    assert scores_of(tmp_path / "trace").abs().sum() > 0
    child.kill()
    child.join()
    fitted(tmp_path / "trace", overwrite=True)
    assert [checkpoint.step for checkpoint in Trace(tmp_path / "trace").checkpoints] == [5, 10]


class NotFinite(Toy):
    """Is refused before training."""

    def influence_loss(self, batch):
        return super().influence_loss(batch) * torch.nan


def fail(error):
    raise error


ENDINGS = {
    "well": lambda path: fitted(path),
    "before training": lambda path: fitted(path, NotFinite()),
    "by an error": lambda path: fit_with(path, lambda: fail(RuntimeError("enough"))),
    "by hand": lambda path: fit_with(path, lambda: fail(KeyboardInterrupt())),
}


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
def test_a_fit_lets_go_of_the_folder_however_it_ends(tmp_path, end):
    first = None
    try:
        first = end(tmp_path / "trace")
    except BaseException as error:
        first = error  # which keeps all of the fit's objects alive
    fitted(tmp_path / "trace", overwrite=True)
    assert first is not None
    assert whole(tmp_path / "trace")
    assert not (tmp_path / "trace" / ".lock").exists()


def test_one_callback_serves_several_fits(tmp_path):
    callback = TracInCallback(tmp_path / "trace", overwrite=True)
    for _ in range(2):
        quiet(callbacks=[callback]).fit(Toy(), loader())
    assert callback.trace.id == Trace(tmp_path / "trace").id


def test_a_query_is_refused_while_another_fills_the_trace(tmp_path):
    fit = fitted(tmp_path / "trace", cache="on_demand")
    refused = []

    class Asking(Toy):
        """In the middle of its own filling, has another thread ask too."""

        def influence_loss(self, batch):
            if not refused:
                with ThreadPoolExecutor() as threads, pytest.raises(BlockingIOError, match=REFUSED) as error:
                    threads.submit(scores_of, tmp_path / "trace", train_dataloaders=loader()).result()
                refused.append(error)
            return super().influence_loss(batch)

    asked = quiet().influence(loader(test_texts()), Asking(), trace=fit.callbacks[0].trace, train_dataloaders=loader())
    assert refused
    assert whole(tmp_path / "trace")
    assert torch.equal(scores_of(tmp_path / "trace"), asked.scores)


def test_what_another_query_has_stored_meanwhile_is_not_computed_again(tmp_path, monkeypatch):
    fit = fitted(tmp_path / "trace", cache="on_demand")
    locked = filling.locked

    def late(*arguments, **options):
        monkeypatch.setattr(filling, "locked", locked)
        scores_of(tmp_path / "trace", train_dataloaders=loader())
        written.extend(index.stat().st_mtime_ns for index in indices())
        return locked(*arguments, **options)

    def indices():
        return sorted((tmp_path / "trace").rglob("index.json"))

    written: list[int] = []
    monkeypatch.setattr(filling, "locked", late)
    fit.influence(loader(test_texts()))
    assert [index.stat().st_mtime_ns for index in indices()] == written
    assert len(written) == 3  # of two checkpoints' gradients, and of the texts


def test_a_query_inside_a_fit_may_fill_its_trace(tmp_path):
    found = []
    path = tmp_path / "trace"
    fit_with(path, lambda: found.append(scores_of(path, train_dataloaders=loader())), cache="on_demand")
    assert found[0].abs().sum() > 0
    trace = Trace(path)
    assert [each.has_gradients(site_of(trace, "tracin-we")) for each in trace.checkpoints] == [True, False]


def test_a_fit_does_not_write_into_a_trace_that_was_put_in_place_of_its_own(tmp_path):
    header = tmp_path / "trace" / "trace.json"

    def replace():
        write_json(header, {**read_json(header), "id": "another"})

    with pytest.raises(ValueError, match="Another fit has replaced the trace"):
        fit_with(tmp_path / "trace", replace)
    assert [checkpoint.step for checkpoint in Trace(tmp_path / "trace").checkpoints] == [5]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", lambda *_: fail(OSError(number, "no locks")))
    with pytest.warns(UserWarning, match="cannot lock files.*no locks.*take care"):
        fitted(tmp_path / "trace")
    assert whole(tmp_path / "trace")
