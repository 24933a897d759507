"""What a fit leaves behind, and that it trains as it would without us."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR
from toy import (
    N_TRAIN,
    STEPS_PER_EPOCH,
    Toy,
    environment,
    fitted,
    loader,
    mean_rate,
    quiet,
    same_weights,
    site_of,
    test_texts,
    texts,
)
from variants import Failing, Plain, resumable

from lightning_tracin import Trace, TracInCallback, TracInWE


class Watcher(Callback):
    """Keeps the weights at the end of each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append(copy.deepcopy(pl_module.state_dict()))


@pytest.mark.parametrize(
    ("module", "workers"),
    [(Toy, 0), (Plain, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((Toy, 2), (Plain, 0)))],
)
@pytest.mark.parametrize("options", [{}, {"cache": "on_demand"}, {"every_n_train_steps": 2}], ids=str)
def test_training_is_bit_for_bit_what_it_is_without_the_callback(tmp_path, module, workers, options):
    outcomes = []
    for callbacks in ([], [TracInCallback(tmp_path / "trace", **options)]):
        pl.seed_everything(3, verbose=False)
        model = module()
        trainer = quiet(callbacks=callbacks, accumulate_grad_batches=2)
        trainer.fit(model, loader(shuffle=True, batch_size=3, num_workers=workers))
        flags = [part.training for part in model.modules()]
        outcomes.append((copy.deepcopy(model.state_dict()), dict(trainer.logged_metrics), flags))
    (weights, metrics, flags), (own_weights, own_metrics, own_flags) = outcomes
    assert same_weights(weights, own_weights)
    assert metrics.keys() == own_metrics.keys()
    assert all(torch.equal(metrics[name], own_metrics[name]) for name in metrics)
    assert flags == own_flags


def test_a_fit_after_influence_goes_on_as_if_it_had_not_been_asked(tmp_path):
    outcomes = []
    for asks in (False, True):
        trainer = fitted(tmp_path / f"{asks}")
        if asks:
            trainer.influence(loader(test_texts()))
            trainer.self_influence()
        model = trainer.lightning_module
        pl.seed_everything(1, verbose=False)
        quiet(max_epochs=1).fit(model, loader())
        outcomes.append(model.state_dict())
    assert same_weights(*outcomes)


def test_the_users_own_predict_step_and_callbacks_are_back_after_influence(tmp_path):
    class Predicting(Toy):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    trainer = fitted(tmp_path / "trace", Predicting())
    callbacks = list(trainer.callbacks)
    trainer.influence(loader(test_texts()))
    assert trainer.callbacks == callbacks
    assert "predict_step" not in vars(trainer.lightning_module)
    assert trainer.predict(trainer.lightning_module, loader(test_texts()))[0].shape == (4, 3)


def test_checkpoints_hold_the_weights_and_the_mean_rate_since_the_last(tmp_path):
    watcher = Watcher()
    pl.seed_everything(0, verbose=False)
    quiet(callbacks=[watcher, TracInCallback(tmp_path / "trace")]).fit(Toy(), loader())
    checkpoints = Trace(tmp_path / "trace").checkpoints
    assert [(each.step, each.epoch) for each in checkpoints] == [(STEPS_PER_EPOCH, 0), (2 * STEPS_PER_EPOCH, 1)]
    assert all(same_weights(each.weights(), seen) for each, seen in zip(checkpoints, watcher.weights, strict=True))
    assert checkpoints[0].learning_rate == pytest.approx(mean_rate(0, STEPS_PER_EPOCH))
    assert checkpoints[1].learning_rate == pytest.approx(mean_rate(STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH))


def test_rates_count_optimizer_steps_not_batches(tmp_path):
    fitted(tmp_path / "trace", trainer={"accumulate_grad_batches": 2}, data=loader())
    checkpoints = Trace(tmp_path / "trace").checkpoints
    assert [each.step for each in checkpoints] == [3, 6]
    assert checkpoints[1].learning_rate == pytest.approx(mean_rate(3, 6))


