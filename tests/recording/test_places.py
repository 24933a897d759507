"""Where a trace may be written: beside other people's files, never over them, and not through links."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from toy import N_TRAIN, Data, Toy, fitted, loader, quiet, test_texts

from lightning_tracin import Trace, TracInCallback
from lightning_tracin.storage import files
from lightning_tracin.storage.own_files import remove_trace
from lightning_tracin.storage.verification import verify

FOREIGN = [
    "trace.json",
    "vocabulary.json",
    "texts/notes.txt",
    "texts/index.json",
    "texts.partial/a",
    "running.partial/b",
    "checkpoints/step-000000005/weights.safetensors",
    "checkpoints/step-000000005/my.ckpt",
    "checkpoints/step-000000010.partial/c",
]


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def steps(path) -> list[int]:
    return [each.step for each in Trace(path).checkpoints]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_refused_and_stay(tmp_path, name, overwrite):
    folder = tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    before = content(folder)
    with pytest.raises(FileExistsError, match=f"holds {name}, which no trace wrote but a trace would write over"):
        fitted(folder, overwrite=overwrite)
    assert content(folder) == before


def test_what_is_not_in_the_way_stays(tmp_path):
    folder = tmp_path / "run"
    for name in ("checkpoints/best.ckpt", "checkpoints/step-000000005.ckpt", ".lock", "notes.txt", "images/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = content(folder)
    for overwrite in (False, True, True):
        fit = fitted(folder, overwrite=overwrite)
        assert steps(folder) == [5, 10]
        assert fit.influence(loader(test_texts())).scores.any()
        assert before.items() <= content(folder).items()
    remove_trace(folder)
    assert content(folder) == before


def test_model_checkpoint_in_the_same_folder(tmp_path):
    for overwrite in (False, True):
        saving = ModelCheckpoint(tmp_path / "run" / "checkpoints", save_top_k=-1, filename=f"{overwrite}-{{step}}")
        callbacks = [TracInCallback(tmp_path / "run", overwrite=overwrite), saving]
        quiet(callbacks=callbacks, enable_checkpointing=True).fit(Toy(), loader())
        assert steps(tmp_path / "run") == [5, 10]
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))) == 4
    (tmp_path / "run" / "mine.partial").write_text("mine")
    assert not [problem for _, problem in verify(Trace(tmp_path / "run")) if problem]


def test_files_that_somebody_put_into_a_trace_stay_when_it_is_replaced(tmp_path):
    fitted(tmp_path / "trace")
    note = tmp_path / "trace" / "checkpoints" / "step-000000005" / "note.txt"
    note.write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds checkpoints/step-000000005/note.txt, which no trace wrote"):
        fitted(tmp_path / "trace", overwrite=True)
    assert steps(tmp_path / "trace") == [5, 10]
    remove_trace(tmp_path / "trace")
    assert content(tmp_path / "trace") == {"checkpoints/step-000000005/note.txt": b"mine"}


def test_a_removal_that_was_broken_off_is_taken_up_again(tmp_path, monkeypatch):
    fitted(tmp_path / "trace")
    with monkeypatch.context() as patch:
        unlink, calls = Path.unlink, []

        def killed(path, **options):
            calls.append(path)
            if len(calls) == 5:
                raise KeyboardInterrupt
            unlink(path, **options)

        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_trace(tmp_path / "trace")
    with pytest.raises(FileNotFoundError, match="was being replaced by that of another fit"):
        Trace(tmp_path / "trace")
    fitted(tmp_path / "trace")
    assert steps(tmp_path / "trace") == [5, 10]
    assert not [problem for _, problem in verify(Trace(tmp_path / "trace")) if problem]


@pytest.mark.parametrize(
    "name", ["texts", "checkpoints", "running.partial", "checkpoints/step-000000005", "trace.json"]
)
def test_links_are_not_written_through(tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "index.json").write_text("mine")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim / "index.json" if name == "trace.json" else victim)
    with pytest.raises(FileExistsError, match=f"holds {name}"):
        fitted(tmp_path / "run", overwrite=True)
    assert content(victim) == {"index.json": b"mine"}


def test_links_in_a_strangers_trace_are_not_written_through(tmp_path):
    """A fit that goes on, and a query that stores gradients."""
    fit = fitted(tmp_path / "trace", cache="on_demand", trainer={"max_epochs": 1})
    fit.save_checkpoint(tmp_path / "last.ckpt")
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "trace" / "texts").symlink_to(victim)
    with pytest.raises(FileExistsError, match="holds texts, a link, through which a trace would write elsewhere"):
        fit.influence(loader(test_texts()))
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", cache="on_demand", dtype="float32")])
    with pytest.raises(FileExistsError, match="holds texts, a link"):
        trainer.fit(Toy(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert not list(victim.iterdir())


@pytest.mark.parametrize(
    "name", ["texts.partial/note.txt", "checkpoints/step-000000005/words.partial/b", "running.partial/process-0/c"]
)
def test_files_of_others_in_temporary_folders_stay(tmp_path, name):
    """A fit that goes on, and a query that stores gradients, make these folders anew."""
    fit = fitted(tmp_path / "trace", cache="on_demand", trainer={"max_epochs": 1})
    fit.save_checkpoint(tmp_path / "last.ckpt")
    note = tmp_path / "trace" / name
    note.parent.mkdir(parents=True)
    note.write_text("mine")
    with pytest.raises(FileExistsError, match=rf"holds {name}, which no trace wrote, in a temporary folder"):
        fit.influence(loader(test_texts()))
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", cache="training", dtype="float32")])
    with pytest.raises(FileExistsError, match=rf"holds {name}, which no trace wrote, in a temporary folder"):
        trainer.fit(Toy(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert note.read_text() == "mine"
    note.unlink()
    note = tmp_path / "trace" / "checkpoints" / "step-000000005" / "note.txt"  # is in nobody's way
    note.write_text("mine")
    assert fit.influence(loader(test_texts())).scores.any()
    assert note.read_text() == "mine"


def test_temporary_files_have_names_that_nobody_foresees(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("a.json.partial", "a.safetensors.partial"):
        (tmp_path / name).symlink_to(victim)
    files.write_json(tmp_path / "a.json", {"x": 1})
    files.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    assert victim.read_text() == "mine"
    (tmp_path / "b.json").symlink_to(victim)  # is replaced, not followed
    files.write_json(tmp_path / "b.json", {"x": 1})
    assert victim.read_text() == "mine"
    assert not (tmp_path / "b.json").is_symlink()


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://run", "gs://bucket"])
def test_urls_are_refused(url):
    with pytest.raises(ValueError, match=f"the dirpath is '{url}'. Pass a local folder as dirpath"):
        TracInCallback(url)


def test_urls_of_lightning_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the default_root_dir of the trainer is 'memory://run'"):
        quiet(callbacks=[TracInCallback()], default_root_dir="memory://run").fit(Toy(), loader())
    assert not list(tmp_path.iterdir())
    logger = CSVLogger(tmp_path)
    monkeypatch.setattr(CSVLogger, "save_dir", "memory://run")
    with pytest.raises(ValueError, match="the folder of CSVLogger is 'memory://run'"):
        quiet(callbacks=[TracInCallback()], logger=logger).fit(Toy(), loader())
    assert not list(tmp_path.rglob("trace"))


def in_logs(root, epochs, ckpt_path=None):
    """A fit that writes its trace into the next folder of its logger."""
    pl.seed_everything(0, verbose=False)
    trainer = quiet(
        callbacks=[TracInCallback(dtype="float32"), ModelCheckpoint(save_top_k=-1, filename="{epoch}")],
        enable_checkpointing=True,
        logger=CSVLogger(root, name="logs"),
        max_epochs=epochs,
    )
    trainer.fit(Toy(), loader(shuffle=True), ckpt_path=ckpt_path)
    return trainer


def test_a_fit_that_goes_on_from_an_earlier_checkpoint_leaves_the_other_whole(tmp_path):
    first = in_logs(tmp_path, 5)
    old = Path(first.logger.log_dir) / "trace"
    before = content(old)
    second = in_logs(tmp_path, 3, old.parent / "checkpoints" / "epoch=0.ckpt")
    new = Path(second.logger.log_dir) / "trace"
    assert (old.parent.name, new.parent.name) == ("version_0", "version_1")
    assert content(old) == before
    assert steps(old) == [5, 10, 15, 20, 25]
    assert steps(new) == [5, 10, 15]
    assert Trace(old).id != Trace(new).id
    for path in (old, new):
        assert not [problem for _, problem in verify(Trace(path)) if problem]
    weights = [Trace(path).checkpoints[0].path / "weights.safetensors" for path in (old, new)]
    assert weights[0].samefile(weights[1])  # no space is taken for what both have
    found = second.influence(loader(test_texts())).scores
    straight = quiet().influence(loader(test_texts()), Toy(), trace=new).scores
    torch.testing.assert_close(found, straight, rtol=1e-6, atol=0)
    shutil.rmtree(old)
    assert torch.equal(quiet().influence(loader(test_texts()), Toy(), trace=new).scores, straight)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_fit_that_goes_on_in_another_dirpath_begins_with_what_came_before(tmp_path):
    def fit(*paths, epochs, ckpt_path=None):
        pl.seed_everything(0, verbose=False)
        saving = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
        recording = [TracInCallback(tmp_path / path, dtype="float32") for path in paths]
        trainer = quiet(callbacks=[*recording, saving], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(Toy(), loader(), ckpt_path=ckpt_path)

    fit("a", epochs=2)
    before = content(tmp_path / "a")
    fit("b", epochs=3, ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")
    assert steps(tmp_path / "b") == [5, 10, 15]
    assert content(tmp_path / "a") == before
    # Of two callbacks one has its state, and the other that of nobody.
    with pytest.warns(UserWarning, match="goes on at step 15, but the trace in .*c has nothing to go on with"):
        fit("b", "c", epochs=4, ckpt_path=tmp_path / "saved" / "epoch=2.ckpt")
    assert steps(tmp_path / "b") == [5, 10, 15, 20]
    assert steps(tmp_path / "c") == [20]


@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
def test_a_trainer_that_fits_again_goes_on_with_its_trace(tmp_path, cache):
    def fit(path, *epochs):
        pl.seed_everything(0, verbose=False)
        trainer = quiet(callbacks=[TracInCallback(path, dtype="float32", cache=cache)], max_epochs=epochs[0])
        module = Toy()
        for number in epochs:
            trainer.fit_loop.max_epochs = number
            trainer.fit(module, loader())
        return trainer

    twice = fit(tmp_path / "twice", 2, 4)
    fit(tmp_path / "once", 4)
    assert steps(tmp_path / "twice") == steps(tmp_path / "once") == [5, 10, 15, 20]
    recorded = [[(each.steps, each.epoch) for each in Trace(tmp_path / name).checkpoints] for name in ("twice", "once")]
    assert [[len(each[0]) for each in of_fit] for of_fit in recorded] == [[5] * 4] * 2
    assert twice.influence(loader(test_texts())).scores.shape == (6, N_TRAIN)


class BreaksOff(Toy):
    """Raises an error once, at a step: in the batch, or when the gradients are there and the step is not done."""

    def __init__(self, step: int, hook: str, error: type[BaseException]) -> None:
        super().__init__()
        self.broken, self.hook, self.error = step, hook, error

    def _raise_once(self, hook):
        if (self.trainer.global_step, hook) == (self.broken, self.hook):
            self.broken = None
            raise self.error

    def training_step(self, batch, batch_idx):
        self._raise_once("training_step")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self._raise_once("on_before_optimizer_step")


@pytest.fixture
def interruptible():
    """Lightning ignores Ctrl-C from the first one on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("cache", ["checkpoint", "training", "on_demand"])
