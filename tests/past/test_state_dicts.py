"""Plain state dicts: objects and files, under other names; and what is no checkpoint is one clear error."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import re
import shutil

import pytest
import pytorch_lightning as pl
import torch
import torch_files
from brute_force import BruteForce, dense_gradients
from safetensors.torch import save_file
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler
from toy import N_TRAIN, Toy, fitted, loader, quiet, same_weights, test_texts, texts

from lightning_tracin import Trace, TracInCallback, TracInWE
from lightning_tracin.past.names import names_in_module
from lightning_tracin.storage import files
from lightning_tracin.storage.verification import verify

RATES = [0.5, 0.25]


def weights(seed):
    torch.manual_seed(seed)
    return Toy().state_dict()


def past_of(path, checkpoints, module=None, **options):
    return Trace.from_checkpoints(
        path, checkpoints, Toy() if module is None else module, loader(), **{"learning_rates": RATES, **options}
    )


def scores_of(trace, module=None):
    return (
        quiet()
        .influence(loader(test_texts()), Toy() if module is None else module, trace=trace, train_dataloaders=loader())
        .scores
    )


@pytest.fixture(scope="module")
def expected():
    """Brute force over two states, by rates that were given."""
    module, sides = Toy(), ([], [])
    for seed in (1, 2):
        module.load_state_dict(weights(seed))
        for side, data in zip(sides, (test_texts(), texts()), strict=True):
            batches = loader(data, 1)
            side.append(dense_gradients(module, module.embedding, batches, lambda b: module.influence_loss(b)[0]))
    return BruteForce(RATES, *sides).scores()


def as_objects(folder):
    return [weights(1), weights(2)]


def as_pt(folder):
    for seed in (1, 2):
        torch.save(weights(seed), folder / f"{seed}.pt")
    return [str(folder / "1.pt"), folder / "2.pt"]


def as_old_pt(folder):
    for seed in (1, 2):
        torch.save(weights(seed), folder / f"{seed}.pt", _use_new_zipfile_serialization=False)
    return [folder / "1.pt", folder / "2.pt"]


def as_safetensors(folder):
    for seed in (1, 2):
        save_file(weights(seed), folder / f"{seed}.safetensors")
    return [folder / "1.safetensors", folder / "2.safetensors"]


def as_lightning_weights(folder):
    for seed in (1, 2):
        torch.save({"state_dict": weights(seed), "global_step": 10 * seed, "epoch": seed}, folder / f"{seed}.ckpt")
    return [folder / "1.ckpt", folder / "2.ckpt"]


def with_prefix(prefix):
    def made(folder):
        beside = {"metric.weight": torch.ones(2)}
        return [{**{f"{prefix}{name}": each for name, each in weights(seed).items()}, **beside} for seed in (1, 2)]

    made.__name__ = prefix
    return made


@pytest.mark.parametrize(
    "made",
    [
        as_objects,
        as_safetensors,
        *map(with_prefix, ("net.", "module.a.")),
        *(pytest.param(made, marks=torch_files.are_read) for made in (as_pt, as_old_pt, as_lightning_weights)),
    ],
    ids=lambda made: made.__name__,
)
def test_scores_are_those_of_brute_force(tmp_path, expected, made):
    past = past_of(tmp_path / "trace", made(tmp_path))
    torch.testing.assert_close(scores_of(past).double(), expected, rtol=2e-3, atol=1e-5)
    assert [problem for _, problem in verify(past) if problem] == []


@pytest.mark.parametrize("told", [True, False], ids=["steps told", "names alone"])
def test_rates_go_to_the_checkpoints_of_a_folder_by_their_steps(tmp_path, told):
    """As text, checkpoint-1000 comes before checkpoint-500."""
    for step in (500, 1000):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(weights(step), folder / "model.safetensors")
        if told:
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    past = past_of(tmp_path / "trace", tmp_path / "run", learning_rates=[0.5, 0.001])
    steps = [500, 1000] if told else [1, 2]
    assert [(each.step, each.learning_rate) for each in past.checkpoints] == [(steps[0], 0.5), (steps[1], 0.001)]
    for checkpoint, step in zip(past.checkpoints, (500, 1000), strict=True):
        assert same_weights(checkpoint.weights(), weights(step))


class Around(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = Toy()

    def influence_loss(self, batch):
        return self.inner.influence_loss(batch)


def test_weights_of_a_part_are_found_in_the_module_around_it(tmp_path, expected):
    compiled = [{name.replace(".", "._orig_mod."): each for name, each in weights(seed).items()} for seed in (1, 2)]
    past = past_of(tmp_path / "trace", compiled, Around())
    torch.testing.assert_close(scores_of(past, Around()).double(), expected, rtol=2e-3, atol=1e-5)


def test_a_tied_weight_may_be_saved_once():
    module = nn.ModuleDict({"table": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    module["head"].weight = module["table"].weight
    assert names_in_module({"table.weight": torch.ones(4, 3)}, module.state_dict(), "it") == {
        "table.weight": "table.weight"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), r"1 weights of the model are not in it, such as head\.bias"),
        (lambda s: s.update({"tail.weight": torch.ones(3)}), r"1 of its weights are not in the model, such as tail"),
        (
            lambda s: s.update({"head.bias": torch.ones(7), "hidden.bias": torch.ones(1)}),
            r"2 have another shape, such as head\.bias: \(7,\) there, \(3,\) in the model, hidden\.bias: \(1,\)",
        ),
        (lambda s: (s.pop("head.bias"), s.update({"x": torch.ones(1)})), "not in it, such as .*; 1 of its weights"),
    ],
    ids=["missing", "unknown", "shape", "both"],
)
def test_another_model_is_one_error(tmp_path, change, message):
    state = dict(weights(2))
    change(state)
    with pytest.raises(ValueError, match=rf"state dict 1 is not of this model: .*{message}"):
        past_of(tmp_path / "trace", [weights(1), state])
    assert not (tmp_path / "trace").exists()


class Evil:
    """Would leave a file if it was unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@torch_files.are_read
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(tmp_path, zipped):
    content = {"state_dict": weights(1), "global_step": 1, "hyper_parameters": {"x": Evil(tmp_path / "ran")}}
    torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.ckpt holds an object of \w+\.mkdir, which only unpickling would give"):
        past_of(tmp_path / "trace", tmp_path / "evil.ckpt", learning_rates=[1])
    assert not (tmp_path / "ran").exists()


