"""Fits whose validations are logged, what they log, and what that is compared with."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytorch_lightning as pl
import torch
from brute_force import BruteForce, dense_gradients
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional
from torch.utils.data import DataLoader
from toy import STEPS_PER_EPOCH, Toy, loader, mean_rate, quiet, test_texts, texts

from lightning_tracin import TracInCallback
from lightning_tracin.report.explanation import Example, Explanation, Influential, Word

SCALARS = ("tracin/same_label", "tracin/concentration", "tracin/suspected_label_errors")


class Validated(Toy):
    """Reports its validation loss, as people do."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if not dataloader_idx:
            self.log("val_loss", self.influence_loss(batch).mean(), add_dataloader_idx=False)


def fit(folder, module=None, val=None, *, logger=None, trainer=None, kind=pl.Trainer, train=None, **options):
    """A trainer that has fitted a module, with validations, and a callback that logs two examples of each."""
    pl.seed_everything(0, verbose=False)
    module = Validated() if module is None else module
    callback = TracInCallback(
        folder / "trace", **{"dtype": "float32", "log_examples": 2, "on_error": "raise", **options}
    )
    logger = CSVLogger(folder) if logger is None else logger
    settings = {"callbacks": [callback], "logger": logger, "log_every_n_steps": 1, "default_root_dir": folder}
    fitting = quiet(kind, **{**settings, **(trainer or {})})
    fitting.fit(module, loader(shuffle=True) if train is None else train, loader(test_texts()) if val is None else val)
    return fitting


def logged(trainer):
    return read(Path(trainer.loggers[0].log_dir) / "influential.jsonl")


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(trainer):
    """What a CSVLogger wrote: for each value its step and epoch."""
    with (Path(trainer.loggers[0].log_dir) / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    names = {name for line in lines for name in line}
    return {
        name: [(int(line["step"]), int(line["epoch"]), float(line[name])) for line in lines if line[name]]
        for name in names - {"step", "epoch"}
    }


def steps_of(rows):
    return list(dict.fromkeys(row["step"] for row in rows))


def examples_of(rows):
    """The examples of a table in its order: (loader, index)."""
    return list(dict.fromkeys((row["dataloader_idx"], row["test_index"]) for row in rows))


def brute_scores(trace, n_checkpoints, data=None, kind=Validated):
    """(n_test, n_train) by the definition, over the first checkpoints."""
    sides = [[], []]
    for checkpoint in trace.checkpoints[:n_checkpoints]:
        module = kind()
        module.load_state_dict(checkpoint.weights())
        for side, examples in zip(sides, (data or test_texts(), texts()), strict=True):
            losses = module.influence_loss
            rows = DataLoader(examples, batch_size=1)
            side.append(dense_gradients(module, module.embedding, rows, lambda row, losses=losses: losses(row).sum()))
    rates = [mean_rate(STEPS_PER_EPOCH * number, STEPS_PER_EPOCH * (number + 1)) for number in range(n_checkpoints)]
    return BruteForce(rates, *sides).scores()


def at_checkpoint(trace, number, data=None, kind=Validated):
    """Losses and predictions of all validation examples at the weights of a checkpoint."""
    module = kind().eval()
    module.load_state_dict(trace.checkpoints[number].weights())
    ids, labels = (data or test_texts()).tensors
    with torch.no_grad():
        logits = module(ids)
    return functional.cross_entropy(logits, labels, reduction="none"), logits.softmax(1)


def assert_scores(rows, scores, k=3):
    """The rows are the k strongest of each side that pushed at all, by the scores of all validation examples."""
    assert rows
    for _, index in examples_of(rows):
        for role, largest in (("proponent", True), ("opponent", False)):
            own = [row for row in rows if row["test_index"] == index and row["role"] == role]
            found = torch.tensor([row["score"] for row in own], dtype=torch.float64)
            expected = scores[index].double().topk(k, largest=largest).values
            expected = expected[expected > 0] if largest else expected[expected < 0]
            assert [row["rank"] for row in own] == list(range(1, len(expected) + 1))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-10)
            by_index = scores[index].double()[[row["train_index"] for row in own]]
            torch.testing.assert_close(found, by_index, rtol=1e-4, atol=1e-10)


def explanation_of(label, prediction, proponents, opponents=(), confidence=0.9):
    """One whose influential examples are given by label and score."""
    word = Word("a|b", "", (0,))

    def pushed(label, score):
        return Influential(Example(3, (word,), label), score, abs(score) / 10, (score,))

    test = Example(0, (Word("so_so", "", (0,)), Word("<b>", " ", (1,))), label, prediction, confidence)
    return Explanation(0, test, (), *(tuple(pushed(*each) for each in side) for side in (proponents, opponents)))