def test_a_schedule_that_ends_at_zero_does_not_zero_the_last_checkpoint(tmp_path):
    class Decaying(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    fitted(tmp_path / "trace", Decaying())
    assert Trace(tmp_path / "trace").checkpoints[-1].learning_rate == pytest.approx(0.3)


def test_a_step_counts_once_however_often_it_asks_for_gradients(tmp_path):
    """L-BFGS asks several times in a step, and less often the nearer it is."""
    asked = []

    class Searching(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.LBFGS(self.parameters(), lr=0.4, max_iter=4, line_search_fn="strong_wolfe")
            return [optimizer], [{"scheduler": StepLR(optimizer, 1, gamma=0.5), "interval": "step"}]

        def on_before_optimizer_step(self, optimizer):
            asked.append(self.trainer.global_step)

    quiet(callbacks=[TracInCallback(tmp_path / "trace")]).fit(Searching(), loader())
    assert len(asked) > 2 * len(set(asked))
    for each, start in zip(Trace(tmp_path / "trace").checkpoints, (0, 5), strict=True):
        assert [step for step, *_ in each.steps] == list(range(start, start + 5))
        assert each.learning_rate == pytest.approx(sum(0.4 * 0.5**step for step in range(start, start + 5)) / 5)


def test_rates_are_those_of_the_group_and_the_optimizer_that_hold_the_layer(tmp_path):
    class TwoOptimizers(Toy):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.influence_loss(batch).mean()
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            groups = [{"params": self.hidden.parameters(), "lr": 0.05}, {"params": self.head.parameters(), "lr": 0.02}]
            return [torch.optim.SGD(self.embedding.parameters(), 0.3), torch.optim.Adam(groups)]

    fitted(tmp_path / "trace", TwoOptimizers())
    checkpoint = Trace(tmp_path / "trace").checkpoints[0]
    assert checkpoint.learning_rate_of(site_of(checkpoint, "tracin-we")) == pytest.approx(0.3)
    assert checkpoint.learning_rate_of(site_of(checkpoint, "tracin-last")) == pytest.approx(0.02)


def test_a_frozen_embedding_counts_at_the_rate_of_what_is_trained(tmp_path):
    module = Toy()
    module.embedding.requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.25)
    trainer = fitted(tmp_path / "trace", module)
    assert Trace(tmp_path / "trace").checkpoints[0].learning_rate == pytest.approx(0.25)
    assert trainer.influence(loader(test_texts())).scores.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "trainer", "steps"),
    [
        ({"every_n_train_steps": 3}, {}, [3, 6, 9]),
        ({"every_n_epochs": 2}, {"max_epochs": 5}, [10, 20]),
        ({}, {"max_steps": 7}, [5, 7]),
        ({}, {"limit_train_batches": 2}, [2, 4]),
        ({}, {"overfit_batches": 1}, [1, 2]),
    ],
    ids=str,
)
def test_when_checkpoints_are_taken(tmp_path, options, trainer, steps):
    fit = fitted(tmp_path / "trace", data=loader(), trainer=trainer, **options)
    assert [each.step for each in Trace(tmp_path / "trace").checkpoints] == steps
    assert fit.influence(loader(test_texts())).scores.shape[1] == N_TRAIN


def test_a_fit_too_short_for_a_checkpoint_says_so(tmp_path):
    with pytest.warns(UserWarning, match="before the first checkpoint"):
        fit = fitted(tmp_path / "trace", every_n_epochs=5)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        fit.influence(loader(test_texts()))


def test_weights_are_as_trained_not_averaged(tmp_path):
    averaging = getattr(pl.callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("EMAWeightAveraging came with pytorch-lightning 2.6")
    watcher = Watcher()
    callbacks = [watcher, averaging(decay=0.5), TracInCallback(tmp_path / "trace")]
    quiet(callbacks=callbacks).fit(Toy(), loader())
    checkpoints = Trace(tmp_path / "trace").checkpoints
    assert all(same_weights(each.weights(), seen) for each, seen in zip(checkpoints, watcher.weights, strict=True))


def test_tied_weights_are_stored_once_and_come_back_under_both_names(tmp_path):
    class Tied(Toy):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 40, bias=False)
            self.out.weight = self.embedding.weight

        def influence_loss(self, batch):
            ids, _ = batch
            return functional.cross_entropy(self.out(self.embedding(ids).mean(1)), ids[:, 0], reduction="none")

    fitted(tmp_path / "trace", Tied())
    checkpoint = Trace(tmp_path / "trace").checkpoints[0]
    weights = checkpoint.weights()
    assert torch.equal(weights["out.weight"], weights["embedding.weight"])
    size = (checkpoint.path / "weights.safetensors").stat().st_size
    assert size < 2 * weights["embedding.weight"].nbytes + sum(w.nbytes for w in weights.values())