@torch_files.are_read
def test_an_object_of_a_class_is_named_with_what_to_do(tmp_path):
    torch.save({"state_dict": weights(1), "when": datetime.timedelta(1)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"object of datetime\.timedelta.*add_safe_globals, or save again"):
        past_of(tmp_path / "trace", tmp_path / "a.ckpt", learning_rates=[1])


@pytest.mark.parametrize("version", ["2.4.0", "2.5.1+cu124"])
@pytest.mark.parametrize("name", ["a.ckpt", "run/checkpoint-1/pytorch_model.bin", "run/checkpoint-1/optimizer.pt"])
def test_files_that_an_older_torch_would_run_are_refused(tmp_path, monkeypatch, name, version):
    """They are not opened at all: what is evil in this one is not seen by the check of weights_only."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent != tmp_path:
        (path.parent / "trainer_state.json").write_text('{"global_step": 1}')
    if path.name == "optimizer.pt":
        save_file(weights(1), path.parent / "model.safetensors")
    torch.save(weights(1), path)
    given = tmp_path / name.split("/")[0]
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was loaded"))
    with pytest.raises(
        ValueError, match=rf"{path} is not read: with torch {re.escape(version)}, .*torch to 2\.6 or newer"
    ):
        past_of(tmp_path / "trace", given, learning_rates=[1])
    assert not (tmp_path / "trace").exists()


def test_an_older_torch_reads_what_is_no_file_of_its_own(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.4.0"))
    given = [as_safetensors(tmp_path)[0], weights(2)]
    past = past_of(tmp_path / "trace", given)
    torch.testing.assert_close(scores_of(past).double(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("version", ["2.6.0", "2.6.0+cpu", "2.10.0"])
def test_a_torch_that_is_not_older_reads_them(tmp_path, monkeypatch, version):
    files = as_pt(tmp_path)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert len(past_of(tmp_path / "trace", files).checkpoints) == 2


def damaged(folder, content):
    path = folder / "a.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path


STATE = {"state_dict": {"a": torch.ones(1)}, "global_step": 5}


def optimizer_with(state=None, **group):
    """A checkpoint with an optimizer in which something is not as it should be."""
    return {
        **STATE,
        "optimizer_states": [{"state": state or {}, "param_groups": [{"params": [0], "lr": 1.0, **group}]}],
    }


@torch_files.are_read
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.ckpt is damaged, or is no checkpoint"),
        (b"PK\x03\x04 and no more", "a.ckpt is damaged, or is no checkpoint"),
        (pickle.dumps([1, 2]), "a.ckpt is damaged, or is no checkpoint"),
        ([1, 2], "holds no state dict, but list"),
        ({"model": {"a": torch.ones(1)}}, "holds no weights, but model"),
        ({}, "holds no weights"),
        ({**STATE, "global_step": "5"}, "'5' is no number of steps"),
        ({**STATE, "epoch": -1}, "-1 is no number of steps or epochs"),
        ({**STATE, "optimizer_states": 3}, "its optimizers are no list"),
        ({**STATE, "optimizer_states": [{"state": {}}]}, "has no parameter groups"),
        (optimizer_with(lr="x"), "the lr of a parameter group must be a number, but got 'x'"),
        (optimizer_with(betas=3), "betas of a parameter group must be a number"),
        (optimizer_with({0: 5}), "state of a parameter is no mapping"),
        (optimizer_with({0: {"step": torch.ones(2)}}), "the step of an optimizer must be a number"),
        (optimizer_with({0: {"exp_avg_sq": [1]}}), "exp_avg_sq of an optimizer is no tensor"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        past_of(tmp_path / "trace", damaged(tmp_path, content), learning_rates=[1])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"checkpoints": []}, ValueError, "There is no checkpoint to make a trace of. Pass .ckpt files"),
        ({"checkpoints": ["nowhere.ckpt"]}, FileNotFoundError, "There is no checkpoint .*nowhere.ckpt"),
        ({"checkpoints": [3]}, TypeError, r"checkpoints\[0\] is a int"),
        ({"learning_rates": None}, ValueError, "state dict 0 holds no optimizer.*Pass learning_rates="),
        (
            {"learning_rates": [1.0]},
            ValueError,
            "one for each of the 2 checkpoints, but got 1: state dict 0, state dict",
        ),
        (
            {"learning_rates": [1.0, float("nan")]},
            ValueError,
            r"learning_rates\[1\] must be .* but got nan",
        ),
        ({"checkpoints": [weights(1), STATE]}, ValueError, "state dict 0 do not tell which step"),
        (
            {"checkpoints": [{"state_dict": weights(seed), "global_step": 5} for seed in (1, 2)]},
            ValueError,
            "are both of step 5, but their weights differ",
        ),
        ({"model": 3}, TypeError, "model must be a LightningModule or a Hugging Face model, but got int"),
        ({"model": nn.Linear(2, 2)}, TypeError, "or a Hugging Face model, but got Linear"),
        ({"methods": ("tracin-last")}, ValueError, "methods must be some of"),
        ({"train_dataloaders": None}, ValueError, "There is no training loader"),
        ({"path": "s3://bucket/trace"}, ValueError, "folder of a file system"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_clear_error(tmp_path, arguments, kind, message):
    given = {
        "path": tmp_path / "trace",
        "checkpoints": [weights(1), weights(2)],
        "model": Toy(),
        "train_dataloaders": loader(),
        "learning_rates": RATES,
        **arguments,
    }
    with pytest.raises(kind, match=message):
        Trace.from_checkpoints(**given)
    assert not (tmp_path / "trace").exists()


def test_what_is_in_the_folder_stays(tmp_path):
    trainer = fitted(tmp_path / "trace")
    with pytest.raises(FileExistsError, match="holds a trace already, which may be asked"):
        past_of(tmp_path / "trace", as_objects(tmp_path))
    assert len(trainer.callbacks[0].trace.checkpoints) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trace.json").write_text("mine")
    with pytest.raises(FileExistsError, match="which no trace wrote"):
        past_of(tmp_path / "other", as_objects(tmp_path))
    assert (tmp_path / "other" / "trace.json").read_text() == "mine"


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that fills up at the second checkpoint leaves nothing, and not what others keep there."""
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "notes.txt").write_text("mine")
    save, written = files.save_file, []

    def full(tensors, path, **options):
        written.append(path)
        if len(written) > 1:
            raise OSError("No space left on device")
        return save(tensors, path, **options)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        past_of(tmp_path / "trace", as_objects(tmp_path))
    assert [each.name for each in (tmp_path / "trace").iterdir()] == ["notes.txt"]
    monkeypatch.undo()
    assert len(past_of(tmp_path / "trace", as_objects(tmp_path)).checkpoints) == 2


