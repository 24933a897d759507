"""Fits with the callback against fits without it: data sets and modules that would notice the slightest touch.

``untouched_comparisons`` draws combinations at random, as many as are asked for.
"""

from __future__ import annotations

import copy
import os
import random
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, default_collate, get_worker_info
from torchmetrics import MeanMetric
from toy import N_TRAIN, Toy, loader, quiet, test_texts, texts

from lightning_tracin import TracInCallback

GENERATORS = {
    "numpy's": lambda: np.random.default_rng(7),
    "numpy's old": lambda: np.random.RandomState(7),
    "Python's": lambda: random.Random(7),
    "torch's": lambda: torch.Generator().manual_seed(7),
}


def drawn(generator, n: int) -> int:
    """A number from 1 to n - 1."""
    if isinstance(generator, torch.Generator):
        return int(torch.randint(1, n, (), generator=generator))
    if isinstance(generator, random.Random):
        return generator.randrange(1, n)
    return int(getattr(generator, "integers", getattr(generator, "randint", None))(1, n))


def state_of(generator):
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return str(generator.get_state())
    return None if generator is None else str(generator.bit_generator.state)


class Attribute:
    def __init__(self, make):
        self.generator = make()

    def __call__(self, n):
        return drawn(self.generator, n)

    def method(self, n):
        return self(n)


class Lazily(Attribute):
    """Makes its generator when it is first needed, as transformers' collators do."""

    def __init__(self, make):
        self.make, self.generator = make, None

    def __call__(self, n):
        if self.generator is None:
            self.generator = self.make()
        return super().__call__(n)


class Slotted:
    __slots__ = ("generator",)

    def __init__(self, make):
        self.generator = make()

    def __call__(self, n):
        return drawn(self.generator, n)


def in_containers(make):
    held = {"of": [(make(),)]}
    return lambda n: drawn(held["of"][0][0], n), lambda: held["of"][0][0]


def in_a_closure(make):
    generator = make()
    return lambda n: drawn(generator, n), lambda: generator


def in_a_partial(make):
    generator = make()
    return partial(drawn, generator), lambda: generator


def in_an_attribute(kind, method=None):
    def hold(make):
        held = kind(make)
        return held if method is None else getattr(held, method), lambda: held.generator

    return hold


def of_a_class(make):
    kind = type("Of", (), {"generator": make(), "__call__": lambda self, n: drawn(self.generator, n)})
    return kind(), lambda: kind.generator


HOLDERS = {
    "an attribute": in_an_attribute(Attribute),
    "a bound method": in_an_attribute(Attribute, "method"),
    "a slot": in_an_attribute(Slotted),
    "made lazily": in_an_attribute(Lazily),
    "containers": in_containers,
    "a closure": in_a_closure,
    "a partial": in_a_partial,
    "a class": of_a_class,
}


class Dropping(Dataset):
    """Leaves a word out at random."""

    def __init__(self, draw, start=0, stop=N_TRAIN):
        self.draw, self.start, self.stop = draw, start, stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index):
        ids, label = texts()[self.start + index]
        ids = ids.clone()
        ids[self.draw(len(ids))] = 0
        return ids, label


class Streamed(IterableDataset):
    """Counts its epochs, and leaves a word out by their number and at random; workers share it."""

    def __init__(self, draw):
        self.draw, self.epochs, self.seen = draw, 0, []

    def __len__(self):
        return N_TRAIN

    def order(self):
        return range(N_TRAIN)

    def __iter__(self):
        worker = get_worker_info()
        self.epochs += 1
        self.seen.append(self.epochs)
        for index in self.order():
            if worker is None or index % worker.num_workers == worker.id:
                ids, label = texts()[index]
                ids = ids.clone()
                ids[(index + self.epochs + self.draw(len(ids))) % len(ids)] = 0
                yield ids, label


class Shuffled(Streamed):
    """In another order in each epoch: recording it ends, training goes on."""

    def order(self):
        return random.Random(self.epochs).sample(range(N_TRAIN), N_TRAIN)


class Rolling(IterableDataset):
    """Goes on reading a file from where it stands, and begins it anew where it ends."""

    def __init__(self, path):
        path.write_text("".join(f"{index:4d}\n" for index in range(N_TRAIN)))
        self.file = path.open()

    def __len__(self):
        return N_TRAIN

    def __iter__(self):
        for _ in range(N_TRAIN):
            line = self.file.readline()
            if not line:
                self.file.seek(0)
                line = self.file.readline()
            yield texts()[int(line)]