def test_a_trace_is_json_and_safetensors(toy):
    files = [file for file in toy.callbacks[0].trace.path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert not [file for file in files if ".partial" in str(file)]


@pytest.mark.slow
def test_another_process_reads_the_same_scores(toy, tmp_path):
    expected = toy.influence(loader(test_texts())).scores
    script = (
        "import sys, torch; from toy import Toy, loader, quiet, test_texts\n"
        "torch.save(quiet().influence(loader(test_texts()), Toy(), trace=sys.argv[1]).scores, sys.argv[2])\n"
    )
    arguments = [sys.executable, "-c", script, str(toy.callbacks[0].trace.path), str(tmp_path / "scores.pt")]
    subprocess.run(arguments, check=True, env=environment(), capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "scores.pt", weights_only=True), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [5, 10], ids=["before the last checkpoint", "at the last checkpoint"])
def test_a_resumed_fit_continues_its_trace(tmp_path, step):
    whole = resumable(tmp_path / "whole", 4)
    resumable(tmp_path / "cut", 2)
    resumed = resumable(tmp_path / "cut", 4, ckpt_path=str(tmp_path / "saved-cut" / f"step={step}.ckpt"))
    expected, found = (Trace(tmp_path / name).checkpoints for name in ("whole", "cut"))
    assert [each.step for each in found] == [5, 10, 15, 20]
    assert [each.learning_rate for each in found] == pytest.approx([each.learning_rate for each in expected])
    scores = [each.influence(loader(test_texts())).scores for each in (whole, resumed)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_fit_that_is_resumed_with_other_arguments_is_refused(tmp_path):
    resumable(tmp_path / "cut", 1)
    with pytest.raises(ValueError, match="Resume with the same arguments"):
        resumable(tmp_path / "cut", 2, dtype="float16", ckpt_path=str(tmp_path / "saved-cut" / "step=5.ckpt"))
    assert [each.step for each in Trace(tmp_path / "cut").checkpoints] == [5]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_without_its_trace_says_what_is_missing(tmp_path):
    resumable(tmp_path / "cut", 1)
    shutil.rmtree(tmp_path / "cut")
    with pytest.warns(UserWarning, match="will be missing from the scores"):
        resumed = resumable(tmp_path / "cut", 2, ckpt_path=str(tmp_path / "saved-cut" / "step=5.ckpt"))
    assert [each.step for each in Trace(tmp_path / "cut").checkpoints] == [10]
    assert "It begins at step 5 of training" in str(resumed.influence(loader(test_texts())).notes)


def test_a_fit_that_is_resumed_from_one_without_the_callback_says_what_is_missing(tmp_path):
    """As does one of a trainer that has trained before; not one that begins."""
    before = quiet(max_epochs=1)
    before.fit(Toy(), loader())
    before.save_checkpoint(tmp_path / "one.ckpt")
    message = f"goes on at step {STEPS_PER_EPOCH}, but the trace in .* has nothing to go on with"
    resumed = quiet(callbacks=[TracInCallback(tmp_path / "resumed", dtype="float32", on_error="raise")])
    with pytest.warns(UserWarning, match=message):
        resumed.fit(Toy(), loader(), ckpt_path=tmp_path / "one.ckpt")
    before.callbacks.append(TracInCallback(tmp_path / "added", cache="on_demand"))
    before.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match=message):
        before.fit(before.lightning_module, loader())
    for name, first in (("resumed", STEPS_PER_EPOCH), ("added", 0)):  # a second fit begins its schedule again
        trace = Trace(tmp_path / name)
        assert [each.step for each in trace.checkpoints] == [2 * STEPS_PER_EPOCH]
        assert trace.checkpoints[0].learning_rate == pytest.approx(mean_rate(first, first + STEPS_PER_EPOCH))
        assert trace.header.notes == (
            f"The trace is incomplete. It begins at step {STEPS_PER_EPOCH} of training: scores lack what came before.",
        )
    assert trace.header.notes[0] in resumed.influence(loader(test_texts())).notes
    assert not Trace(fitted(tmp_path / "whole", cache="on_demand").callbacks[0].trace.path).header.notes


