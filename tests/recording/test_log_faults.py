"""What goes wrong with the log of validations ends the log, not the recording."""

from __future__ import annotations

import pytest
import torch
from logged_fits import Validated, assert_scores, brute_scores, examples_of, fit, logged, steps_of
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from toy import EPOCHS, STEPS_PER_EPOCH, loader, quiet, test_texts, texts

from lightning_tracin import Trace, TracInCallback, influence


class Away(CSVLogger):
    """A server that cannot be reached, once there is something of ours to log."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("tracin/") for name in metrics):
            raise ConnectionError("server away")
        super().log_metrics(metrics, step)


class Silent(Validated):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass


def unlabelled():
    return DataLoader(TensorDataset(texts().tensors[0]), 4)


@pytest.mark.parametrize(
    ("logger", "val", "step"),
    [
        (Away, None, STEPS_PER_EPOCH),
        (None, unlabelled, STEPS_PER_EPOCH),
        (None, lambda: [loader(test_texts()), unlabelled()], STEPS_PER_EPOCH),
        (None, lambda: DataLoader(test_texts(), batch_size=None), STEPS_PER_EPOCH),
    ],
    ids=["logger", "unlabelled", "one of two", "no batches"],
)
def test_a_fault_of_the_log_ends_the_log_alone(tmp_path, logger, val, step):
    with pytest.warns(UserWarning, match=f"log_examples stopped at step {step}, because of .* recording .* go on"):
        trainer = fit(
            tmp_path,
            Silent(),
            None if val is None else val(),
            logger=None if logger is None else logger(tmp_path),
            trainer={"num_sanity_val_steps": 0},
            on_error="warn",
        )
    trace = Trace(tmp_path / "trace")
    assert [each.step for each in trace.checkpoints] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    assert trace.incomplete is None
    found = influence(quiet(), loader(test_texts()), trainer.lightning_module, trace=trace)
    torch.testing.assert_close(found.scores.double(), brute_scores(trace, EPOCHS), rtol=1e-4, atol=1e-6)


def test_on_error_raise_lets_a_fault_of_the_log_end_the_fit(tmp_path):
    with pytest.raises(ConnectionError, match="server away"):
        fit(tmp_path, logger=Away(tmp_path))


@pytest.mark.parametrize("log_examples", [[0, 3], [0]])
def test_validation_examples_without_a_finite_gradient_are_left_out(tmp_path, log_examples):
    """Their losses are finite: the square root of 0 has no finite gradient."""

    class Rooted(Validated):
        def influence_loss(self, batch):
            losses = super().influence_loss(batch)
            rooted = batch[0][(batch[0] == test_texts().tensors[0][0]).all(1)]
            if len(rooted):
                losses = losses + (self.embedding(rooted).sum() * 0).abs().sqrt() * (len(losses) == 1)
            return losses

        def training_step(self, batch, batch_idx):
            return super().influence_loss(batch).mean()

    with pytest.warns(UserWarning, match="The gradient of validation example 0 is NaN or infinite.* is not explained"):
        trainer = fit(tmp_path, Rooted(), log_examples=log_examples)
    trace = Trace(tmp_path / "trace")
    assert len(trace.checkpoints) == EPOCHS
    if len(log_examples) == 1:
        return
    rows = logged(trainer)
    for epoch, step in enumerate(steps_of(rows)):
        own = [row for row in rows if row["step"] == step]
        assert examples_of(own) == [(0, 3)]
        assert_scores(own, brute_scores(trace, epoch + 1))


def test_a_recording_that_ends_before_the_first_checkpoint_says_that_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_tracin.recording.recorder.Recorder.end_backward", _fail)
    with pytest.warns(UserWarning, match="stopped recording at step 0.*has no checkpoint, so that there is"):
        fit(tmp_path, on_error="warn", log_examples=0)


def _fail(recorder, trainer):
    raise OSError("disk gone")


def test_two_callbacks_that_log_are_refused(tmp_path):
    """Their tables, curves and pages would have the same names."""
    others = [TracInCallback(tmp_path / name, log_examples=1) for name in ("a", "b")]
    with pytest.raises(ValueError, match="can have one TracInCallback with log_examples, but got several"):
        quiet(callbacks=others).fit(Validated(), loader(), loader(test_texts()))
    assert not (tmp_path / "a").exists()