def test_a_fit_may_replace_it(tmp_path):
    past_of(tmp_path / "trace", as_objects(tmp_path))
    fit = quiet(callbacks=[TracInCallback(tmp_path / "trace", overwrite=True)])
    fit.fit(Toy(), loader())
    assert Trace(tmp_path / "trace").n_train == N_TRAIN


def test_from_another_trace(tmp_path):
    """Whose checkpoints, rates and moments are taken over; the examples are those that it trained on."""
    trainer = fitted(tmp_path / "trace", every_n_train_steps=2)
    source = trainer.callbacks[0].trace
    for number, given in enumerate((source, source.path)):
        past = Trace.from_checkpoints(
            tmp_path / f"past{number}", given, Toy(), loader(), methods=["hidden", "tracin-we"]
        )
        assert not past.header.candidates
        assert torch.equal(past.undrawn, source.undrawn)
        for a, b in zip(source.checkpoints, past.checkpoints, strict=True):
            assert a.learning_rate == b.learning_rate
            assert same_weights(a.weights(), b.weights())
    method = TracInWE(precondition="adam")
    found = quiet().influence(loader(test_texts()), Toy(), trace=past, train_dataloaders=loader(), method=method)
    expected = trainer.influence(loader(test_texts()), method=method)
    torch.testing.assert_close(found.scores, expected.scores, rtol=2e-3, atol=1e-5)
    with pytest.raises(ValueError, match="pass one alone"):
        Trace.from_checkpoints(tmp_path / "mixed", [source, weights(1)], Toy(), loader())