class Opened(Dataset):
    """Opens its file when it is first read, and may not be read in another process than that, as HDF5 or LMDB files."""

    def __init__(self, path):
        with sqlite3.connect(path) as database:
            database.execute("create table if not exists texts (ids blob, label int)")
            rows = [(ids.numpy().tobytes(), int(label)) for ids, label in texts()]
            database.executemany("insert into texts values (?, ?)", rows)
        database.close()
        self.path, self.database, self.process = path, None, None

    def close(self):
        if self.database is not None:
            self.database.close()

    def __len__(self):
        return N_TRAIN

    def __getitem__(self, index):
        if self.database is None:
            self.database, self.process = sqlite3.connect(self.path), os.getpid()
        if self.process != os.getpid():
            raise RuntimeError(f"opened in process {self.process}, but read in {os.getpid()}")
        ids, label = self.database.execute("select ids, label from texts where rowid = ?", (index + 1,)).fetchone()
        return torch.frombuffer(bytearray(ids), dtype=torch.long), label


@dataclass
class Data:
    """A loader's data set and what goes with it; ``state`` tells what it holds now."""

    dataset: Any
    state: Callable[[], Any]
    collate_fn: Any = None
    shuffled: bool = True
    close: Callable[[], None] = lambda: None


def _collating(draw, rows):
    ids, labels = default_collate(rows)
    for row in ids:
        row[draw(len(row))] = 0
    return ids, labels


def _dropping(hold, make, folder):
    draw, where = hold(make)
    return Data(Dropping(draw), lambda: state_of(where()))


def _nested(hold, make, folder):
    draw, where = hold(make)
    parts = ConcatDataset([Dropping(draw, 0, 5), Subset(Dropping(draw), range(5, N_TRAIN))])
    return Data(parts, lambda: state_of(where()))


def _collated(hold, make, folder):
    draw, where = hold(make)
    return Data(texts(), lambda: state_of(where()), partial(_collating, draw))


def _stream(kind):
    def build(hold, make, folder):
        draw, where = hold(make)
        stream = kind(draw)
        return Data(stream, lambda: (stream.epochs, stream.seen, state_of(where())), shuffled=False)

    return build


def _rolling(hold, make, folder):
    stream = Rolling(folder / f"{len(list(folder.iterdir()))}.txt")
    return Data(stream, stream.file.tell, shuffled=False, close=stream.file.close)


def _opened(hold, make, folder):
    data = Opened(folder / f"{len(list(folder.iterdir()))}.sqlite")
    return Data(data, lambda: data.process is None, close=data.close)


DATA = {
    "a data set": _dropping,
    "wrapped data sets": _nested,
    "a collate function": _collated,
    "a stream": _stream(Streamed),
    "a stream that shuffles": _stream(Shuffled),
    "a stream that goes on": _rolling,
    "a file opened lazily": _opened,
}


class Meter:
    """An average, as many scripts have it."""

    def __init__(self):
        self.total, self.values = 0.0, []

    def update(self, value):
        self.total += value
        self.values.append(value)


class Remembering(Toy):
    """Counts in all the ways that modules do, in eval mode too, and lets the counts act on the loss, ever so little."""

    def __init__(self):
        super().__init__()
        self.calls, self.transfers, self.hooked = 0, 0, Counter()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(()), persistent=False)
        self.sum = torch.zeros(())
        self.meter, self.metric, self.metrics = Meter(), MeanMetric(), nn.ModuleDict({"of": MeanMetric()})
        self.noise = random.Random(3)
        self.counts = {"by label": [0, 0, 0]}
        self.hidden.register_forward_hook(self._count)
        hooked = self.hooked
        self.head.register_forward_pre_hook(lambda *_: hooked.update(["head"]))

    def _count(self, *_):
        self.hooked["hidden"] += 1

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.transfers += 1
        return batch

    def forward(self, ids):
        self.calls += 1
        self.steps += 1
        self.average = 0.9 * self.average + 0.1 * self.calls
        self.sum += self.noise.random()
        return super().forward(ids)

    def influence_loss(self, batch):
        losses = super().influence_loss(batch)
        self.meter.update(float(losses.detach().mean()))
        self.metric.update(losses.detach())
        self.metrics["of"].update(losses.detach())
        for label in batch[1].tolist():
            self.counts["by label"][label] += 1
        self.log("seen", float(self.calls), on_step=True, on_epoch=True, batch_size=1)
        moved = self.calls + self.transfers + self.steps + self.average + self.sum + self.hooked.total()
        return losses * (1 + 1e-7 * float(moved + self.metric.compute() + self.counts["by label"][0]))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("metric", self.metrics["of"], on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.influence_loss(batch).mean(), batch_size=len(batch[1]))

    def remembered(self):
        return {
            "numbers": (self.calls, self.transfers, self.noise.getstate(), dict(self.hooked), self.counts),
            "tensors": [each.tolist() for each in (self.steps, self.average, self.sum, self.metric.mean_value)],
            "meter": (self.meter.total, self.meter.values),
            "updates": self.metric._update_count,
        }