def test_predicting_from_an_earlier_checkpoint_leaves_the_trace_alone(tmp_path):
    trainer = resumable(tmp_path / "trace", 2)
    before = trainer.influence(loader(test_texts())).scores
    trainer.predict(trainer.lightning_module, loader(), ckpt_path=str(tmp_path / "saved-trace" / "step=5.ckpt"))
    assert torch.equal(trainer.influence(loader(test_texts())).scores, before)


def test_a_second_fit_into_a_trace_is_refused_and_loses_nothing(tmp_path):
    first = fitted(tmp_path / "trace")
    expected = first.influence(loader(test_texts())).scores
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fitted(tmp_path / "trace")
    assert torch.equal(first.influence(loader(test_texts())).scores, expected)


def test_overwriting_replaces_the_trace_and_nothing_else(tmp_path):
    fitted(tmp_path / "trace")
    (tmp_path / "trace" / "notes.txt").write_text("mine")
    before = Trace(tmp_path / "trace").id
    fitted(tmp_path / "trace", trainer={"max_epochs": 1}, overwrite=True)
    trace = Trace(tmp_path / "trace")
    assert trace.id != before
    assert len(trace.checkpoints) == 1
    assert (tmp_path / "trace" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_cache_pass_that_is_cut_off_leaves_the_checkpoints_before_it(tmp_path, error):
    # An epoch after the first checkpoint, in the middle of the second's pass.
    first = tmp_path / "trace" / "checkpoints" / f"step-{STEPS_PER_EPOCH:09d}"
    data = Failing(first, N_TRAIN + 9, error)
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fitted(tmp_path / "trace", data=loader(data))
    trace = Trace(tmp_path / "trace")
    assert [each.step for each in trace.checkpoints] == [STEPS_PER_EPOCH]
    assert not list(tmp_path.rglob("*.partial"))
    assert quiet().influence(loader(test_texts()), Toy(), trace=trace).scores.abs().sum() > 0


def test_the_trace_lies_below_the_loggers_folder_by_default(tmp_path):
    logger = CSVLogger(tmp_path, name="news")
    trainer = fitted(None, trainer={"logger": logger})
    assert trainer.callbacks[0].trace.path == tmp_path / "news" / "version_0" / "trace"


def test_the_trace_lies_below_the_root_folder_without_a_logger(tmp_path):
    trainer = fitted(None, trainer={"default_root_dir": tmp_path})
    assert trainer.callbacks[0].trace.path == tmp_path / "trace"


def test_a_fast_dev_run_records_nothing(tmp_path):
    fitted(tmp_path / "trace", trainer={"fast_dev_run": True})
    assert not (tmp_path / "trace").exists()


def test_what_is_stored_can_be_read_by_hand(toy):
    """The trace format of docs/trace.md."""
    from safetensors.torch import load_file

    path = toy.callbacks[0].trace.path
    header = json.loads((path / "trace.json").read_text())
    found = [(site["name"], site["layer"], site["shape"]) for site in header["sites"]]
    assert found == [("tracin-we", "embedding", "words"), ("tracin-last", "head", "factors")]
    shard = load_file(path / "checkpoints" / "step-000000005" / "words" / "00000.safetensors")
    tokens = torch.repeat_interleave(shard["tokens"], shard["offsets"].diff())
    ids = texts().tensors[0]
    for example in range(N_TRAIN):
        assert set(tokens[shard["examples"] == example].tolist()) == set(ids[example].tolist()) - {0}


class Stepless(torch.optim.AdamW):
    """Counts its steps elsewhere than in the state, as some fused and schedule-free optimizers do."""

    def step(self, closure=None):
        for state in self.state.values():
            state["step"] = torch.tensor(1.0)
        loss = super().step(closure)
        for state in self.state.values():
            del state["step"]
        return loss


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "Stepless"])
def test_preconditioning_needs_adam(tmp_path, name):
    optimizer = Stepless if name == "Stepless" else getattr(torch.optim, name, None)
    if optimizer is None:
        pytest.skip(f"this torch has no {name}")
    module = Toy()
    module.configure_optimizers = lambda: optimizer(module.parameters(), 0.1)
    trainer = fitted(tmp_path / "trace", module)
    with pytest.raises(ValueError, match="second moments"):
        trainer.influence(loader(test_texts()), method=TracInWE(precondition="adam"))
