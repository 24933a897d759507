"""Readings that training would notice: files opened too early, tokenizers used before a fork, generators not seen."""

from __future__ import annotations

import multiprocessing
import random
import re
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from toy import N_TRAIN, VOCABULARY, Toy, fitted, loader, quiet, same_weights, test_texts, texts
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from untouched import Attribute, Dropping, Opened, Shuffled

from lightning_tracin import TracInCallback

CACHES = ["checkpoint", "training", "on_demand"]


def fit_of(callbacks, data, **options):
    pl.seed_everything(3, verbose=False)
    trainer = quiet(callbacks=callbacks, **options)
    trainer.fit(Toy(), data)
    return trainer


@pytest.mark.parametrize("cache", CACHES)
def test_a_file_is_opened_by_workers_alone(tmp_path, cache):
    """In a query, too, which may come between two fits of one process."""
    data = Opened(tmp_path / "texts.sqlite")
    train = loader(data, shuffle=True, num_workers=1)
    fit = fitted(tmp_path / "trace", data=train, cache=cache, trainer={"max_epochs": 1})
    fit.influence(loader(data, num_workers=1), train_dataloaders=train)
    fit.self_influence()
    assert data.database is None
    fit.fit_loop.max_epochs += 1
    fit.fit(fit.lightning_module, train)
    assert data.database is None


class Asking(Dataset):
    """Tells in which worker it is read, and what that was set up as."""

    def __init__(self, folder):
        self.folder, self.ready = folder, False

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, index):
        assert self.ready, "worker_init_fn has not run"
        assert get_worker_info().dataset is self
        assert multiprocessing.parent_process() is not None
        return texts()[index]


def set_up(worker):
    get_worker_info().dataset.ready = True


class Watching(pl.Callback):
    """Notes which workers there are after each epoch, and which of them are those of the training loader."""

    def __init__(self, data):
        self.data, self.seen = data, []

    def on_train_epoch_end(self, trainer, pl_module):
        own = {} if self.data._iterator is None else {worker.pid for worker in self.data._iterator._workers}
        self.seen.append((own, {each.pid for each in multiprocessing.active_children()}))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("persistent", [pytest.param(False, marks=pytest.mark.slow), True])
def test_workers_are_set_up_as_the_loaders_own_and_none_stays(tmp_path, cache, persistent):
    train = loader(Asking(tmp_path), num_workers=2, worker_init_fn=set_up, persistent_workers=persistent, timeout=60)
    watching = Watching(train)
    fit = fit_of([TracInCallback(tmp_path / "trace", cache=cache, on_error="raise"), watching], train)
    fit.self_influence()
    assert multiprocessing.active_children() == []
    if persistent:
        ((own, first), (own_later, second)) = watching.seen
        assert len(own) == 2
        assert own == first == own_later == second


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    """By the multiprocessing context that the loader has."""
    train = loader(Dropping(Attribute(partial_rng)), num_workers=1, multiprocessing_context="spawn")
    fit_of([TracInCallback(tmp_path / "trace", cache="on_demand")], train, max_epochs=1, limit_train_batches=1)


def partial_rng():
    return random.Random(1)


def tokenizer():
    words = {f"w{number}": number for number in range(3, VOCABULARY)}
    model = WordLevel({"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, **words}, unk_token="[UNK]")
    made = Tokenizer(model)
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]")


class Tokenizing:
    """A collate function that tokenizes with several threads, which do not survive that the process is forked after."""

    def __init__(self):
        self.tokenizer = tokenizer()

    def __call__(self, rows):
        assert multiprocessing.parent_process() is not None, "tokenized in the process of the fit"
        encoded = self.tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        return encoded["input_ids"], torch.tensor([label for _, label in rows])


SENTENCES = [
    (" ".join(f"w{3 + (number * 7 + place) % 30}" for place in range(5)), number % 3) for number in range(N_TRAIN)
]


@pytest.mark.parametrize("cache", CACHES)
def test_tokenizers_are_used_by_workers_alone(tmp_path, cache):
    data = loader(SENTENCES, collate_fn=Tokenizing(), num_workers=1)
    fitted(tmp_path / "trace", data=data, cache=cache, trainer={"max_epochs": 1}).self_influence()


class Language(Toy):
    """Its loss is of a few labelled words."""

    def influence_loss(self, batch):
        labels = batch["labels"]
        losses = torch.nn.functional.cross_entropy(
            self(batch["input_ids"]), labels.clamp(0).sum(1) % 3, reduction="none"
        )
        return losses * (labels >= 0).any(1)


@pytest.mark.parametrize("cache", ["checkpoint", "on_demand"])
def test_the_collator_of_transformers_with_a_seed(tmp_path, cache):
    """It makes its generator at the first call, which must be training's."""
    rows = [{"input_ids": tokenizer()(text)["input_ids"]} for text, _ in SENTENCES]
    found = []
    for callbacks in ([], [TracInCallback(tmp_path / "trace", cache=cache, on_error="raise")]):
        pl.seed_everything(3, verbose=False)
        collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3, seed=5)
        trainer = quiet(callbacks=callbacks)
        trainer.fit(Language(), loader(rows, collate_fn=collator, batch_size=8, shuffle=True))
        found.append((trainer.lightning_module.state_dict(), collator.generator.get_state()))
    assert same_weights(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def hidden(seed):
    """Draws from a generator inside of a frame, where nobody looks."""
    of = random.Random(seed)
    while True:
        yield of.randrange(1, 7)


class Unseen(Dataset):
    def __init__(self):
        self.draws = hidden(1)

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, index):
        ids, label = texts()[index]
        ids = ids.clone()
        ids[next(self.draws)] = VOCABULARY - 1
        return ids, label