class Forgetful(Toy):
    """Remembers nothing."""

    def validation_step(self, batch, batch_idx):
        self.log("val", functional.cross_entropy(self(batch[0]), batch[1]))

    def remembered(self):
        return None


MODULES = {"a module that counts": Remembering, "a module": Forgetful}

CALLBACKS = {
    "checkpoint": {},
    "on demand": {"cache": "on_demand"},
    "every 3 steps": {"every_n_train_steps": 3},
    "training": {"cache": "training"},
}


@dataclass(frozen=True)
class Combination:
    """What is fitted."""

    data: str = "a data set"
    generator: str = "numpy's"
    holder: str = "an attribute"
    module: str = "a module"
    callback: str = "checkpoint"
    workers: int = 0
    logged: bool = False

    @property
    def is_possible(self) -> bool:
        if self.callback == "training" and "stream" in self.data:
            return False
        if self.logged and self.callback == "on demand":
            return False
        return not (self.workers and self.data == "a stream that goes on")  # forked processes share its place


def left_behind(of: Combination, folder: Path, callbacks: list) -> dict[str, Any]:
    """All that a fit leaves: weights, optimizer, logged values, what data set and module hold, the generators."""
    pl.seed_everything(3, verbose=False)
    data = DATA[of.data](HOLDERS[of.holder], GENERATORS[of.generator], folder)
    own = torch.Generator().manual_seed(11)
    train = loader(
        data.dataset,
        batch_size=8,
        collate_fn=data.collate_fn,
        shuffle=data.shuffled,
        num_workers=of.workers,
        generator=own,
    )
    module = MODULES[of.module]()
    logger = CSVLogger(folder / "logs") if of.logged else False
    trainer = quiet(callbacks=callbacks, logger=logger, log_every_n_steps=1)
    trainer.fit(module, train, loader(test_texts()) if of.logged else None)
    held = copy.deepcopy(data.state())
    data.close()
    return {
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "optimizers": str([each.state_dict() for each in trainer.optimizers]),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "data": held,
        "module": module.remembered(),
        "flags": [part.training for part in module.modules()],
        "own generator": own.get_state().tolist(),
        "Python's": random.getstate(),
        "numpy's": str(np.random.get_state()),  # noqa: NPY002
        "torch's": torch.get_rng_state().tolist(),
    }


def touched(of: Combination, folder: Path) -> list[str] | None:
    """What a fit with the callback leaves otherwise than one without it: nothing. None if it is refused.

    Words that are drawn at random may be the same twice by chance, and then look as if losses depended on their batch.
    """
    folder.mkdir(parents=True)
    options = {**CALLBACKS[of.callback], "log_examples": 2 if of.logged else 0}
    may_end = "a stream" in of.data  # what is drawn at random may look like a stream that shuffles
    with warnings.catch_warnings():
        warnings.simplefilter("error" if not may_end else "ignore", UserWarning)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        without = left_behind(of, folder, [])
        callback = TracInCallback(folder / "trace", on_error="warn", **options)
        try:
            found = left_behind(of, folder, [callback])
        except ValueError as error:
            if "depend on the batch" not in str(error):
                raise
            return None
    return [name for name in without if str(without[name]) != str(found[name])]


def untouched_comparisons(n: int, seed: int, folder: Path) -> Counter:
    """Compare so many fits of random combinations; a tenth of them have workers, which cost time.

    Returns:
        How many were "alike", "different" and "refused", and of those that are different each with what differed.
    """
    of = random.Random(seed)
    found: Counter = Counter()
    while found.total() - sum(count for name, count in found.items() if name.startswith("different:")) < n:
        combination = Combination(
            *(of.choice([*options]) for options in (DATA, GENERATORS, HOLDERS, MODULES, CALLBACKS)),
            workers=2 * (of.random() < 0.1),
            logged=of.random() < 0.2,
        )
        if not combination.is_possible:
            continue
        differing = touched(combination, folder / f"{found.total()}")
        found["refused" if differing is None else "different" if differing else "alike"] += 1
        if differing:
            found[f"different: {differing} of {asdict(combination)}"] += 1
    return found
