"""Retrainings: each fit is run once, is the fit that it should be, and leaves nothing behind but its file."""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import re
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from retraining_toys import EPOCHS, N_TRAIN, Build, retrainings
from rich.console import Console
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset
from toy import Toy, loader, quiet, test_texts, texts

from lightning_tracin.retraining import random_halves, stored_outcomes, without
from lightning_tracin.retraining.folder import Retraining, RetrainingFolder
from lightning_tracin.retraining.observed import _are_usual, _Said
from lightning_tracin.retraining.outcomes import Outcome
from lightning_tracin.storage.files import hash_of_tensors, open_tensors, write_json, write_tensors

HALVES = random_halves(N_TRAIN, 3)


def by_hand(kept, seed, module=Toy):
    """The fit as a user would write it, and its logits."""
    pl.seed_everything(seed, verbose=False)
    made = module()
    data = Subset(texts(), kept.nonzero().flatten().tolist())
    quiet(pl.Trainer, max_epochs=EPOCHS).fit(made, DataLoader(data, batch_size=4, shuffle=True))
    with torch.no_grad():
        return made.eval()(test_texts().tensors[0])


def test_a_retraining_is_the_fit_by_hand(tmp_path):
    found = retrainings(tmp_path).run(HALVES[:2], seeds=(3, 4))
    labels = test_texts().tensors[1]
    for row, kept in enumerate(HALVES[:2]):
        for column, seed in enumerate((3, 4)):
            logits = by_hand(kept, seed)
            assert torch.equal(found.losses[row, column], functional.cross_entropy(logits, labels, reduction="none"))
            assert torch.equal(found.log_probabilities[row, column], logits.log_softmax(1))


def test_numbers_of_numpy_are_as_good(tmp_path):
    found = retrainings(tmp_path, n_train=np.int64(N_TRAIN), trainer=np.int64(EPOCHS)).run(HALVES[:1], np.array([3]))
    again = retrainings(tmp_path, Build(stop_at=2)).run(HALVES[:1], (3,))  # nothing is built to be fitted
    assert torch.equal(found.losses, again.losses)
    assert repr(found.seeds) == repr(stored_outcomes(tmp_path, np.array([3])).seeds) == "(3,)"


def test_what_is_there_is_not_run_again(tmp_path):
    broken_off = Build(stop_at=4)  # two to look at, and two fits
    with pytest.raises(KeyboardInterrupt):
        retrainings(tmp_path, broken_off).run(HALVES, seeds=(0, 1))
    assert not [*tmp_path.glob("*.lock"), *tmp_path.glob("*.partial")]
    went_on = Build()
    again = retrainings(tmp_path, went_on)
    assert again.missing(HALVES, (0, 1)) == 4
    found = again.run(HALVES, seeds=(0, 1))
    assert [seed for _, seed in went_on.asked[2:]] == [0, 1, 1, 1]
    other = retrainings(tmp_path / "at-once").run(HALVES, seeds=(0, 1))
    assert torch.equal(found.losses, other.losses)
    idle = Build()
    assert torch.equal(retrainings(tmp_path, idle).run(HALVES[:1]).losses, found.losses[:1, :1])
    assert [len(indices) for indices, _ in idle.asked] == [N_TRAIN, N_TRAIN]  # to look at, none to be fitted


def test_stored_outcomes_are_read_back(tmp_path):
    found = retrainings(tmp_path).run(HALVES, seeds=(0, 1))
    retrainings(tmp_path).run(without(N_TRAIN, [3]))  # with one seed alone
    stored = stored_outcomes(tmp_path)
    assert stored.losses.shape == (3, 2, 6)
    order = [int((stored.subsets == kept).all(1).nonzero()) for kept in HALVES]
    assert torch.equal(stored.losses[order], found.losses)
    assert torch.equal(stored.log_probabilities[order], found.log_probabilities)
    assert len(stored_outcomes(tmp_path, seeds=(0,)).losses) == 4
    with pytest.raises(ValueError, match=r"no subset .* seeds \[7\]"):
        stored_outcomes(tmp_path, seeds=(7,))
    with pytest.raises(FileNotFoundError, match="holds no retrainings"):
        stored_outcomes(tmp_path / "elsewhere")