class UnseenCollate:
    def __init__(self):
        self.draws = hidden(1)

    def __call__(self, rows):
        ids, labels = torch.utils.data.default_collate(rows)
        ids[:, next(self.draws)] = VOCABULARY - 1
        return ids, labels


class UnseenStream(IterableDataset):
    def __init__(self):
        self.draws = hidden(1)

    def __len__(self):
        return N_TRAIN

    def __iter__(self):
        return (Unseen.__getitem__(self, index) for index in range(N_TRAIN))


UNSEEN = {
    "Unseen": lambda: loader(Unseen(), batch_size=8),
    "UnseenCollate": lambda: loader(batch_size=8, collate_fn=UnseenCollate()),
    "UnseenStream": lambda: loader(UnseenStream(), batch_size=8),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_generator_that_cannot_be_found_is_warned_of_by_name(tmp_path, name):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted(tmp_path / "trace", data=UNSEEN[name](), cache="on_demand", trainer={"max_epochs": 1})
    (message,) = (str(each.message) for each in found if "bit for bit" in str(each.message))
    assert message.startswith(f"{name} gives other examples each time")


@pytest.mark.parametrize("draw", [lambda n: int(torch.randint(1, n, ())), Attribute(lambda: np.random.default_rng(1))])
def test_generators_that_are_found_are_not_warned_of(tmp_path, draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        fitted(tmp_path / "trace", data=loader(Dropping(draw), batch_size=8), trainer={"max_epochs": 1})


def test_nor_are_those_that_workers_move(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        draw = Attribute(lambda: random.Random(1))
        fitted(tmp_path / "trace", data=loader(Dropping(draw), batch_size=8, num_workers=1), trainer={"max_epochs": 1})


def test_a_stream_that_shuffles_by_epoch_ends_the_recording(tmp_path):
    """Its order before training is that of no later pass."""
    match = "stream of training examples gave others than before at .* of 4 places.*do not shuffle by epoch"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted(tmp_path / "trace", data=loader(Shuffled(lambda n: 1)), on_error="warn")
    assert any(re.search(match, str(each.message)) for each in found)
    with pytest.raises(ValueError, match=match):
        fitted(tmp_path / "other", data=loader(Shuffled(lambda n: 1)))


class Turning(IterableDataset):
    """Begins like the last time, and goes on otherwise."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return N_TRAIN

    def __iter__(self):
        self.epoch += 1
        order = list(range(N_TRAIN))
        order[8:] = random.Random(self.epoch).sample(order[8:], N_TRAIN - 8)
        return iter([texts()[index] for index in order])


def test_each_pass_is_compared_with_the_first(tmp_path):
    with pytest.raises(ValueError, match=r"others than before at \d+ of 20 places, the first of them \d+"):
        fitted(tmp_path / "trace", data=loader(Turning()))
    steps = [path.name for path in (tmp_path / "trace" / "checkpoints").iterdir() if path.is_dir()]
    assert steps == ["step-000000005"]
    stream = loader(Turning())
    fit = fitted(tmp_path / "one", data=stream, cache="on_demand")
    assert fit.influence(loader(test_texts())).scores.abs().sum() > 0  # all passes of a query begin where it began
    stream.dataset.epoch += 1
    with pytest.raises(ValueError, match="others than before"):
        fit.influence(loader(test_texts()), method="tracin-last")


def test_a_stream_with_words_masked_at_random_goes_on(tmp_path):
    class Masked(IterableDataset):
        def __len__(self):
            return N_TRAIN

        def __iter__(self):
            for ids, label in texts(length=12):
                yield torch.where((torch.rand(12) < 0.15) & (ids > 0), 1, ids), label

    fit = fitted(tmp_path / "trace", data=loader(Masked()))
    assert len(fit.callbacks[0].trace.checkpoints) == 2


class Breaking(Dataset):
    """Draws from all global generators, and breaks in the pass of the first checkpoint."""

    def __init__(self, broken, folder):
        self.broken, self.folder = broken, folder

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
        if self.broken and any(self.folder.glob("checkpoints/*.partial")):
            raise OSError("gone")
        return texts()[index]


def test_a_pass_that_breaks_leaves_the_generators_where_they_were(tmp_path):
    found = []
    for broken in (False, True):
        data = loader(Breaking(broken, tmp_path / "trace"), shuffle=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fit = fit_of([TracInCallback(tmp_path / "trace")] if broken else [], data)
        found.append((fit.lightning_module.state_dict(), random.random(), float(torch.rand(()))))
    assert (tmp_path / "trace").exists()
    assert fit.callbacks[0].trace.checkpoints == []
    assert same_weights(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_data_set_that_draws_by_itself_is_not_taken_for_losses_that_depend_on_their_batch(tmp_path, workers, seed):
    draw = Attribute(lambda: np.random.default_rng(seed))
    data = loader(Dropping(draw), batch_size=8, num_workers=workers)
    fitted(tmp_path / "trace", data=data, cache="on_demand", trainer={"max_epochs": 1, "limit_train_batches": 1})