def test_a_trace_that_is_incomplete_says_so_of_what_is_made_of_it(tmp_path):
    source = fitted(tmp_path / "trace").callbacks[0].trace
    source.mark_incomplete(10, "the disk was full")
    past = Trace.from_checkpoints(tmp_path / "past", source, Toy(), loader())
    assert "The recording ended at step 10: the disk was full" in past.header.notes[0]
    shutil.rmtree(source.checkpoints[0].path)
    with pytest.raises(FileNotFoundError, match="lacks the checkpoint before that of step 10"):
        Trace.from_checkpoints(tmp_path / "again", source, Toy(), loader())


def test_weights_that_are_not_finite_are_named(tmp_path):
    broken = {name: torch.full_like(each, torch.nan) for name, each in weights(2).items()}
    with pytest.raises(ValueError, match="training example 0 is NaN or infinite at the weights of state dict 1"):
        past_of(tmp_path / "trace", [weights(1), broken])


class Stream(IterableDataset):
    def __len__(self):
        return N_TRAIN

    def __iter__(self):
        return iter(texts())


def test_a_stream(tmp_path, expected):
    past = Trace.from_checkpoints(
        tmp_path / "trace", as_objects(tmp_path), Toy(), loader(Stream()), learning_rates=RATES
    )
    result = quiet().influence(loader(test_texts()), Toy(), trace=past, train_dataloaders=loader(Stream()))
    torch.testing.assert_close(result.scores.double(), expected, rtol=2e-3, atol=1e-5)


class Batches(Dataset):
    """Hands out whole batches."""

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, indices):
        return [each[indices] for each in texts().tensors]


def test_batches_that_a_sampler_lists(tmp_path, expected):
    def listed(indices):
        sampler = BatchSampler(SubsetRandomSampler(indices), 4, drop_last=False)
        return DataLoader(Batches(), batch_size=None, sampler=sampler)

    past = Trace.from_checkpoints(
        tmp_path / "trace", as_objects(tmp_path), Toy(), listed(range(10)), learning_rates=RATES
    )
    result = quiet().influence(loader(test_texts()), Toy(), trace=past, train_dataloaders=listed(range(10)))
    assert result.undrawn.tolist() == list(range(10, N_TRAIN))
    torch.testing.assert_close(result.scores.double()[:, :10], expected[:, :10], rtol=2e-3, atol=1e-5)