def test_two_processes_share_a_folder(forks, tmp_path):
    script = (
        "import sys, torch; from retraining_toys import *; from lightning_tracin.retraining import random_halves\n"
        "build = Build(); retrainings(sys.argv[1], build).run(random_halves(20, 8)); print(len(build.asked))"
    )
    build = Build()
    mine = retrainings(tmp_path, build)
    first = random_halves(N_TRAIN, 8)[0]
    with ThreadPoolExecutor() as waiting:
        with mine.folder.taken(Retraining(first, 0)) as is_mine:  # the other one must wait for it
            mine.folder.path.mkdir(exist_ok=True)
            assert is_mine
            other = waiting.submit(forks.run, "-c", script, tmp_path, timeout=60)
            while len([*tmp_path.glob("*.safetensors")]) < 2:
                assert not other.done()
                time.sleep(0.05)
        found = mine.run(random_halves(N_TRAIN, 8))
        theirs = int(other.result().stdout)
    assert len(build.asked) + theirs == 8 + 4  # each looks twice at what is built
    assert theirs >= 2
    assert torch.equal(found.losses, retrainings(tmp_path / "alone").run(random_halves(N_TRAIN, 8)).losses)


def test_the_caller_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    level = logging.getLogger("pytorch_lightning").level
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    retrainings(tmp_path).run(HALVES[:1])
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected  # noqa: NPY002
    assert "PL_GLOBAL_SEED" not in os.environ
    assert os.environ["PL_SEED_WORKERS"] == "1"
    assert logging.getLogger("pytorch_lightning").level == level


def test_fits_are_quiet_and_leave_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    retrainings("folder").run(HALVES[:1])
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert sorted(path.suffix for path in (tmp_path / "folder").iterdir()) == [".json", ".safetensors"]


