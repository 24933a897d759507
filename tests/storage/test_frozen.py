"""Frozen weights are stored once, beside the checkpoints, and are never those of another moment."""

from __future__ import annotations

import shutil

import pytest
import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients, relative_error
from families import FAMILIES
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from toy import STEPS_PER_EPOCH, Toy, fitted, loader, mean_rate, quiet, same_weights, test_texts, texts

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.storage.verification import verify


class Watcher(pl.Callback):
    """Keeps the weights at the end of each epoch."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


class Held(Toy):
    """Keeps its embedding as it is, until an epoch; no dropout, so that it can be resumed."""

    def __init__(self, until: int = 99, since: int = 0) -> None:
        super().__init__()
        self.dropout.p = 0.0
        self.until, self.since = until, since

    def on_train_epoch_start(self):
        self.embedding.requires_grad_(not self.since <= self.current_epoch < self.until)


class Twin(Held):
    """A frozen copy follows a layer in each step, and half of another weight is set by hand."""

    def __init__(self):
        super().__init__(until=0)
        self.teacher = torch.nn.Linear(8, 8).requires_grad_(False)
        self.bias = torch.nn.Parameter(torch.zeros(4), requires_grad=False)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.teacher.weight.lerp_(self.hidden.weight.detach(), 0.1)
        if self.global_step == 12:
            self.bias.data[:2] = 1.0


class Tied(Held):
    """Its frozen table stands in the state dict twice."""

    def __init__(self):
        super().__init__()
        self.output = torch.nn.Linear(8, 40, bias=False)
        self.output.weight = self.embedding.weight


def fit(path, module, *, data=None, epochs=4, ckpt_path=None, in_logs=False, **options):
    pl.seed_everything(0, verbose=False)
    version = int(path.parent.name[-1]) if in_logs else None
    logger = CSVLogger(path.parents[2], "logs", version) if in_logs else False
    watcher = Watcher()
    saver = ModelCheckpoint(path.parent / f"saved-{path.name}", save_top_k=-1, filename="{step}")
    callbacks = [
        TracInCallback(None if in_logs else path, dtype="float32", on_error="raise", **options),
        watcher,
        saver,
    ]
    trainer = quiet(callbacks=callbacks, max_epochs=epochs, enable_checkpointing=True, logger=logger)
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return trainer, watcher.weights


def shared_files(path):
    return sorted(path.glob("frozen-*.safetensors"))


def problems(path):
    return [problem for _, problem in verify(Trace(path)) if problem]


def assert_recorded(path, weights):
    found = [each.weights() for each in Trace(path).checkpoints]
    assert len(found) == len(weights) > 0
    assert all(same_weights(*each) for each in zip(found, weights, strict=True))
    assert problems(path) == []


MODULES = {
    "never": (lambda: Held(until=0), 0),
    "always": (Held, 1),
    "thawed": (lambda: Held(until=2), 1),
    "frozen later": (lambda: Held(since=2), 1),
    "frozen again": (lambda: Held(until=3, since=2), 1),
    "moved by hand": (Twin, 1),
    "tied": (Tied, 1),
}


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
@pytest.mark.parametrize(("make", "n_files"), MODULES.values(), ids=MODULES)
def test_each_checkpoint_has_the_weights_of_its_moment(tmp_path, make, n_files, cache):
    module = make()
    _, weights = fit(tmp_path / "trace", module, cache=cache)
    assert_recorded(tmp_path / "trace", weights)
    assert len(shared_files(tmp_path / "trace")) == n_files


def test_scores_are_those_of_the_definition(tmp_path):
    trainer, weights = fit(tmp_path / "trace", Held(), epochs=2)
    sides = []
    for data in (test_texts(), texts()):
        of_side = []
        for state in weights:
            module = Held()
            module.load_state_dict(state)
            losses, singles = module.influence_loss, loader(data, batch_size=1)
            of_side.append(dense_gradients(module, module.embedding, singles, lambda b, f=losses: f(b).sum()))
        sides.append(of_side)
    rates = [mean_rate(STEPS_PER_EPOCH * epoch, STEPS_PER_EPOCH * (epoch + 1)) for epoch in range(2)]
    scores = trainer.influence(loader(test_texts())).scores
    assert relative_error(scores, BruteForce(rates, *sides).scores()) < 1e-5
    other = quiet().influence(loader(test_texts()), Toy(), trace=tmp_path / "trace").scores  # its table is another
    torch.testing.assert_close(other, scores)


def test_lora_stores_its_model_once(tmp_path):
    family = FAMILIES["lora"]
    module = family.build()
    _, weights = fit(tmp_path / "trace", module, data=family.train_loader(), epochs=3, cache="on_demand")
    assert_recorded(tmp_path / "trace", weights)
    (shared,) = shared_files(tmp_path / "trace")
    own = [each.path / "weights.safetensors" for each in Trace(tmp_path / "trace").checkpoints]
    frozen = sum(each.nbytes for each in module.parameters() if not each.requires_grad)
    whole = sum(value.nbytes for value in weights[0].values())
    assert frozen < shared.stat().st_size < frozen + 20_000  # the names of the tensors
    assert all(each.stat().st_size < whole - frozen + 20_000 for each in own)


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_checkpoints_are_read_when_another_is_gone(tmp_path, removed):
    _, weights = fit(tmp_path / "trace", Held(until=2))
    recorded = Trace(tmp_path / "trace").checkpoints
    shutil.rmtree(recorded[removed].path)
    for number, checkpoint in enumerate(recorded):
        if number != removed:
            assert same_weights(checkpoint.weights(), weights[number])


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.parametrize("name", ["always", "thawed", "frozen later", "moved by hand"])
def test_a_resumed_fit_goes_on_with_the_files_or_branches_off(tmp_path, name):
    make = MODULES[name][0]
    _, straight = fit(tmp_path / "logs" / "version_0" / "trace", make(), in_logs=True)
    old, new = (tmp_path / "logs" / f"version_{number}" / "trace" for number in (0, 1))
    before = content(old)
    begun = old.parent / "saved-trace" / "step=10.ckpt"
    fit(new, make(), ckpt_path=begun, in_logs=True)
    assert_recorded(new, straight)
    assert content(old) == before
    fit(old, make(), ckpt_path=begun, in_logs=True)
    assert_recorded(old, straight)
    shutil.rmtree(old)
    assert_recorded(new, straight)


def test_a_file_that_no_checkpoint_shares_is_removed(tmp_path):
    fit(tmp_path / "trace", Held(since=2))
    assert len(shared_files(tmp_path / "trace")) == 1
    Trace(tmp_path / "trace").branch(tmp_path / "branch", 10)
    assert shared_files(tmp_path / "branch") == []
    assert problems(tmp_path / "branch") == []
    Trace(tmp_path / "trace").drop_checkpoints_after(10)
    assert shared_files(tmp_path / "trace") == []
    fit(tmp_path / "trace", Held(), overwrite=True)
    fit(tmp_path / "trace", Held(until=0), overwrite=True)
    assert shared_files(tmp_path / "trace") == []


def test_what_a_process_that_was_killed_has_left_is_replaced(tmp_path):
    """Killed after the file has its name, and before the checkpoint does; and before that."""
    _, straight = fit(tmp_path / "straight", Held())
    fit(tmp_path / "trace", Held(), epochs=1)
    partial = tmp_path / "trace" / "checkpoints" / "step-000000010.partial"
    partial.mkdir()
    (partial / "frozen.safetensors").write_bytes(b"half")
    (tmp_path / "trace" / f"frozen-{'0' * 32}.safetensors").write_bytes(b"an orphan")
    fit(tmp_path / "trace", Held(), ckpt_path=tmp_path / "saved-trace" / "step=5.ckpt")
    assert_recorded(tmp_path / "trace", straight)
    assert len(shared_files(tmp_path / "trace")) == 1
    assert not list((tmp_path / "trace").rglob("*.partial"))


def test_a_file_that_is_damaged_or_missing_is_named(tmp_path):
    fit(tmp_path / "trace", Held(), epochs=2)
    (path,) = shared_files(tmp_path / "trace")
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    assert len(problems(tmp_path / "trace")) == 1
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        Trace(tmp_path / "trace").checkpoints[1].weights()
    path.unlink()
    assert problems(tmp_path / "trace") == [f"{path} is missing."]
    with pytest.raises(FileNotFoundError, match=f"{path.name} is missing"):
        Trace(tmp_path / "trace").checkpoints[0].weights()


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_of_others_with_such_a_name_stays(tmp_path, is_link):
    path = tmp_path / "trace" / f"frozen-{'a' * 32}.safetensors"
    path.parent.mkdir()
    (tmp_path / "theirs").write_text("theirs")
    if is_link:
        path.symlink_to(tmp_path / "theirs")
    else:
        path.write_text("theirs")
    with pytest.raises(FileExistsError, match=rf"holds {path.name}, which no trace wrote"):
        fitted(tmp_path / "trace")
    assert path.read_text() == "theirs"