@pytest.mark.parametrize(
    ("step", "hook", "error"),
    [
        (2, "training_step", KeyboardInterrupt),
        (7, "training_step", RuntimeError),
        (7, "on_before_optimizer_step", KeyboardInterrupt),
        (10, "training_step", KeyboardInterrupt),
    ],
)
def test_a_trainer_that_fits_again_after_it_was_broken_off_goes_on(tmp_path, cache, step, hook, error):
    """Lightning begins the epoch anew, and counts its steps on."""
    callback = TracInCallback(tmp_path / "trace", dtype="float32", cache=cache, on_error="raise")
    trainer, module = quiet(callbacks=[callback], max_epochs=3), BreaksOff(step, hook, error)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(module, loader())
    trainer.fit(module, loader())
    checkpoints = Trace(tmp_path / "trace").checkpoints
    assert [each.epoch for each in checkpoints] == [0, 1, 2]
    assert [number for each in checkpoints for number, *_ in each.steps] == list(range(trainer.global_step))
    assert checkpoints[-1].step == trainer.global_step == 15 + step % 5
    assert trainer.influence(loader(test_texts())).scores.any()


@pytest.mark.parametrize("tuner", [None, LearningRateFinder, BatchSizeFinder])
def test_another_trainer_does_not_go_on(tmp_path, tuner):
    """Nor where a tuner saves the state of all callbacks, and restores it."""
    options = {
        LearningRateFinder: {"num_training_steps": 3, "update_attr": False},
        BatchSizeFinder: {"steps_per_trial": 1, "init_val": 2, "max_trials": 1},
    }
    data = Data()
    data.batch_size = 8
    callback = TracInCallback(tmp_path / "trace")
    quiet(callbacks=[callback]).fit(Toy(), data)
    before = content(tmp_path / "trace")
    tuners = [] if tuner is None else [tuner(**options[tuner])]
    with pytest.raises(FileExistsError, match="holds the trace of another fit"):
        quiet(callbacks=[*tuners, callback], default_root_dir=tmp_path).fit(Toy(), data)
    assert content(tmp_path / "trace") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_module_does_not_go_on(tmp_path, overwrite):
    """Its checkpoints were summed with those of the first."""
    trainer = quiet(callbacks=[TracInCallback(tmp_path / "trace", overwrite=overwrite)])
    trainer.fit(Toy(), loader())
    first = Trace(tmp_path / "trace")
    trainer.fit_loop.max_epochs = 4
    if overwrite:
        trainer.fit(Toy(), loader())
        assert steps(tmp_path / "trace") == [15, 20]
        assert Trace(tmp_path / "trace").id != first.id
    else:
        with pytest.raises(FileExistsError, match="holds the trace of another fit"):
            trainer.fit(Toy(), loader())
        assert steps(tmp_path / "trace") == [5, 10]