def test_a_terminal_shows_what_is_left(tmp_path, monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr("lightning_tracin.retraining.retrainings.Console", lambda **_: terminal)
    retrainings(tmp_path).run(HALVES[:2])
    assert "2/2" in shown.getvalue()


def test_the_time_is_told_after_the_first(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        retrainings(tmp_path).run(HALVES)
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == f"3 retrainings to run, into {tmp_path}; 0 are there."
    assert re.fullmatch(r"The first retraining took [\d.]+ s, all 3 take this process about [\d.]+ s\.", told[1])


def test_memory_of_fits_is_freed(tmp_path):
    made = []

    def build(indices, seed):
        module, data = Build()(indices, seed)
        made.append(weakref.ref(module))
        return module, data

    runs = retrainings(tmp_path, build)
    gc.unfreeze()
    gc.disable()
    try:
        runs.run(HALVES)
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
        gc.freeze()  # as it was
    assert [each() is None for each in made[2:]] == [True, True, True]


class Plain(pl.LightningModule):
    """The toy without the mixin: its training_step returns a mean."""

    def __init__(self):
        super().__init__()
        self.toy = Toy()

    def forward(self, ids):
        return self.toy(ids)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_a_plain_module_has_a_loss_for_each_example(tmp_path):
    found = retrainings(tmp_path, Build(module=Plain)).run(HALVES[:1])
    logits = by_hand(HALVES[0], 0, Plain)
    expected = functional.cross_entropy(logits, test_texts().tensors[1], reduction="none")
    assert torch.allclose(found.losses[0, 0], expected, atol=1e-6)
    assert torch.allclose(found.log_probabilities[0, 0], logits.log_softmax(1), atol=1e-6)


class Binary(Toy):
    """One number that says which of two classes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 1)

    def influence_loss(self, batch):
        labels = batch[1].reshape(-1).float()
        return functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], labels, reduction="none")


def of_two_classes(data, form=None):
    labels = data.tensors[1].clamp(max=1)
    return torch.utils.data.TensorDataset(data.tensors[0], labels if form is None else form(labels))


@pytest.mark.parametrize("form", [None, torch.Tensor.bool, torch.Tensor.float, lambda labels: labels[:, None].float()])
def test_a_single_output_stands_for_two_classes(tmp_path, form):
    data = of_two_classes(test_texts(), form)
    build = Build(of_two_classes(texts(), form), Binary)
    found = retrainings(tmp_path, build, loader(data)).run(HALVES[:1])
    own = found.log_probabilities[0, 0].gather(1, data.tensors[1].reshape(-1, 1).long())[:, 0]
    assert found.log_probabilities.shape == (1, 1, 6, 2)
    assert torch.allclose(-own, found.losses[0, 0], atol=1e-6)


class Regression(Binary):
    def influence_loss(self, batch):
        return (self(batch[0])[:, 0] - batch[1].float()) ** 2


@pytest.mark.parametrize("most", [1, 2])
def test_what_says_no_class_has_losses_alone(tmp_path, most):
    data = torch.utils.data.TensorDataset(test_texts().tensors[0], test_texts().tensors[1].clamp(max=most).float())
    assert retrainings(tmp_path, Build(module=Regression), loader(data)).run(HALVES[:1]).log_probabilities is None


class Doubled(Binary):
    def influence_loss(self, batch):
        return 2 * super().influence_loss(batch)


@pytest.mark.parametrize(
    ("module", "labels", "is_class"),
    [
        (Binary, [0, 1], True),
        (Regression, [0, 1], False),
        (Doubled, [0, 1], False),
        (Doubled, [0, 0, 1, 1], True),
        (Doubled, [0, 1, 1], False),
    ],
)
def test_of_one_test_example_of_a_label_a_loss_counts_that_is_the_log_probability(tmp_path, module, labels, is_class):
    data = torch.utils.data.TensorDataset(test_texts().tensors[0][: len(labels)], torch.tensor(labels).float())
    build = Build(of_two_classes(texts(), torch.Tensor.float), module)
    found = retrainings(tmp_path, build, loader(data)).run(HALVES[:1])
    assert (found.log_probabilities is not None) == is_class


def test_a_hinge_that_is_zero_is_no_log_probability():
    logits = torch.tensor([-8.0, -0.5, 8.0, 0.5])  # sure of the first of each label
    classes, labels = functional.logsigmoid(torch.stack([-logits, logits], 1)), torch.tensor([0, 0, 1, 1])
    own = -classes[torch.arange(4), labels]
    assert _are_usual([_Said(own, classes, labels)])
    assert not _are_usual([_Said(torch.zeros(4), classes, labels)])


@pytest.mark.parametrize(
    "test",
    [
        loader(test_texts(), 4, shuffle=True),
        test_texts(),
        [loader(test_texts(), 6)],
        loader(test_texts(), 6, sampler=[5, 3, 1, 0, 2, 4]),
    ],
    ids=["shuffled", "data-set", "list", "sampler"],
)
def test_test_examples_come_in_the_order_of_their_data_set(tmp_path, test):
    expected = retrainings(tmp_path / "in-order").run(HALVES[:1]).losses
    assert torch.allclose(retrainings(tmp_path / "other", test=test).run(HALVES[:1]).losses, expected, atol=1e-6)


def test_several_loaders_follow_each_other(tmp_path):
    both = {"a": loader(Subset(test_texts(), [0, 1, 2])), "b": loader(Subset(test_texts(), [3, 4, 5]), shuffle=True)}
    expected = retrainings(tmp_path / "one").run(HALVES[:1]).losses
    assert torch.allclose(retrainings(tmp_path / "two", test=both).run(HALVES[:1]).losses, expected, atol=1e-6)


def ignoring(indices, seed):
    return Toy(), loader()


def first_ones(indices, seed):
    return Toy(), loader(Subset(texts(), range(len(indices))))


def sampled(indices, seed):
    return Toy(), loader(sampler=SubsetRandomSampler(indices))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(texts())


def test_a_sampler_may_choose_the_examples(tmp_path):
    assert retrainings(tmp_path, sampled).run(HALVES[:2]).losses.shape == (2, 1, 6)


def test_what_ignores_the_indices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not depend on its indices"):
        retrainings(tmp_path, first_ones).run(HALVES)
    assert not [*tmp_path.glob("*.safetensors")]  # nothing wrong stays


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda indices: None, TypeError, r"function of \(indices, seed\)"),
        (lambda indices, seed: Toy(), TypeError, r"must return \(module, train_loader\), but returned Toy"),
        (lambda indices, seed: (loader(), Toy()), TypeError, r"but returned \(DataLoader, Toy\)"),
        (lambda indices, seed: (Toy(), texts()), TypeError, "returned TensorDataset"),
        (lambda indices, seed: (Toy(), DataLoader(Stream())), TypeError, r"\(Stream\) is a stream"),
        (ignoring, ValueError, "build was given 10 of 20 indices, but its training loader gives 20 examples"),
    ],
    ids=["signature", "no-tuple", "turned-round", "no-loader", "stream", "ignoring"],
)
def test_a_wrong_build_is_refused(tmp_path, build, error, message):
    with pytest.raises(error, match=message):
        retrainings(tmp_path, build).run(HALVES)


def test_an_error_of_build_itself_is_not_hidden(tmp_path):
    def build(indices, seed):
        return len(5)

    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        retrainings(tmp_path, build).run(HALVES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"build": "text"}, TypeError, "build must be a function"),
        ({"n_train": 1}, ValueError, "n_train must be a whole number of at least 2"),
        ({"n_train": 20.0}, ValueError, "n_train must be a whole number of at least 2, but got 20.0"),
        ({"trainer": 0}, ValueError, "trainer must be a number of epochs of at least 1, but got 0"),
        ({"trainer": 1.5}, TypeError, "trainer must be a number of epochs, or a function .*, but got float"),
        ({"trainer": quiet()}, TypeError, "a function that makes a new trainer"),
        ({"test": []}, ValueError, "is empty"),
        ({"test": "text"}, TypeError, "must come, with their labels"),
    ],
    ids=["build", "n-train", "part", "epochs", "half-epochs", "trainer", "empty", "text"],
)
def test_wrong_arguments_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        retrainings(tmp_path, **options)


@pytest.mark.parametrize(
    ("subsets", "seeds", "message"),
    [
        (HALVES[:, 1:], (0,), "subsets are of 19 training examples, but there are 20"),
        (HALVES.long(), (0,), "must be a bool tensor"),
        (HALVES & False, (0,), "keeps no example"),
        (HALVES, (), "seeds must be different"),
        (HALVES, (1, 1), "seeds must be different"),
        (HALVES, (-1,), r"seeds\[0\] must be a whole number from 0 to 4294967295"),
        (HALVES, (0, 1.5), r"seeds\[1\] must be a whole number from 0 to 4294967295, but got 1\.5"),
    ],
    ids=["other-set", "numbers", "none-kept", "no-seed", "twice", "negative", "half"],
)
def test_wrong_subsets_are_refused(tmp_path, subsets, seeds, message):
    with pytest.raises(ValueError, match=message):
        retrainings(tmp_path).run(subsets, seeds)


def test_the_folder_of_another_task_is_refused(tmp_path):
    retrainings(tmp_path).run(HALVES[:1])
    for options, told in (
        ({"n_train": 21, "build": Build(texts(21))}, "its training set has 20 examples, this one 21"),
        ({"test": loader(texts(6, seed=9))}, "its test examples are others"),
        ({"build": Build(texts(seed=9))}, "its training examples are others"),
        ({"build": Build(module=Plain)}, "its module is a Toy of 419 weights, this one a Plain"),
        ({"trainer": 2}, "its fits are of 1 epochs, these of 2 epochs"),
    ):
        subsets = random_halves(options.get("n_train", N_TRAIN), 2)[1:]
        with pytest.raises(ValueError, match=told):
            retrainings(tmp_path, **options).run(subsets)
        if "n_train" not in options:  # nothing is left to run
            with pytest.raises(ValueError, match=told):
                retrainings(tmp_path, **options).run(HALVES[:1])


@pytest.mark.parametrize(("n", "changed"), [(100, 80), (200, 1)])
def test_every_training_example_tells_one_task_from_another(tmp_path, n, changed):
    """Beyond the first 64, and between those that are spread over a training set."""
    data, halves = texts(n), random_halves(n, 2)
    found = retrainings(tmp_path, Build(data), n_train=n).run(halves[:1])
    labels = data.tensors[1].clone()
    labels[changed] = (labels[changed] + 1) % 3
    other = Build(TensorDataset(data.tensors[0], labels))
    for subsets in (halves[:1], halves):
        with pytest.raises(ValueError, match="some of its training examples, or of their labels, are others"):
            retrainings(tmp_path, other, n_train=n).run(subsets)
    again = retrainings(tmp_path, Build(data), n_train=n)
    assert torch.equal(again.run(halves[:1]).losses, found.losses)


def test_a_folder_of_an_earlier_version_is_known_by_a_few_examples(tmp_path):
    found = retrainings(tmp_path).run(HALVES[:1])
    header = RetrainingFolder(tmp_path).header
    write_json(tmp_path / "retrainings.json", {name: each for name, each in header.items() if name != "examples"})
    assert torch.equal(retrainings(tmp_path).run(HALVES[:1]).losses, found.losses)
    with pytest.raises(ValueError, match="its training examples are others"):
        retrainings(tmp_path, Build(texts(seed=9))).run(HALVES[:1])


def test_examples_that_differ_each_time_are_known_by_their_number(tmp_path):
    class Drawn(torch.utils.data.Dataset):
        generator = torch.Generator().manual_seed(0)

        def __len__(self):
            return N_TRAIN

        def __getitem__(self, index):
            return torch.randint(1, 40, (7,), generator=self.generator), texts().tensors[1][index]

    found = retrainings(tmp_path, Build(Drawn())).run(HALVES[:1])
    assert torch.equal(retrainings(tmp_path, Build(Drawn())).run(HALVES[:1]).losses, found.losses)


def test_a_damaged_file_is_refused(tmp_path):
    retrainings(tmp_path).run(HALVES[:1])
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        stored_outcomes(tmp_path)


def forged(folder, change, seed=None):
    """The file of a retraining, changed, with a checksum that is right."""
    (file,) = folder.glob("*.safetensors")
    tensors, metadata = open_tensors(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    seed = metadata["seed"] if seed is None else seed
    write_tensors(file, tensors, {"seed": seed, "content": hash_of_tensors(tensors, seed)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("losses"), r"lacks the tensors \['losses'\]"),
        (lambda t: t.pop("kept"), r"lacks the tensors \['kept'\]"),
        (lambda t: t.update(more=torch.ones(1)), r"has \['more'\] besides"),
        (lambda t: t.update(said=t.pop("log_probabilities")), r"has \['said'\] besides"),
        (lambda t: t.update(kept=t["kept"][1:]), r"kept is torch.uint8 of shape \(19,\).* of \(20,\)"),
        (lambda t: t.update(kept=t["kept"].float()), r"kept is torch.float32"),
        (lambda t: t.update(kept=t["kept"] * 3), "kept holds numbers from 0 to 3"),
        (lambda t: t.update(kept=1 - t["kept"]), "is of another retraining, [0-9a-f]{20}, than its name says"),
        (lambda t: t.update(losses=t["losses"][:5]), r"losses is torch.float32 of shape \(5,\).* of \(6,\)"),
        (lambda t: t.update(losses=t["losses"].double()), r"losses is torch.float64"),
        (lambda t: t.update(losses=t["losses"][0]), r"losses is torch.float32 of shape \(\)"),
        (lambda t: t.update(losses=t["losses"] * torch.inf), "losses holds numbers"),
        (lambda t: t.update(log_probabilities=t["log_probabilities"][:, 0]), r"log_probabilities is .* shape \(6,\)"),
        (lambda t: t.update(log_probabilities=-t["log_probabilities"]), "log_probabilities holds numbers above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_was_forged_is_refused(tmp_path, change, message):
    """Whoever makes it can compute its checksum."""
    retraining, folder = Retraining(HALVES[0], 0), RetrainingFolder(tmp_path)
    folder.claim({"n_train": N_TRAIN, "n_test": 6})
    folder.write(retraining, Outcome(torch.rand(6), torch.rand(6, 3).log_softmax(1)))
    forged(tmp_path, change)
    for read in (lambda: stored_outcomes(tmp_path), lambda: folder.read(retraining)):
        with pytest.raises(ValueError, match=rf"\.safetensors is damaged: .*{message}.* Remove it, and run it again"):
            read()


def test_a_file_of_another_seed_or_of_more_classes_is_refused(tmp_path):
    folder = RetrainingFolder(tmp_path)
    folder.claim({"n_train": N_TRAIN, "n_test": 6})
    folder.write(Retraining(HALVES[0], 0), Outcome(torch.rand(6), torch.rand(6, 3).log_softmax(1)))
    for seed in ("1", "x", "9" * 5000):
        forged(tmp_path, lambda tensors: None, seed)
        with pytest.raises(ValueError, match=r"\.safetensors is damaged: "):
            stored_outcomes(tmp_path)
    forged(tmp_path, lambda tensors: None, "0")
    folder.write(Retraining(HALVES[1], 0), Outcome(torch.rand(6), torch.rand(6, 4).log_softmax(1)))
    with pytest.raises(
        ValueError, match=r"log_probabilities is torch\.float32 of shape \(6, [34]\), but should be .*6"
    ):
        stored_outcomes(tmp_path)


@pytest.mark.parametrize("sizes", [{}, {"n_train": "20", "n_test": 6}, {"n_train": 20, "n_test": -6}], ids=str)
def test_a_header_that_was_forged_is_refused(tmp_path, sizes):
    write_json(tmp_path / "retrainings.json", {"format": 1, **sizes})
    with pytest.raises(ValueError, match=r"retrainings\.json is damaged: .* Restore the file from a copy"):
        stored_outcomes(tmp_path)


def test_a_trainer_of_ones_own_serves(tmp_path):
    made = []

    def trainer():
        made.append(quiet(pl.Trainer, max_epochs=EPOCHS))
        return made[-1]

    found = retrainings(tmp_path, trainer=trainer).run(HALVES[:2])
    assert len(made) == 2
    assert torch.equal(found.losses, retrainings(tmp_path / "by-epochs").run(HALVES[:2]).losses)
    with pytest.raises(TypeError, match=r"trainer\(\) must return a pytorch_lightning.Trainer"):
        retrainings(tmp_path / "none", trainer=lambda: None).run(HALVES)


def test_halves_are_random_parts_of_one_size():
    halves = random_halves(100, 30, share=0.25)
    assert (halves.sum(1) == 25).all()
    assert len(halves.unique(dim=0)) == 30
    assert 0.1 < halves.float().mean(0).mean() < 0.4
    assert not torch.equal(halves, random_halves(100, 30, share=0.25, seed=1))
    for wrong in ({"n": 0}, {"n": 1, "share": 1.0}, {"n": 1, "share": 0.0}):
        with pytest.raises(ValueError, match=r"n must be a whole number|share must be a finite number"):
            random_halves(100, **wrong)


def test_without_leaves_out():
    assert without(4, torch.tensor([2, 0])).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match="no training example 4"):
        without(4, [4])
    with pytest.raises(ValueError, match="All 2 training examples"):
        without(2, [0, 1])


def test_a_later_format_is_not_read(tmp_path):
    write_json(tmp_path / "retrainings.json", {"format": 2})
    with pytest.raises(ValueError, match="format 2, but this version reads 1"):
        _ = RetrainingFolder(tmp_path).header


def test_modules_of_the_other_lightning_are_fitted(tmp_path):
    twins = pytest.importorskip("twin_toy")
    found = retrainings(tmp_path, Build(module=twins.TwinToy)).run(HALVES[:2])
    assert found.log_probabilities.shape == (2, 1, 6, 3)
    with pytest.raises(TypeError, match=r"must return a lightning.pytorch.Trainer.* but returned a pytorch_lightning"):
        retrainings(
            tmp_path / "mixed", Build(module=twins.TwinToy), trainer=lambda: quiet(pl.Trainer, max_epochs=1)
        ).run(HALVES)