@pytest.mark.parametrize("place", ["trace", "elsewhere"])
@pytest.mark.parametrize(("resumed", "is_whole"), [(5, True), (10, False)])
def test_what_a_recording_lacks_is_told_of_the_trace_that_goes_on_with_it(tmp_path, place, resumed, is_whole):
    """It ended at step 8, and the fit went on; the files of later steps are of a trace that lacks what came between."""

    class Broken(Toy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 8:
                self.callback._stop(self.trainer, OSError(28, "No space left on device"))

    def fit(path, module, **options):
        pl.seed_everything(0, verbose=False)
        saving = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{step}")
        module.callback = TracInCallback(path)
        trainer = quiet(callbacks=[module.callback, saving], max_epochs=3, enable_checkpointing=True)
        trainer.fit(module, loader(), **options)

    with pytest.warns(UserWarning, match="stopped recording at step 8"):
        fit(tmp_path / "trace", Broken())
    assert "The recording ended at step 8" in Trace(tmp_path / "trace").incomplete
    fit(tmp_path / place, Toy(), ckpt_path=tmp_path / "saved" / f"step={resumed}.ckpt")
    went_on = Trace(tmp_path / place)
    assert (went_on.incomplete is None) is is_whole
    assert steps(tmp_path / place) == ([5, 10, 15] if is_whole else [5, 15])


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_checkpoint_is_noticed(tmp_path, number):
    fit = fitted(tmp_path / "trace", trainer={"max_epochs": 3})
    shutil.rmtree(Trace(tmp_path / "trace").checkpoints[number].path)
    with pytest.raises(FileNotFoundError, match="lacks the checkpoint before that of step"):
        fit.influence(loader(test_texts()))
    assert any("lacks the checkpoint before" in str(problem) for _, problem in verify(Trace(tmp_path / "trace")))


def test_what_a_killed_fit_leaves_behind_is_its_own(tmp_path):
    """Files that are being written, by safetensors under names of its own."""
    fitted(tmp_path / "trace")
    left = ["checkpoints/step-000000015.partial/words.partial/.tmpAbC1x2", "running.partial/process-0/00003/.tmpq9"]
    left += [
        "checkpoints/step-000000015.partial/weights.safetensors.0123abcd.partial",
        "vocabulary.json.89ab0123.partial",
    ]
    for name in left:
        (tmp_path / "trace" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "trace" / name).write_text("half")
    fitted(tmp_path / "trace", overwrite=True)
    assert not [name for name in left if (tmp_path / "trace" / name).exists()]
    remove_trace(tmp_path / "trace")
    assert not content(tmp_path / "trace")
